"""Training state on disk: pieces of flattened parameters by canonical name, in one file per rank that wrote."""

import json
from collections import defaultdict
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fft.errors import UserError

#: Metadata of a rank's file: for each parameter the range [first, last + 1) of its flattened values that the file has.
FRAGMENTS = "fragments"
#: Kind of the fp32 copy that the optimizer steps; there is none where the weights themselves are fp32.
MASTER = "master"


def rank_file(rank: int) -> str:
    """Name of the file with a rank's share of the training state."""
    return f"rank-{rank:05d}.safetensors"


class Pieces:
    """Ranges of flattened parameters, each in some rank's file, read slice by slice."""

    def __init__(self, training: Path) -> None:
        self._training = training
        self._pieces: dict[str, list[tuple[int, int, safe_open]]] = defaultdict(list)
        for file in sorted(training.glob("rank-*.safetensors")):
            tensors = safe_open(file, framework="pt")
            for name, (start, stop) in json.loads(tensors.metadata()[FRAGMENTS]).items():
                self._pieces[name].append((start, stop, tensors))

    def __contains__(self, name: str) -> bool:
        """Whether there is anything of a parameter."""
        return name in self._pieces

    def fill(self, target: Tensor, name: str, kind: str, start: int) -> None:
        """Copy what was saved from ``start`` on into ``target``. Raises :class:`UserError` if some is missing."""
        stop, filled = start + target.numel(), 0
        for first, last, tensors in self._pieces[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                source = tensors.get_slice(f"{kind}/{name}")[low - first : high - first]
                target[low - start : high - start].copy_(source)
                filled += high - low
        if filled != target.numel():
            raise UserError(
                f"{self._training} holds {filled:,} of {target.numel():,} values of {kind} of {name}: it was not "
                "written by a run of this model."
            )
