"""The optimizer's state by canonical parameter names, so that a checkpoint of any layout resumes at any other.

DeepSpeed's ZeRO optimizers keep masters and moments as slices of flat buffers, cut without regard to parameters. Each
rank names the part of every parameter that it holds, as a range of the flattened parameter, and writes those parts as
safetensors; a rank that resumes reads the ranges that it holds now, whoever wrote them.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fft.errors import UserError

_MASTER = "master"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_RANDOM = "random/cpu"
_DEVICE_RANDOM = "random/device"
_FRAGMENTS = "fragments"


def rank_file(rank: int) -> str:
    """Name of the file with a rank's share of the training state."""
    return f"rank-{rank:05d}.safetensors"


def gather(
    engine: deepspeed.PipelineEngine, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This rank's share of the optimizer state and its random states, and what tells where the share belongs.

    Tensors alias the optimizer's own. Parameters in fp32 are their own masters, which are not given again.
    """
    tensors, ranges = {}, {}
    for name, parameter in parameters.items():
        fragments = _fragments(engine, parameter)
        if fragments:
            start = parameter._hp_mapping.lp_fragment_address.start
            ranges[name] = [start, start + parameter._hp_mapping.lp_fragment_address.numel]
            tensors.update({f"{kind}/{name}": tensor for kind, tensor in fragments.items()})
    tensors[_RANDOM] = torch.get_rng_state()
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != "cpu":
        tensors[_DEVICE_RANDOM] = accelerator.get_rng_state().cpu()
    return tensors, {_FRAGMENTS: json.dumps(ranges)}


@torch.no_grad()
def restore(
    engine: deepspeed.PipelineEngine, parameters: Mapping[str, nn.Parameter], training: Path, step: int
) -> None:
    """Put the optimizer and the schedule of a new engine where they stood after ``step`` steps.

    ``training`` is the folder that :func:`gather`'s tensors were written to, by any number of ranks.
    """
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for flat in group["params"]:
            moments = {name: torch.zeros_like(flat) for name in _MOMENTS}
            optimizer.state[flat] = {"step": torch.tensor(float(step)), **moments}
    saved = _Saved(training)
    for name, parameter in parameters.items():
        for kind, tensor in _fragments(engine, parameter).items():
            saved.fill(tensor, name, kind, parameter._hp_mapping.lp_fragment_address.start)
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = step
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * multiplier(step) for base, multiplier in rates]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
    engine.global_steps = step


def restore_random(training: Path, rank: int) -> None:
    """Take up the random states that ``rank`` had."""
    with safe_open(training / rank_file(rank), framework="pt") as tensors:
        torch.set_rng_state(tensors.get_tensor(_RANDOM))
        if _DEVICE_RANDOM in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            deepspeed.get_accelerator().set_rng_state(tensors.get_tensor(_DEVICE_RANDOM))


def _fragments(engine: deepspeed.PipelineEngine, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What this rank's optimizer holds of a parameter, flat, by kind; empty where it holds nothing."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return {}
    # The mapping's own view of the moments lacks those of the second group: DeepSpeed makes it after the first's step.
    optimizer, address = engine.optimizer.optimizer, mapping.hp_fragment_address
    (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
    held = {kind: optimizer.state[flat][kind].narrow(0, address.start, address.numel) for kind in _MOMENTS}
    if parameter.dtype != torch.float32:
        held[_MASTER] = mapping.hp_fragment
    return held


class _Saved:
    """Ranges of flattened parameters, each in some rank's file, read slice by slice."""

    def __init__(self, training: Path) -> None:
        self._training = training
        self._pieces: dict[str, list[tuple[int, int, safe_open]]] = defaultdict(list)
        for file in sorted(training.glob("rank-*.safetensors")):
            tensors = safe_open(file, framework="pt")
            for name, (start, stop) in json.loads(tensors.metadata()[_FRAGMENTS]).items():
                self._pieces[name].append((start, stop, tensors))

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
