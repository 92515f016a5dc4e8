"""The optimizer's state by canonical parameter names, so that a checkpoint of any layout resumes at any other.

DeepSpeed's ZeRO optimizers keep masters and moments as slices of flat buffers, cut without regard to parameters;
without ZeRO a rank has those of its parameters whole. Each rank names the part of every parameter that it holds, as a
range of the flattened parameter, and writes those parts as safetensors; a rank that resumes reads the ranges that it
holds now, whoever wrote them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fft.checkpoint.fragments import FRAGMENTS, MASTER, Fragment, SavedFragments, rank_file
from fft.parallel.role import StageRole
from fft.parallel.tensor_plan import Shard
from fft.weights.files import opened

_MOMENTS = ("exp_avg", "exp_avg_sq")
_RANDOM = "random/cpu"
_DEVICE_RANDOM = "random/device"


@dataclass(frozen=True)
class StageOptimizer:
    """The optimizer of a rank's stage and its schedule.

    With ``zero`` the state is shared out over replicas, as slices of flat buffers, and ``adamw`` steps on those.
    """

    adamw: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR
    zero: bool
    device: torch.device


def gather(
    optimizer: StageOptimizer, parameters: Mapping[str, nn.Parameter], shards: Mapping[str, Shard], role: StageRole
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This rank's share of the optimizer state and its random states, and what tells where the share belongs.

    ``shards`` has the parameters of which this rank holds a part. Tensors alias the optimizer's own. Parameters in fp32
    are their own masters, which are not given again; of what several tensor-parallel ranks hold, the first gives it.
    """
    tensors, ranges = {}, {}
    for name, parameter in parameters.items():
        shard = shards.get(name)
        # Without ZeRO replicas hold the same, and the first one, or of experts the first of each part, gives it.
        first = role.place == 0 if shard is None or shard.experts is None else role.writes
        start, fragments = _fragments(optimizer, parameter) if optimizer.zero or first else (0, {})
        if fragments and (role.leads if shard is None else shard.copy == 0):
            ranges[name] = Fragment.of(start, start + fragments[_MOMENTS[0]].numel(), shard).to_list()
            tensors.update({f"{kind}/{name}": tensor for kind, tensor in fragments.items()})
    tensors[_RANDOM] = torch.get_rng_state()
    if optimizer.device.type != "cpu":
        tensors[_DEVICE_RANDOM] = torch.get_device_module(optimizer.device).get_rng_state().cpu()
    return tensors, {FRAGMENTS: json.dumps(ranges)}


@torch.no_grad()
def restore(
    optimizer: StageOptimizer,
    parameters: Mapping[str, nn.Parameter],
    shards: Mapping[str, Shard],
    training: Path,
    step: int,
) -> None:
    """Put a new optimizer and its schedule where they stood after they had done ``step`` steps.

    ``training`` is the folder that :func:`gather`'s tensors were written to, by any number of ranks.
    """
    adamw, schedule = optimizer.adamw, optimizer.schedule
    for group in adamw.param_groups:
        for held in group["params"]:
            done = torch.tensor(float(step), device=held.device if group["fused"] else "cpu")
            adamw.state[held] = {**_no_moments(held), "step": done}
    saved = SavedFragments(training)
    for name, parameter in parameters.items():
        start, fragments = _fragments(optimizer, parameter)
        for kind, tensor in fragments.items():
            saved.fill(tensor, name, kind, start, shards.get(name))
    schedule.last_epoch = step
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [base * multiplier(step) for base, multiplier in rates]
    for group, rate in zip(adamw.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def restore_random(training: Path, rank: int, device: torch.device) -> None:
    """Take up the random states that ``rank`` had."""
    with opened(training / rank_file(rank)) as tensors:
        torch.set_rng_state(tensors.get_tensor(_RANDOM))
        if device.type != "cpu" and _DEVICE_RANDOM in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            torch.get_device_module(device).set_rng_state(tensors.get_tensor(_DEVICE_RANDOM))


def _no_moments(held: Tensor) -> dict[str, Tensor]:
    """As before the first step."""
    return {kind: torch.zeros_like(held) for kind in _MOMENTS}


def _fragments(optimizer: StageOptimizer, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
    """What this rank's optimizer holds of a parameter, flat, by kind, and where in the parameter that begins.

    Empty where it holds nothing.
    """
    adamw = optimizer.adamw
    if not optimizer.zero:
        if not parameter.requires_grad:
            return 0, {}
        moments = adamw.state.get(parameter) or _no_moments(parameter)
        return 0, {kind: moments[kind].view(-1) for kind in _MOMENTS}
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return 0, {}
    # The mapping's own view of the moments lacks those of the second group: DeepSpeed makes it after the first's step.
    address = mapping.hp_fragment_address
    (flat,) = adamw.param_groups[mapping.param_group_index]["params"]
    moments = adamw.state.get(flat) or _no_moments(flat)
    held = {kind: moments[kind].narrow(0, address.start, address.numel) for kind in _MOMENTS}
    if parameter.dtype != torch.float32:
        held[MASTER] = mapping.hp_fragment
    return mapping.lp_fragment_address.start, held
