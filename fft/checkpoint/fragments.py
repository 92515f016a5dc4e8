"""Training state on disk: fragments of flattened parameters by canonical name, in one file per rank that wrote.

A rank has a range of a flattened parameter, or, with tensor parallelism, of the flattened part of it that it holds.
What is asked for may be cut in another way: every element is looked up.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fft.errors import UserError
from fft.parallel.tensor_plan import Shard
from fft.weights.files import TensorFile, tensors_of
from fft.weights.in_store import StoredSlice

#: Metadata of a rank's file: for each parameter what :meth:`Fragment.to_list` gives.
FRAGMENTS = "fragments"
#: Kind of the fp32 copy that the optimizer steps; there is none where the weights themselves are fp32.
MASTER = "master"


def rank_file(rank: int) -> str:
    """Name of the file with a rank's share of the training state."""
    return f"rank-{rank:05d}.safetensors"


#: Elements that are looked up at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Fragment:
    """Values [start, stop) of a flattened parameter, or of the flattened part of it that ``shard`` describes."""

    start: int
    stop: int
    shard: Shard | None = None

    @classmethod
    def of(cls, start: int, stop: int, shard: Shard | None) -> "Fragment":
        """The same; a part that is one stretch of the parameter is counted from the parameter's start."""
        if shard is None or shard.flat_start is None:
            return cls(start, stop, shard)
        return cls(start + shard.flat_start, stop + shard.flat_start)

    def to_list(self) -> list:
        """As JSON takes it: start and stop, and of a part the parameter's shape, the dimension, the spans, experts."""
        shard = self.shard
        if shard is None:
            return [self.start, self.stop]
        experts = [] if shard.experts is None else [shard.experts]
        return [self.start, self.stop, shard.shape, shard.dim, shard.spans, *experts]

    @classmethod
    def from_list(cls, values: list) -> "Fragment":
        """The inverse of :meth:`to_list`."""
        start, stop, *rest = values
        if not rest:
            return cls(start, stop)
        shape, dim, spans, *experts = rest
        part = Shard(tuple(shape), dim, tuple(map(tuple, spans)), experts=tuple(experts[0]) if experts else None)
        return cls(start, stop, part)


class SavedFragments:
    """Fragments of parameters, each in some rank's file, read slice by slice."""

    def __init__(self, training: Path) -> None:
        self._training = training
        self._fragments: dict[str, list[tuple[Fragment, TensorFile]]] = defaultdict(list)
        for file in sorted(training.glob("rank-*.safetensors")):
            tensors = tensors_of(file)
            for name, values in json.loads(tensors.metadata()[FRAGMENTS]).items():
                self._fragments[name].append((Fragment.from_list(values), tensors))

    def __contains__(self, name: str) -> bool:
        """Whether there is anything of a parameter."""
        return name in self._fragments

    def fill(self, target: Tensor, name: str, kind: str, start: int, shard: Shard | None = None) -> None:
        """Copy what was saved from ``start`` on, of a parameter or of a part of it, into ``target``.

        Raises :class:`UserError` if some is missing.
        """
        wanted, filled = Fragment.of(start, start + target.numel(), shard), 0
        for saved, tensors in self._fragments[name]:
            values = tensors.get_slice(f"{kind}/{name}")
            if wanted.shard is None and saved.shard is None:
                low, high = max(wanted.start, saved.start), min(wanted.stop, saved.stop)
                if low < high:
                    source = values[low - saved.start : high - saved.start]
                    target[low - wanted.start : high - wanted.start].copy_(source)
                    filled += high - low
                continue
            for first in range(wanted.start, wanted.stop, _CHUNK):
                chunk = target[first - wanted.start :][:_CHUNK]
                filled += _look_up(chunk, first, wanted.shard, saved, values)
        if filled != target.numel():
            raise UserError(
                f"{self._training} holds {filled:,} of {target.numel():,} values of {kind} of {name}: it was not "
                "written by a run of this model."
            )


def _look_up(target: Tensor, first: int, shard: Shard | None, saved: Fragment, values: Tensor | StoredSlice) -> int:
    """Fill what ``saved`` has of ``target``, elements from ``first`` on of a part; returns how many."""
    index = torch.arange(first, first + len(target))
    if shard is not None:
        index = shard.flat(index)
    if saved.shard is not None:
        index = saved.shard.locate(index)
    here = (index >= saved.start) & (index < saved.stop)
    positions = index[here]
    if len(positions):
        low, high = int(positions.min()), int(positions.max()) + 1
        source = values[low - saved.start : high - saved.start]
        target[here.to(target.device)] = source[positions - low].to(target.device)
    return len(positions)
