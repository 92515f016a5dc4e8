"""A vision tower as layers of the pipeline, before the embedding: patches, blocks, and what merges them to features."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fft.models.carried import Carried, ModelLayer
from fft.models.causal_lm import StageBuilder
from fft.models.recompute import kept_of, selective
from fft.models.towers import SeenImages, Tower
from fft.ops.backends.choice import choose
from fft.ops.documents import UnderWay


class TowerPlan:
    """A tower, and what its layers in a stage need to know of a micro-batch, computed by the first one that asks."""

    def __init__(self, builder: StageBuilder, tower: Tower) -> None:
        self.builder, self.tower, self.attention = builder, tower, builder.spec.attention
        #: Hidden size of the features.
        self.width = builder.spec.text.hidden_size
        self._chosen = False
        self._seen: UnderWay[SeenImages] = UnderWay()

    def of(self, grids: Tensor, device: torch.device) -> SeenImages:
        """Of the images of these grids."""
        if not self._chosen:
            # A kernel is compared with the reference when it is first chosen, which must not happen within a layer.
            self._chosen = True
            choose(device, self.builder.spec.dtype, self.attention, self.builder.spec.tower_head_size)
        self._seen.kept = self.builder.under_way.kept
        return self._seen.of(grids, lambda grids, _: self.tower.see(grids, device, self.builder.spec.dtype))


class _TowerLayer(ModelLayer):
    def __init__(self, plan: TowerPlan, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.named = {path: plan.builder.build(path) for path in paths}
        self.modules_of = torch.nn.ModuleList(self.named.values())
        self._plan, self._tower = plan, plan.tower

    def _seen(self, row: Carried, device: torch.device) -> SeenImages:
        if row.grids is None:
            raise ValueError("a tower's layer came after the embedding")
        return self._plan.of(row.grids, device)


class Patches(_TowerLayer):
    """Patches of uint8 -> states of patches."""

    def __init__(self, plan: TowerPlan) -> None:
        super().__init__(plan, plan.tower.first)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``inputs`` are those of the pipeline, see :class:`~fft.models.carried.Carried`."""
        row = Carried.of(inputs)
        if row.patches is None:
            raise ValueError("the first layer of a tower takes patches")
        seen = self._seen(row, row.patches.device)
        states = self._tower.begin(tuple(self.modules_of), row.patches, seen)
        return states, *inputs[1:]


class VisionBlock(_TowerLayer):
    """A block of the tower, and what it gives a decoder layer, if it does."""

    def __init__(self, plan: TowerPlan, index: int) -> None:
        tap = plan.tower.tap(index)
        super().__init__(plan, (plan.tower.block(index), *([] if tap is None else [tap])))
        self._index = index
        self._kept = kept_of(self.modules_of[0]) if plan.builder.spec.selective else None

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """States, and features for a decoder layer, in the order of the blocks."""
        row = Carried.of(inputs)
        seen = self._seen(row, row.states.device)
        block, *tap = self.modules_of
        arguments = block, self._index, row.states, seen, self._plan.attention
        if self._kept is not None:
            states = selective(self._tower.run, *arguments, kept=self._kept)
        else:
            states = self._tower.run(*arguments)
        made = [module(states) for module in tap]
        return states, *row.taps, *made, *inputs[1 + len(row.taps) :]


class Merger(_TowerLayer):
    """States of patches -> features, one a token, of the decoder's hidden size."""

    def __init__(self, plan: TowerPlan) -> None:
        super().__init__(plan, plan.tower.last)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See the class."""
        row = Carried.of(inputs)
        seen = self._seen(row, row.states.device)
        return self._tower.end(tuple(self.modules_of), row.states, seen), *inputs[1:]


class HeldTower(ModelLayer):
    """A whole tower, which every stage has: as a layer of the pipeline it does nothing."""

    def __init__(self, plan: TowerPlan) -> None:
        super().__init__()
        tower = plan.tower
        blocks = [VisionBlock(plan, index) for index in range(tower.depth)]
        self._layers = torch.nn.ModuleList([Patches(plan), *blocks, Merger(plan)])
        self.named = {}
        self._kinds, self._width = 1 + sum(tower.tap(i) is not None for i in range(tower.depth)), plan.width

    @property
    def is_trained(self) -> bool:
        """Whether any of it is."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    def encode(self, patches: Tensor, grids: Tensor, again: bool = False) -> Tensor:
        """Features of images, and those for decoder layers, [tokens, kinds, hidden size].

        ``patches`` and ``grids`` are those of :class:`~fft.models.carried.Carried`. With ``again`` blocks keep their
        inputs alone and run once more in backward.
        """
        none = grids.new_zeros(1)
        tensors: tuple[Tensor, ...] = (patches, none, none, none, none, grids)
        for layer in self._layers:
            if again and isinstance(layer, VisionBlock) and torch.is_grad_enabled():
                tensors = checkpoint(layer, tensors, use_reentrant=False, preserve_rng_state=False)
            else:
                tensors = layer(tensors)
        row = Carried.of(tensors)
        return torch.stack([row.states, *row.taps], dim=1)

    def no_features(self, rows: int = 0) -> Tensor:
        """Zeros in the shape of :meth:`encode`'s, for so many rows."""
        parameter = next(self.parameters())
        return parameter.new_zeros(rows, self._kinds, self._width)
