"""What travels between the layers of a pipeline: a tuple of tensors, those of floating type first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor, nn

#: By how many tensors there are that are not floating, what they are, in their order.
_NAMES = {
    1: ("cu_seqlens",),
    2: ("input_ids", "cu_seqlens"),
    3: ("cu_seqlens", "positions", "index"),
    4: ("input_ids", "cu_seqlens", "positions", "index"),
    5: ("input_ids", "cu_seqlens", "positions", "index", "grids"),
    6: ("patches", "input_ids", "cu_seqlens", "positions", "index", "grids"),
}
_DIMENSIONS = 4


class ModelLayer(nn.Module):
    """A layer of the pipeline; ``named`` are the modules of the model in it, by their names there."""

    named: dict[str, nn.Module]


@dataclass(frozen=True)
class Carried:
    """A micro-batch on its way: hidden states and, for those layers that are still to need it, what they need.

    ``hidden`` are hidden states [1, tokens, hidden size], in a vision tower its own, of patches. ``taps`` [tokens of
    images, hidden size] are what the first decoder layers, one each, add to the states of images. ``cu_seqlens`` int32
    [tokens + 1] are the document boundaries, ``input_ids`` int32 [1, tokens]. Where images are seen, ``positions`` are
    int32 [3, tokens]; ``index`` int32 [2, n + 1] says of tokens of images where in the row they are, and the number of
    the feature that they take, its last column of none; ``grids`` int32 [images, 3] and ``patches`` uint8 [patches,
    colours] are those of :class:`fft.data.image_batches.ImageBatch`. ``draws`` int64 [tokens], alone of that
    type, are the random numbers of tokens (:mod:`fft.data.draws`), where adapters drop some of their input.
    """

    cu_seqlens: Tensor
    hidden: Tensor | None = None
    taps: tuple[Tensor, ...] = ()
    input_ids: Tensor | None = None
    positions: Tensor | None = None
    index: Tensor | None = None
    grids: Tensor | None = None
    patches: Tensor | None = None
    draws: Tensor | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Carried":
        """From a layer's input."""
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        rest = tensors[len(floats) :]
        draws = rest[-1] if rest[-1].dtype == torch.int64 else None
        rest = rest if draws is None else rest[:-1]
        named = dict(zip(_NAMES[len(rest)], rest, strict=True))
        return cls(**named, hidden=floats[0] if floats else None, taps=tuple(floats[1:]), draws=draws)

    @property
    def states(self) -> Tensor:
        """The hidden states of a row that has some. Raises ValueError before the first layer."""
        if self.hidden is None:
            raise ValueError("there are no hidden states yet")
        return self.hidden

    def tensors(self) -> tuple[Tensor, ...]:
        """As a layer's output."""
        floats = () if self.hidden is None else (self.hidden, *self.taps)
        rest = (self.patches, self.input_ids, self.cu_seqlens, self.positions, self.index, self.grids, self.draws)
        return *floats, *(tensor for tensor in rest if tensor is not None)

    def embedded(self, hidden: Tensor) -> "Carried":
        """What the decoder needs: its states, not ids and grids."""
        return replace(self, hidden=hidden, input_ids=None, grids=None, patches=None)

    def at_images(self) -> tuple[Tensor, Tensor]:
        """Where tokens of images are in the row, and the features that they take, int64."""
        if self.index is None:
            raise ValueError("a row without images has no places of theirs")
        places, features = self.index[:, :-1].long()
        return places, features

    def tapped(self, hidden: Tensor) -> "Carried":
        """After a decoder layer: what the tower has for this one is added to the states of images."""
        if not self.taps:
            return replace(self, hidden=hidden)
        (tap, *taps), (places, features) = self.taps, self.at_images()
        return replace(self, hidden=hidden.index_add(1, places, tap[features][None]), taps=tuple(taps))


def packed(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same with all floating ones in one, flat, before a tensor of their shapes: between stages one travels."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    shapes = torch.tensor([[*t.shape, *[0] * (_DIMENSIONS - t.ndim)] for t in floats], dtype=torch.int32)
    flat = floats[0].reshape(-1) if len(floats) == 1 else torch.cat([t.reshape(-1) for t in floats])
    return flat, shapes.to(flat.device), *tensors[len(floats) :]


def unpacked(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inverse of :func:`packed` (one host synchronisation)."""
    flat, shapes, *rest = tensors
    sizes = [[size for size in shape if size] for shape in shapes.tolist()]
    ends = accumulate(map(prod, sizes), initial=0)
    return *(flat[a:b].view(size) for (a, b), size in zip(pairwise(ends), sizes, strict=True)), *rest
