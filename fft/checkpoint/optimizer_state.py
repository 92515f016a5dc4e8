"""The optimizer's state by canonical parameter names, so that a checkpoint of any layout resumes at any other.

DeepSpeed's ZeRO optimizers keep masters and moments as slices of flat buffers, cut without regard to parameters;
without ZeRO a rank has those of its parameters whole. Each rank names the part of every parameter that it holds, as a
range of the flattened parameter, and writes those parts as safetensors; a rank that resumes reads the ranges that it
holds now, whoever wrote them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fft.checkpoint.fragments import FRAGMENTS, MASTER, Fragment, SavedFragments, rank_file
from fft.parallel.tensor_plan import Shard

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_RANDOM = "random/cpu"
_DEVICE_RANDOM = "random/device"


def gather(
    engine: deepspeed.PipelineEngine, parameters: Mapping[str, nn.Parameter], shards: Mapping[str, Shard]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This rank's share of the optimizer state and its random states, and what tells where the share belongs.

    ``shards`` has the parameters of which this rank holds a part. Tensors alias the optimizer's own. Parameters in fp32
    are their own masters, which are not given again; of what several tensor-parallel ranks hold, the first gives it.
    """
    tensors, ranges = {}, {}
    first = engine.grid.get_slice_parallel_rank() == 0
    # Without ZeRO replicas hold the same, and the first one gives it.
    gives = engine.zero_optimization_stage() or engine.grid.get_data_parallel_id() == 0
    for name, parameter in parameters.items() if gives else ():
        (start, fragments), shard = _fragments(engine, parameter), shards.get(name)
        if fragments and (first if shard is None else shard.copy == 0):
            ranges[name] = Fragment.of(start, start + fragments[_MOMENTS[0]].numel(), shard).to_list()
            tensors.update({f"{kind}/{name}": tensor for kind, tensor in fragments.items()})
    tensors[_RANDOM] = torch.get_rng_state()
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != "cpu":
        tensors[_DEVICE_RANDOM] = accelerator.get_rng_state().cpu()
    return tensors, {FRAGMENTS: json.dumps(ranges)}


@torch.no_grad()
def restore(
    engine: deepspeed.PipelineEngine,
    parameters: Mapping[str, nn.Parameter],
    shards: Mapping[str, Shard],
    training: Path,
    step: int,
) -> None:
    """Put the optimizer and the schedule of a new engine where they stood after ``step`` steps.

    ``training`` is the folder that :func:`gather`'s tensors were written to, by any number of ranks.
    """
    optimizer = _adamw(engine)
    for group in optimizer.param_groups:
        for held in group["params"]:
            optimizer.state[held] = _no_moments(held)
    saved = SavedFragments(training)
    for name, parameter in parameters.items():
        start, fragments = _fragments(engine, parameter)
        for kind, tensor in fragments.items():
            saved.fill(tensor, name, kind, start, shards.get(name))
    _set_step(engine, step)
    engine.global_steps = step


def _set_step(engine: deepspeed.PipelineEngine, step: int) -> None:
    """Let schedule and optimizer have done ``step`` steps."""
    optimizer, scheduler = _adamw(engine), engine.lr_scheduler
    for group in optimizer.param_groups:
        for held in group["params"]:
            device = held.device if group["fused"] else "cpu"
            optimizer.state[held]["step"] = torch.tensor(float(step), device=device)
    scheduler.last_epoch = step
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * multiplier(step) for base, multiplier in rates]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def loss_scaler(engine: deepspeed.PipelineEngine) -> dict | None:
    """Where the dynamic loss scale of fp16 stands, and how many steps it has cost; None in other types."""
    if not engine.fp16_enabled():
        return None
    scaler = engine.optimizer.loss_scaler
    return {"skipped": engine.skipped_steps} | {name: getattr(scaler, name) for name in _SCALER}


def restore_loss_scaler(engine: deepspeed.PipelineEngine, saved: dict | None) -> None:
    """Put the loss scale back, after :func:`restore`: steps that were skipped moved neither schedule nor optimizer."""
    if saved is None:
        return
    for name in _SCALER:
        setattr(engine.optimizer.loss_scaler, name, saved[name])
    engine.skipped_steps = saved["skipped"]
    _set_step(engine, engine.global_steps - engine.skipped_steps)


def restore_random(training: Path, rank: int) -> None:
    """Take up the random states that ``rank`` had."""
    with safe_open(training / rank_file(rank), framework="pt") as tensors:
        torch.set_rng_state(tensors.get_tensor(_RANDOM))
        if _DEVICE_RANDOM in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            deepspeed.get_accelerator().set_rng_state(tensors.get_tensor(_DEVICE_RANDOM))


def _adamw(engine: deepspeed.PipelineEngine) -> torch.optim.AdamW:
    """The optimizer itself, which ZeRO wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _no_moments(held: Tensor) -> dict[str, Tensor]:
    """As before the first step."""
    return {kind: torch.zeros_like(held) for kind in _MOMENTS}


def _fragments(engine: deepspeed.PipelineEngine, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
    """What this rank's optimizer holds of a parameter, flat, by kind, and where in the parameter that begins.

    Empty where it holds nothing.
    """
    optimizer = _adamw(engine)
    if not engine.zero_optimization_stage():
        if not parameter.requires_grad:
            return 0, {}
        moments = optimizer.state.get(parameter) or _no_moments(parameter)
        return 0, {kind: moments[kind].view(-1) for kind in _MOMENTS}
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return 0, {}
    # The mapping's own view of the moments lacks those of the second group: DeepSpeed makes it after the first's step.
    address = mapping.hp_fragment_address
    (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
    moments = optimizer.state.get(flat) or _no_moments(flat)
    held = {kind: moments[kind].narrow(0, address.start, address.numel) for kind in _MOMENTS}
    if parameter.dtype != torch.float32:
        held[MASTER] = mapping.hp_fragment
    return mapping.lp_fragment_address.start, held
