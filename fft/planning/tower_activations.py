"""Layers that see images, on the meta device: what they are run with there, and what a micro-batch brings to each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fft.images.grids import blank_grid
from fft.images.rules import GRIDS
from fft.models.carried import Carried, ModelLayer
from fft.models.layers import DecoderLayer, Embedding
from fft.models.recompute import kept_of, selective
from fft.models.rotary import Rotary, Turns, map_turns
from fft.models.spec import ModelSpec
from fft.models.towers import SeenImages, trained_tower
from fft.models.vision_layers import Merger, Patches, VisionBlock
from fft.ops.documents import Documents
from fft.planning.image_load import ImageLoad
from fft.planning.memory import Taken

_INT, _LONG = 4, 8


class SeenRow:
    """A micro-batch of ``samples`` rows of the most patches of a ``load``, and the layers that see them.

    The row has ``tokens``, of which a sequence-parallel rank has ``own``; all of its ranks have all patches. Decoder
    layers are cut into ``halves``.
    """

    def __init__(self, spec: ModelSpec, load: ImageLoad, samples: int, tokens: int, own: int, halves: int = 1) -> None:
        tower, rules = trained_tower(spec), spec.images
        if tower is None or rules is None:
            raise ValueError("a model that sees no images has no row of them")
        self._spec, self._tower, self._tokens, self._own = spec, tower, tokens, own
        self._halves = halves
        width = spec.text.hidden_size
        grid = blank_grid(rules)
        squares = 1 + -(-load.most * samples // prod(grid))  # the last image is blank
        shape = (1, grid[1], grid[2] * squares) if rules.family in GRIDS else (squares, *grid[1:])
        self._seen = tower.see(torch.tensor([shape], dtype=torch.int32), torch.device("meta"), spec.dtype)
        features = prod(shape) // rules.merge**2
        vision = spec.config.vision_config
        depth = getattr(vision, "embed_dim", None) or vision.hidden_size
        states = (prod(shape), depth) if rules.family in GRIDS else (squares, grid[1] * grid[2] + 1, depth)
        real = min(own, own * features // tokens)  # tokens of images in the share
        with torch.device("meta"):
            self._patches = torch.empty(prod(shape), 3 * rules.patch**2, dtype=torch.uint8)
            self._states = torch.empty(states, dtype=spec.dtype, requires_grad=True)
            self._features = torch.empty(features, width, dtype=spec.dtype, requires_grad=True)
            self._index = torch.empty(2, real + 1, dtype=torch.int32)
        self._taps = [index for index in range(tower.depth) if tower.tap(index) is not None]
        self.existing = [self._patches, self._states, self._features, self._index, *_tensors(self._seen)]

    @property
    def pixels(self) -> int:
        """Bytes of the patches of all its images."""
        return self._patches.nbytes

    @property
    def states(self) -> int:
        """Bytes of the states of the patches of all its images."""
        return self._states.nbytes

    @property
    def features(self) -> int:
        """Bytes of the features of all its images, those for decoder layers among them."""
        return (1 + len(self._taps)) * self._features.nbytes

    def taps_at(self, number: int) -> bool:
        """Whether a layer of the pipeline adds a tap to its output."""
        first = 1 if self._spec.shared_tower else self._tower.depth + 3
        layer, half = divmod(number - first, self._halves)
        return 0 <= layer < len(self._taps) and half == self._halves - 1

    def through(self, kind: type[ModelLayer], modules: Mapping[str, nn.Module]) -> Callable[[], tuple[Tensor, ...]]:
        """A forward of a layer of the tower, which has these ``modules``."""
        first, *others = modules.values()
        if kind is Patches:
            return lambda: (self._tower.begin((first, *others), self._patches, self._seen),)
        if kind is Merger:
            return lambda: (self._tower.end((first, *others), self._states.clone(), self._seen),)
        run = partial(selective, self._tower.run, kept=kept_of(first)) if self._spec.selective else self._tower.run

        def block() -> tuple[Tensor, ...]:
            states = run(first, 0, self._states.clone(), self._seen, self._spec.attention)
            return states, *(module(states) for module in others)

        return block

    def placed(self, hidden: Tensor) -> Tensor:
        """As the embedding puts features in the places of their tokens."""
        places, features = self._row().at_images()
        return hidden.index_copy(1, places, self._features.clone()[features][None])

    def tapped(self, hidden: Tensor) -> Tensor:
        """As a decoder layer ends that has a tap."""
        return self._row(self._features.clone()).tapped(hidden).states

    def _row(self, *taps: Tensor) -> Carried:
        return Carried(self._index[0], taps=taps, index=self._index)

    def taken(self, kinds: Sequence[type[ModelLayer]]) -> list[Taken]:
        """What each layer of the pipeline takes."""
        row, found = self._tokens + 1, []
        turns = turns_of(self._spec, f"{self._spec.base}.layers.0", self._own, self._spec.dtype)
        decoder = _LONG * self._own + sum(t.nbytes for t in tree_leaves(turns) if t is not None)
        tower = sum(tensor.nbytes for tensor in _tensors(self._seen))
        hidden = self._own * self._spec.text.hidden_size * self._spec.dtype.itemsize
        seen = _INT * row + _INT * 3 * self._own + self._index.nbytes
        with_ids, each = seen + _INT * self._own, self._features.nbytes
        taps = len(self._taps) if self._spec.shared_tower else 0
        for number, kind in enumerate(kinds):
            if kind is Patches:
                found.append(Taken(0, 0, with_ids + self._patches.nbytes, "tower", tower))
            elif kind in (VisionBlock, Merger):
                found.append(Taken(self._states.nbytes, taps * each, with_ids, "tower", tower))
                taps += kind is VisionBlock and number - 1 in self._taps
            elif kind is Embedding:
                found.append(Taken(each, taps * each, with_ids, "ends", 0))
            elif kind is DecoderLayer:
                found.append(Taken(hidden, taps * each, seen, "decoder", decoder))
                taps -= self.taps_at(number)
            else:
                found.append(Taken(hidden, 0, seen, "ends", 0))
        return found


def turns_of(spec: ModelSpec, path: str, tokens: int, dtype: torch.dtype) -> Turns | None:
    """Cosines and sines, on the meta device, for the decoder layer at ``path``."""
    number, rotary = path.rpartition(".")[2], Rotary(spec.skeleton)
    kind = rotary.kind(int(number) if number.isdecimal() else 0)
    turns = rotary.turns(torch.empty(0, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64), kind)
    return map_turns(turns, lambda x: x.new_empty(*x.shape[:-2], tokens, x.shape[-1], device="meta"))


def _tensors(seen: SeenImages) -> list[Tensor]:
    """All of what was computed of a micro-batch's images."""
    values = [getattr(seen, field.name) for field in fields(seen)]
    values += [value.cu_seqlens for value in values if isinstance(value, Documents)]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
