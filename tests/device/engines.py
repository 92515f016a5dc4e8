"""Engines of the trainer in this process, and what their steps gave."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from fft.arguments import parse_arguments
from fft.data.batches import MicroBatch
from fft.data.table import IGNORE


@dataclass(frozen=True)
class Taken:
    """Losses and gradient norms of some steps, the gradients of the first, what followed, and the most memory held.

    ``gradients`` are AdamW's first moments after one step, ``state`` weights, masters and moments after all. ``peak``
    is in bytes, of what came to be while steps were taken; nothing on a CPU.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    peak: int


def micro_batch(lengths: list[int], vocabulary: int, seed: int) -> MicroBatch:
    """Documents of random tokens, one after another."""
    ends, tokens = np.cumsum(lengths), sum(lengths)
    ids = np.random.default_rng(seed).integers(0, vocabulary, tokens)
    labels = np.roll(ids, -1).astype(np.int64)
    labels[ends - 1] = IGNORE
    bounds = np.full(tokens + 1, tokens, dtype=np.int32)
    bounds[: len(lengths) + 1] = [0, *ends]
    return MicroBatch(ids[None].astype(np.int32), labels, bounds, int((labels != IGNORE).sum()))


def join(device: torch.device) -> None:
    """Make this process a world of its own, once, on a type of device; before anything asks DeepSpeed for its own."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from fft.training.engine import init_distributed

    if not torch.distributed.is_initialized():
        init_distributed()


def take_steps(config: PretrainedConfig, steps: list[list[MicroBatch]], *flags: str) -> Taken:
    """Train a model of ``config`` with seeded weights, as ``flags`` say, in the process that :func:`join` prepared."""
    from fft.checkpoint import optimizer_state
    from fft.models.causal_lm import StageBuilder
    from fft.parallel.mesh import mesh_sizes
    from fft.planning.layout import plan_layout
    from fft.training.engine import build_engine, model_spec, on_host

    fixed = ["--model=.", "--num_train_epochs=0", "--output_dir=unwritten", "--learning_rate=1e-3", "--seed=3"]
    sizes = [f"--seq_len={len(steps[0][0].labels)}", f"--gradient_accumulation_steps={len(steps[0])}"]
    args = parse_arguments([*fixed, *sizes, *flags])
    spec, mesh = model_spec(args, config), mesh_sizes(1, 1, 1, 1)
    builder = StageBuilder(spec)
    engine = build_engine(args, builder, mesh, plan_layout(args, spec, mesh, on_host()).bounds, len(steps))

    def state() -> dict[str, torch.Tensor]:
        held, _ = optimizer_state.gather(engine.optimizer, engine.parameters, builder.shards, engine.role)
        held |= {f"weight/{name}": parameter for name, parameter in engine.parameters.items()}
        return {name: x.detach().cpu().clone() for name, x in held.items() if not name.startswith("random/")}

    memory = None if on_host() else torch.get_device_module(engine.device)
    if memory is not None:
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
    losses, norms, gradients = [], [], {}
    for batches in steps:
        losses.append(engine.step(batches))
        norms.append(engine.grad_norm)
        gradients = gradients or {name: x for name, x in state().items() if name.startswith("exp_avg/")}
    peak = memory.max_memory_allocated() - before if memory is not None else 0
    return Taken(losses, norms, gradients, state(), peak)
