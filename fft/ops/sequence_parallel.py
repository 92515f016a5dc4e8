"""What a model's attention is given where a row's tokens are spread over ranks: a ring, Ulysses, or both.

Ulysses (arXiv:2309.14509) composes in front of the ring of :mod:`fft.ops.ring`: ``degree`` consecutive ranks exchange
tokens for heads, and each then takes part in a ring of its own for its heads.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fft.errors import UserError
from fft.ops.backends import Backend
from fft.ops.backends.choice import choose
from fft.ops.documents import Boundaries, Documents, Softmax
from fft.ops.ring import Exchange, GroupExchange, Ring, ring_attention
from fft.parallel.groups import own_group
from fft.parallel.ring_calls import RankPlan, Span
from fft.parallel.ring_plan import TokenShards, plan_rank, plan_shards
from fft.parallel.window_plan import plan_attention

#: Those that there are, for operators, which are given names.
_BY_NAME: WeakValueDictionary[str, "SequenceParallel"] = WeakValueDictionary()
#: Of all tokens before a query, and of nothing else.
PLAIN = Softmax()


class _HeadsForTokens(torch.autograd.Function):
    """[tokens of this rank, heads, size] -> [tokens of all ranks, heads / ranks, size], or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: tuple[int, ...], group: dist.ProcessGroup, back: bool) -> Tensor:
        ctx.exchange = tokens, group, back
        ranks, own = len(tokens), tokens[dist.get_rank(group)]
        _, heads, size = x.shape
        if back:
            mixed = x.new_empty(ranks * own, heads, size)
            dist.all_to_all_single(mixed, x.contiguous(), [own] * ranks, list(tokens), group=group)
            return mixed.view(ranks, own, heads, size).transpose(0, 1).reshape(own, ranks * heads, size)
        mixed = x.view(own, ranks, heads // ranks, size).transpose(0, 1).reshape(ranks * own, heads // ranks, size)
        gathered = x.new_empty(sum(tokens), heads // ranks, size)
        dist.all_to_all_single(gathered, mixed, list(tokens), [own] * ranks, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        tokens, group, back = ctx.exchange
        return _HeadsForTokens.apply(grad, tokens, group, not back), None, None, None


@dataclass(frozen=True)
class ShardedDocuments:
    """The documents of a packed row whose tokens are spread over ranks: what a model passes to its attention."""

    row: Documents
    shards: TokenShards
    parallel: "SequenceParallel"

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return self.row.max_length

    @cached_property
    def real(self) -> tuple[int, int]:
        """The first so many of this rank's tokens, which are in the row's order, and of all, are no blank ones."""
        tokens, _ = self.row.real
        return int(np.searchsorted(self.parallel.tokens(self.shards), tokens)), tokens

    @cached_property
    def boundaries(self) -> Boundaries:
        """For compiled layers, whose attention is that of rings alone."""
        return self.row.boundaries._replace(ranks=self.parallel.name)

    def positions(self) -> Tensor:
        """Position of each of this rank's tokens within its document, int64 [tokens]."""
        own = torch.from_numpy(self.parallel.tokens(self.shards)).to(self.row.cu_seqlens.device)
        return self.row.positions()[own]


class SequenceParallel:
    """Attention over ``group``: rings over ranks ``degree`` apart, Ulysses within each ``degree`` consecutive ones.

    Collective: every rank of the default group creates it, for all ``groups`` (lists of global ranks, of one size).
    Raises :class:`UserError` where ``degree`` does not divide that size.
    """

    def __init__(self, groups: list[list[int]], degree: int = 1) -> None:
        size = len(groups[0])
        if degree < 1 or size % degree:
            raise UserError(f"--ulysses_degree {degree} must divide the sequence-parallel size {size}.")
        self.degree, self.rings = degree, size // degree
        rank = dist.get_rank()
        self.position = next(group.index(rank) for group in groups if rank in group)
        inner = [group[i : i + degree] for group in groups for i in range(0, size, degree)]
        outer = [group[i::degree] for group in groups for i in range(degree)]
        self._ulysses = own_group(inner) if degree > 1 else None
        ring = own_group(outer)
        self._exchange: Exchange = GroupExchange(ring)
        #: All ranks that share this rank's rows.
        self.group = ring if degree == 1 else own_group(groups)
        _BY_NAME[self.name] = self

    @classmethod
    def called(cls, name: str) -> "SequenceParallel":
        """That of a :attr:`name`."""
        return _BY_NAME[name]

    @property
    def name(self) -> str:
        """That of its group: what an operator can be given."""
        return self.group.group_name

    def ring(
        self, shards: TokenShards, scale: float, backend: Backend, window: int | None = None, cap: float | None = None
    ) -> Ring:
        """This rank's part in attention over tokens that are dealt out so."""
        return Ring(plan_attention(shards, self._exchange.rank, window), self._exchange, backend, scale, cap)

    def shards(self, bounds: tuple[int, ...]) -> TokenShards:
        """Who holds which tokens of a row with these document boundaries: the same for all ranks of a Ulysses group."""
        return plan_shards(bounds, self.rings)

    def tokens(self, shards: TokenShards) -> np.ndarray:
        """Index in the row of every token that this rank holds, int64: Ulysses shares a ring's rank's out equally."""
        start, stop = self._shares(plan_rank(shards, self._exchange.rank))[self.position % self.degree]
        return shards.tokens(self.position // self.degree)[start:stop]

    def _shares(self, plan: RankPlan) -> list[Span]:
        cuts = [plan.tokens * i // self.degree for i in range(self.degree + 1)]
        return list(pairwise(cuts))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: TokenShards,
        scale: float,
        backend: Backend | None = None,
        softmax: Softmax = PLAIN,
    ) -> Tensor:
        """Causal attention inside each document, over all ranks of the group.

        ``q`` is [this rank's tokens, heads, head size], ``k`` and ``v`` [this rank's tokens, key/value heads, head
        size]; ``shards`` are planned for size / degree ranks. Returns q's shape. Collective: all ranks of the group,
        in forward and in backward. Raises :class:`UserError` where heads cannot be shared out.
        """
        sinks = softmax.sinks
        backend = backend or choose(q.device, q.dtype, size=q.shape[-1], capped=softmax.cap is not None)
        ring = self.ring(shards, scale, backend, softmax.window, softmax.cap)
        if self.degree == 1:
            return ring_attention(q, k, v, ring, sinks)
        for heads, name in ((q.shape[1], "attention"), (k.shape[1], "key/value")):
            if heads % self.degree:
                raise UserError(f"--ulysses_degree {self.degree} must divide the {heads} {name} heads of a rank.")
        tokens = tuple(b - a for a, b in self._shares(ring.plan))
        q, k, v = (_HeadsForTokens.apply(x, tokens, self._ulysses, False) for x in (q, k, v))
        if sinks is not None:
            sinks = sinks.chunk(self.degree)[self.position % self.degree]
        return _HeadsForTokens.apply(ring_attention(q, k, v, ring, sinks), tokens, self._ulysses, True)
