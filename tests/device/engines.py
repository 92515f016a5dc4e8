"""What steps of the trainer's engine gave, in this process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.engines import Workload, with_engine
from fft.checkpoint import optimizer_state
from fft.training.engine import StageEngine


@dataclass(frozen=True)
class Taken:
    """Losses and gradient norms of some steps, the gradients of the first, what followed, and the most memory held.

    ``gradients`` are AdamW's first moments after one step, ``state`` weights, masters and moments after all. Bytes of
    the device are ``held`` after the last step, and more than before the first at the ``peak`` of all; 0 on a CPU.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    held: int
    peak: int


def take_steps(workload: Workload, steps: int) -> Taken:
    """Take so many steps on a workload, whose engine is gone afterwards."""

    def take(step: Callable[[], float], engine: StageEngine) -> Taken:
        memory = None if engine.device.type == "cpu" else torch.get_device_module(engine.device)
        before = 0
        if memory is not None:
            memory.reset_peak_memory_stats()
            before = memory.memory_allocated()
        losses, norms, gradients, held, peak = [], [], {}, 0, before
        for _ in range(steps):
            losses.append(step())
            norms.append(engine.grad_norm)
            if memory is not None:
                held, peak = memory.memory_allocated(), max(peak, memory.max_memory_allocated())
            gradients = gradients or _state(engine, "exp_avg/")
            if memory is not None:
                memory.reset_peak_memory_stats()  # what was gathered was not the step's
        return Taken(losses, norms, gradients, _state(engine), held, peak - before)

    return with_engine(workload, take)


def _state(engine: StageEngine, kind: str = "") -> dict[str, torch.Tensor]:
    """Copies in host memory, of one kind or of all."""
    held, _ = optimizer_state.gather(engine.optimizer, engine.parameters, {}, engine.role)
    held |= {f"weight/{name}": parameter for name, parameter in engine.parameters.items()}
    chosen = {name: x for name, x in held.items() if name.startswith(kind) and not name.startswith("random/")}
    return {name: x.detach().cpu().clone() for name, x in chosen.items()}
