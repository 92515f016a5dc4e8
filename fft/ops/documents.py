"""Where the documents of a packed row of tokens begin and end, on the device and on the host, and which see which."""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Boundaries(NamedTuple):
    """Those of documents as compiled layers take them: int32 [documents + 1], on the device and on the host; and the
    name of the ranks that share their tokens, if some do.
    """

    cu_seqlens: Tensor
    host: Tensor
    ranks: str | None = None


@dataclass(frozen=True)
class Documents:
    """The documents of a packed row of tokens.

    ``cu_seqlens`` is an int32 tensor [documents + 1] on the device, ``bounds`` the same numbers on the host, so that
    no layer waits for the device to learn them. ``blank`` says that the last document is none: it rounds the row up.
    """

    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    blank: bool = False

    @classmethod
    def of(cls, bounds: tuple[int, ...], device: torch.device | str = "cpu") -> "Documents":
        """From boundaries known on the host."""
        return cls(torch.tensor(bounds, dtype=torch.int32, device=device), bounds)

    @classmethod
    def from_padded(cls, cu_seqlens: Tensor, host: list[int] | None = None) -> "Documents":
        """Drop the repeated last entries that pad ``cu_seqlens`` to [tokens + 1]; ``host``, if given, are its numbers.

        Else the host waits for them. What tokens there are from the last entry on are a blank document. Raises
        ValueError for another length.
        """
        host = cu_seqlens.tolist() if host is None else host
        bounds, tokens = tuple(host[: host.index(host[-1]) + 1]), len(host) - 1
        cu_seqlens = cu_seqlens[: len(bounds)]
        if bounds[-1] == tokens:
            return cls(cu_seqlens, bounds)
        if bounds[-1] > tokens:
            raise ValueError(f"{len(host)} entries of cu_seqlens for {bounds[-1]} tokens: there must be one more.")
        return cls(torch.cat([cu_seqlens, cu_seqlens.new_full((1,), tokens)]), (*bounds, tokens), blank=True)

    @property
    def real(self) -> tuple[int, int]:
        """The first so many of this rank's tokens, and of all, are no blank ones."""
        tokens = self.bounds[-2 if self.blank else -1]
        return tokens, tokens

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(b - a for a, b in pairwise(self.bounds))

    @cached_property
    def boundaries(self) -> Boundaries:
        """For compiled layers, whose graphs hold for any number of documents."""
        host = torch.tensor(self.bounds, dtype=torch.int32)
        for tensor in (self.cu_seqlens, host):
            torch._dynamo.mark_dynamic(tensor, 0)
        return Boundaries(self.cu_seqlens, host)

    def positions(self) -> Tensor:
        """Position of every token within its document, int64 [tokens]."""
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.diff().long()
        total = self.bounds[-1]
        return torch.arange(total, device=starts.device) - starts.repeat_interleave(lengths, output_size=total)


class UnderWay(Generic[T]):
    """What is known of the micro-batches between their forward and their backward, so that no host waits for it again.

    A micro-batch is told by the memory of one of its tensors, such as its boundaries: a recomputation is given another
    tensor, but that. It is kept from other use by being held here. Of ``kept`` micro-batches something is known, the
    last ones.
    """

    def __init__(self, kept: int = 1) -> None:
        self.kept = kept
        self._known: OrderedDict[tuple[int, int], tuple[Tensor, T]] = OrderedDict()
        self._expected: deque[list[int]] = deque()

    def start(self) -> None:
        """Expect no micro-batch any more."""
        self._expected.clear()

    def expect(self, numbers: list[int]) -> None:
        """What the tensor of a micro-batch to come, after those already expected, has is known on the host."""
        self._expected.append(numbers)

    def of(self, tensor: Tensor, make: Callable[[Tensor, list[int] | None], T]) -> T:
        """What ``make`` makes of a micro-batch's tensor and, if they are known, its numbers; once for each."""
        name = tensor.data_ptr(), tensor._version
        if name not in self._known:
            host = self._expected.popleft() if self._expected else None
            self._known[name] = tensor, make(tensor, host)
            while len(self._known) > self.kept:
                self._known.popitem(last=False)
        return self._known[name][1]


@dataclass(frozen=True)
class Segments:
    """What one call of attention computes: document i of ``queries`` sees document i of ``keys``.

    Every query sees all its document's keys; with ``causal``, for which both are of equal length in every document,
    those up to its own position. ``scale`` multiplies the scores; with a ``cap`` c they are c * tanh(scores / c) then.
    """

    queries: Documents
    keys: Documents
    causal: bool
    scale: float
    cap: float | None = None

    @classmethod
    def within(cls, documents: Documents, scale: float, cap: float | None = None) -> "Segments":
        """Causal attention of documents to themselves."""
        return cls(documents, documents, True, scale, cap)

    @property
    def plain_scale(self) -> float:
        """``scale``, for kernels that cap no scores. Raises ValueError where they are to."""
        if self.cap is not None:
            raise ValueError("this kernel caps no scores")
        return self.scale

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """Boundaries of queries and of keys on the device, then tokens of the longest document of each."""
        queries, keys = self.queries, self.keys
        return queries.cu_seqlens, keys.cu_seqlens, queries.max_length, keys.max_length

    def spans(self) -> list[tuple[slice, slice]]:
        """Rows of the queries and of the keys of each document, for kernels that take one document at a time.

        Raises ValueError for queries without a key: what a softmax over nothing is, kernels do not agree on.
        """
        spans = []
        for (a, b), (c, d) in zip(pairwise(self.queries.bounds), pairwise(self.keys.bounds), strict=True):
            if a == b:
                continue
            if c == d:
                raise ValueError(f"queries {a} to {b} have no keys to attend to")
            spans.append((slice(a, b), slice(c, d)))
        return spans


@dataclass(frozen=True)
class Softmax:
    """What of a softmax is not plain: a query sees ``window`` tokens, itself the last (None: all before it); in the sum
    of each head's weights ``sinks`` [heads] are scores of nothing, as gpt-oss has them; and scores are capped at
    ``cap``, see :class:`Segments`.
    """

    window: int | None = None
    sinks: Tensor | None = None
    cap: float | None = None


def lse_dtype(q: Tensor) -> torch.dtype:
    """Scores, their log-sum-exp and sums of partial results are float32, float64 for float64 inputs."""
    return torch.promote_types(q.dtype, torch.float32)
