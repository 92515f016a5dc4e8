"""Vision towers as transformers has them: which modules they are made of, and what runs between these.

A tower makes features of patches of uint8, whatever images they are of: all images of a micro-batch lie end to end.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from fft.images.rules import ImageRules
from fft.models.spec import ModelSpec
from fft.models.vision import tower_of, vision_parts
from fft.ops.documents import Documents


@dataclass(frozen=True)
class SeenImages:
    """What the layers of a tower need to know of a micro-batch's images, computed once.

    ``turns`` are cosines and sines of patches; ``images`` the images' boundaries and ``windows`` those within which
    some blocks attend; ``order`` says in which order a token's patches stand in the row, None for their own.
    """

    grids: Tensor
    turns: tuple[Tensor, Tensor] | None = None
    images: Documents | None = None
    windows: Documents | None = None
    order: Tensor | None = None


class Tower(Protocol):
    """A family of towers. Paths are names in the model; the modules of ``first`` and ``last`` are handed over built."""

    depth: int
    first: tuple[str, ...]
    last: tuple[str, ...]

    def block(self, index: int) -> str:
        """The path of a block."""

    def tap(self, index: int) -> str | None:
        """The path of what makes features for a decoder layer of a block's output; None where nothing does."""

    def see(self, grids: Tensor, device: torch.device, dtype: torch.dtype) -> SeenImages:
        """What layers need of images of these ``grids`` int32 [images, 3]."""

    def begin(self, modules: tuple[nn.Module, ...], patches: Tensor, seen: SeenImages) -> Tensor:
        """States of patches uint8 [patches, colours]."""

    def run(self, block: nn.Module, index: int, states: Tensor, seen: SeenImages, attention: str) -> Tensor:
        """A block's output."""

    def end(self, modules: tuple[nn.Module, ...], states: Tensor, seen: SeenImages) -> Tensor:
        """Features [tokens, hidden size]."""


def trained_tower(spec: ModelSpec) -> Tower | None:
    """The tower of a model that sees images; None of one that does not, or is not to."""
    if spec.images is None:
        return None
    kind = InternTower if spec.config.model_type == "internvl" else QwenTower
    return kind(spec, spec.images)


class _Pixels:
    """uint8 to what towers take, on the device."""

    def __init__(self, rules: ImageRules) -> None:
        self._mean, self._std = (torch.tensor(x, dtype=torch.float32)[:, None] for x in (rules.mean, rules.std))

    def __call__(self, patches: Tensor) -> Tensor:
        """fp32 [patches, 3, pixels], as transformers' processors have them."""
        mean, std = self._mean.to(patches.device), self._std.to(patches.device)
        return (patches.view(len(patches), 3, -1).float() / 255 - mean) / std


class QwenTower:
    """Qwen2-VL, Qwen2.5-VL, with windows, and Qwen3-VL, with learned positions and taps."""

    def __init__(self, spec: ModelSpec, rules: ImageRules) -> None:
        (self._path,), self._rules = vision_parts(spec.skeleton), rules
        module: Any = tower_of(spec.skeleton)
        self._module, self._config = module, module.config
        self.depth = len(module.blocks)
        self._taps = list(getattr(module, "deepstack_visual_indexes", ()))
        self._whole = getattr(module, "fullatt_block_indexes", None)
        learned = (f"{self._path}.pos_embed",) if hasattr(module, "pos_embed") else ()
        self.first: tuple[str, ...] = (f"{self._path}.patch_embed", *learned)
        self.last: tuple[str, ...] = (f"{self._path}.merger",)
        self._pixels = _Pixels(rules)
        self._rotary: nn.Module | None = None

    def block(self, index: int) -> str:
        """See :class:`Tower`."""
        return f"{self._path}.blocks.{index}"

    def tap(self, index: int) -> str | None:
        """See :class:`Tower`."""
        return f"{self._path}.deepstack_merger_list.{self._taps.index(index)}" if index in self._taps else None

    def see(self, grids: Tensor, device: torch.device, dtype: torch.dtype) -> SeenImages:
        """See :class:`Tower`. One host synchronisation."""
        if self._rotary is None:  # its buffers are computed, never stored
            self._rotary = type(self._module.rotary_pos_emb)(self._config).to(device)
        host, merge = grids.cpu().long(), self._rules.merge
        where = get_vision_position_ids(host, merge)
        images = Documents.of(tuple(get_vision_cu_seqlens(host).tolist()), device)
        windows = order = None
        if self._whole is not None:
            window, patch = self._config.window_size, self._config.patch_size
            order, bounds = get_vision_window_index(host, merge, window, patch)
            where = where.view(-1, merge**2, where.shape[-1])[order].flatten(0, 1)
            windows, order = Documents.of(tuple(bounds.tolist()), device), order.to(device)
        turns = self._rotary(torch.empty(0, dtype=dtype, device=device), where.to(device))
        return SeenImages(grids, turns, images, windows, order)

    def begin(self, modules: tuple[nn.Module, ...], patches: Tensor, seen: SeenImages) -> Tensor:
        """See :class:`Tower`. The second frame of a still is the first."""
        embed, *learned = modules
        pixels = self._pixels(patches)[:, :, None].expand(-1, -1, self._rules.temporal, -1)
        states = embed(pixels.reshape(len(patches), -1))
        if learned:
            side, merge = self._module.num_grid_per_side, self._rules.merge
            mode = {"mode": self._module.interpolation_mode, "align_corners": self._module.interpolation_align_corners}
            index, weight = get_vision_interpolation_indices_and_weights(
                seen.grids.cpu().long(), num_grid_per_side=side, spatial_merge_size=merge, **mode
            )
            index, weight = index.to(states.device), weight.to(states.device)
            states = states + (learned[0](index) * weight[..., None]).sum(1).to(states.dtype)
        if seen.order is not None:
            merge = self._rules.merge**2
            states = states.view(-1, merge, states.shape[-1])[seen.order].flatten(0, 1)
        return states

    def run(self, block: nn.Module, index: int, states: Tensor, seen: SeenImages, attention: str) -> Tensor:
        """See :class:`Tower`."""
        images = seen.images if self._whole is None or index in self._whole else seen.windows
        if images is None:
            raise ValueError("images of which no boundaries are known")
        return block(
            states,
            cu_seqlens=images.cu_seqlens,
            max_seqlen=images.max_length,
            position_embeddings=seen.turns,
            images=images,
            attention=attention,
        )

    def end(self, modules: tuple[nn.Module, ...], states: Tensor, seen: SeenImages) -> Tensor:
        """See :class:`Tower`."""
        features = modules[0](states)
        return features if seen.order is None else features[seen.order.argsort()]


class InternTower:
    """InternVL: square tiles, each by itself, with a token of its class that is left out at the end."""

    def __init__(self, spec: ModelSpec, rules: ImageRules) -> None:
        self._path, projector = vision_parts(spec.skeleton)
        self._whole: Any = spec.skeleton.base_model
        self._rules, self._ratio = rules, spec.config.downsample_ratio
        tower: Any = tower_of(spec.skeleton)
        self.depth = len(tower.encoder.layer)
        self.first: tuple[str, ...] = (f"{self._path}.embeddings",)
        self.last: tuple[str, ...] = (f"{self._path}.layernorm", projector)
        self._pixels = _Pixels(rules)

    def block(self, index: int) -> str:
        """See :class:`Tower`."""
        return f"{self._path}.encoder.layer.{index}"

    def tap(self, index: int) -> str | None:
        """See :class:`Tower`."""
        return None

    def see(self, grids: Tensor, device: torch.device, dtype: torch.dtype) -> SeenImages:
        """See :class:`Tower`."""
        return SeenImages(grids)

    def begin(self, modules: tuple[nn.Module, ...], patches: Tensor, seen: SeenImages) -> Tensor:
        """See :class:`Tower`; [tiles, patches of a tile + 1, width]."""
        patch = self._rules.patch
        side = self._rules.tile // patch
        squares = self._pixels(patches).view(-1, side, side, 3, patch, patch)
        return modules[0](squares.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * patch, side * patch))

    def run(self, block: nn.Module, index: int, states: Tensor, seen: SeenImages, attention: str) -> Tensor:
        """See :class:`Tower`."""
        return block(states)

    def end(self, modules: tuple[nn.Module, ...], states: Tensor, seen: SeenImages) -> Tensor:
        """See :class:`Tower`."""
        norm, project = modules
        features = norm(states)[:, 1:]
        side = self._rules.tile // self._rules.patch
        square = features.reshape(len(features), side, side, features.shape[-1])
        shuffled = self._whole.pixel_shuffle(square, scale_factor=self._ratio)
        return project(shuffled.flatten(1, 2)).flatten(0, 1)
