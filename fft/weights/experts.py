"""Weights of experts: one tensor for all of a layer's in transformers' modules, tensors of their own in files.

``experts.gate_up_proj`` [experts, 2 * intermediate, hidden] is ``experts.0.gate_proj.weight``,
``experts.0.up_proj.weight``, ``experts.1.gate_proj.weight``, ... one after the other; ``experts.down_proj``
[experts, hidden, intermediate] likewise.
"""

import re
from dataclasses import replace
from math import prod

from torch import Tensor

from fft.parallel.tensor_plan import Shard

_FUSED = re.compile(r"(.+\.experts)\.(gate_up|down)_proj")
_STORED = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stored_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Names in files of what makes a parameter of ``shape``, in its order; empty if its name does not change."""
    found = _FUSED.fullmatch(name)
    if found is None:
        return []
    kinds = ("gate", "up") if found[2] == "gate_up" else ("down",)
    return [f"{found[1]}.{expert}.{kind}_proj.weight" for expert in range(shape[0]) for kind in kinds]


def stored_shape(names: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each of ``names`` stored tensors of a parameter of ``shape``."""
    experts, rows, columns = shape
    return (rows * experts // names, columns)


def stored_shard(names: int, shard: Shard | None) -> Shard | None:
    """The part of each of ``names`` stored tensors that makes a part of a parameter."""
    if shard is None:
        return None
    return replace(shard, shape=stored_shape(names, shard.shape), dim=shard.dim - 1, spans=shard.spans[:1])


def to_stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole parameters as they are stored; views of them."""
    stored = {}
    for name, tensor in tensors.items():
        names = stored_names(name, tensor.shape)
        chunks = tensor.flatten(0, 1).chunk(len(names)) if names else [tensor]
        stored.update(zip(names or [name], chunks, strict=True))
    return stored


def parameter_of(name: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """The parameter that a stored tensor of ``shape`` is part of, and where it begins in the flattened parameter."""
    found = _STORED.fullmatch(name)
    if found is None:
        return name, 0
    module, expert, kind = found[1], int(found[2]), found[3]
    fused, number = ("down", expert) if kind == "down" else ("gate_up", 2 * expert + (kind == "up"))
    return f"{module}.{fused}_proj", number * prod(shape)
