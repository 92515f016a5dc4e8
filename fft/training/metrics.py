"""What a run tells of its steps, and the yardstick of its speed: what the devices' matrix products really do.

Model FLOPs utilisation is the FLOPs that the model's mathematics needs (a multiply-add is two; backward is twice the
forward, but for weights that are frozen; attention is that of the documents as they are, causal; activations that are
computed again count once) over those that all devices could have done, by their datasheet, and at the matrix rate that
they were measured to reach. A token of a run with images has besides its decoder's FLOPs those of a
tower for as many patches as its tables' tokens have in the mean (:mod:`fft.planning.image_load`).
"""

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fft.arguments import TrainArguments
from fft.checkpoint.stored_run import run_at
from fft.console import duration
from fft.models.experts import LoadBalance
from fft.planning.layout import Layout, bubble_of
from fft.planning.preflight import Plan
from fft.training.metric_sinks import Sinks, by_dataset_in, loss_name, named_in, open_sinks
from fft.training.pace import Pace
from fft.training.run_facts import run_facts
from fft.training.run_folder import Start
from fft.training.work import Work, datasheet_rate, device_name

Log = Callable[[str], None]

#: A product that takes this many seconds is timed well enough, and one of this many rows is as large as any.
_LONG_ENOUGH, _LARGEST = 0.01, 8192


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of this device in square products of ``dtype``: the best of growing sizes, in a fraction of 1 s.

    Every rank measures at once: ranks on the cores of one machine have only their share of them.
    """
    synchronize = torch.get_device_module(device).synchronize
    generator = torch.Generator(device).manual_seed(0)
    best, rows = 0.0, 256
    while True:
        # Not zeros: a device that draws less power would clock higher than it does in training.
        a = torch.randn(rows, rows, generator=generator, device=device).to(dtype)
        fastest = float("inf")
        for _ in range(4):  # the first warms up
            synchronize()
            begun = time.perf_counter()
            a @ a
            synchronize()
            fastest = min(fastest, time.perf_counter() - begun)
        best = max(best, 2.0 * rows**3 / fastest)
        if fastest > _LONG_ENOUGH or rows >= _LARGEST:
            return best
        rows *= 2


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has had: of its accelerator's memory, or, on CPU, of the machine's."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated()


def over_ranks(value: float, operation: dist.ReduceOp, device: torch.device) -> float:
    """Sum or maximum of a number over all ranks."""
    number = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(number, operation)
    return float(number)


def mean_balance(balance: LoadBalance | None, device: torch.device) -> dict[str, float]:
    """The experts' balance loss of the step, the mean over layers and micro-batches, where there are experts."""
    if balance is None:
        return {}
    sums = torch.tensor([float(balance.total), float(balance.count)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    # A row's ranks have shares of its losses, which add up.
    shares = dist.get_world_size(balance.sequence) if balance.sequence is not None else 1
    return {"aux_loss": float(sums[0] / sums[1]) * shares}


def told_pairs(values: Mapping[str, float]) -> str:
    """What a line says of preferences; nothing in a run on tokens."""
    if "rewards/margins" not in values:
        return ""
    margin, right = (values[f"rewards/{name}"] for name in ("margins", "accuracies"))
    return f"accuracy {right:.1%}  margin {margin:.4f}"


class Stopwatch:
    """Times the steps from one line to the next; what is done while :meth:`paused` is no training."""

    def __init__(self, step: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._first = clock, step
        self._started = self._lap = clock()
        self._waited, self._tokens, self._flops = 0.0, 0, 0.0

    def computed(self, tokens: int, flops: float = 0.0) -> None:
        """Note what a step computed."""
        self._tokens += tokens
        self._flops += flops

    def waited(self, seconds: float) -> None:
        """Note time that a step had to wait for its data."""
        self._waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a block out."""
        begun = self._clock()
        yield
        self._lap += self._clock() - begun

    def lap(self, step: int, total: int) -> "Lap":
        """What was done since the last lap, ``step`` being the one just done of ``total``."""
        now = self._clock()
        seconds, elapsed = now - self._lap, now - self._started
        left = elapsed / (step - self._first) * (total - step)
        lap = Lap(self._tokens / seconds, self._flops / seconds, self._waited / seconds, elapsed, left, seconds)
        self._lap, self._waited, self._tokens, self._flops = now, 0.0, 0, 0.0
        return lap


@dataclass(frozen=True)
class Lap:
    """Tokens and FLOPs a second, the share of the time that waited for data, seconds since the start, seconds to go,
    and seconds of its steps.
    """

    rate: float
    flops: float
    data_wait: float
    elapsed: float
    left: float
    seconds: float = 0.0


@dataclass
class Progress:
    """How far a run is: its last step and loss, the lowest and the last of its evaluations with their steps, tokens of
    all ranks and seconds of the steps that were told, and the last losses of named evaluations and of datasets.
    """

    step: int = 0
    loss: float | None = None
    best: tuple[int, float] | None = None
    last: tuple[int, float] | None = None
    tokens: float = 0.0
    seconds: float = 0.0
    named: dict[str, float] = field(default_factory=dict)
    by_dataset: dict[str, float] = field(default_factory=dict)

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""
        self.step, self.loss = step, values.get("loss", self.loss)
        self.named |= {name: values[loss_name(name)] for name in named_in(values)}
        numbers = (number for own in by_dataset_in(values).values() for number in own.values())
        self.by_dataset |= {number: values[number] for number in numbers}
        if (loss := values.get("eval_loss")) is not None:
            self.last = step, loss
            self.best = self.last if self.best is None or loss < self.best[1] else self.best


@dataclass(frozen=True)
class Metrics:
    """Numbers of a run on their way to its sinks and, every so often, to the console.

    ``work`` is what tokens ask of devices; all together reach ``peak`` FLOPs a second in matrix products, by their
    datasheet ``promised``, where that is known.
    """

    sinks: Sinks
    log: Log
    total: int
    work: Work
    peak: float
    promised: float | None
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    #: That of the ranks, where there are several.
    pace: Pace | None = None

    def record(self, step: int, **values: float) -> None:
        """Hand numbers of a step to the sinks."""
        self._record(step, values, {})

    def _record(self, step: int, values: Mapping[str, float], by_rank: Mapping[str, list[float]]) -> None:
        if self.pace is not None:
            self.pace.stepped()
        self.progress.see(step, values)
        self.sinks.write(step, values, by_rank)

    def begin(self, step: int) -> None:
        """Steps begin after ``step``."""
        if self.pace is not None:
            self.pace.begin(step)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """What is done in this block is no step's."""
        return self.pace.paused() if self.pace is not None else contextlib.nullcontext()

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of them."""
        return {"progress": dataclasses.asdict(self.progress)} | self.sinks.state()

    def show(self, step: int, values: dict[str, float], lap: Lap) -> None:
        """Record a step with the speed of those since it was last called, and print a line.

        All ranks call it, each with the tokens of ``lap`` that it alone counts.
        """
        pace, by_rank, behind = {}, {}, ""
        if self.pace is not None:
            pace, by_rank, behind = self.pace.lap(step, lap.data_wait * lap.seconds)
        memory = over_ranks(peak_memory(self.device), dist.ReduceOp.MAX, self.device)
        rate = over_ranks(lap.rate, dist.ReduceOp.SUM, self.device)
        flops = over_ranks(lap.flops, dist.ReduceOp.SUM, self.device)
        self.progress.tokens += rate * lap.seconds
        self.progress.seconds += lap.seconds
        used = {"mfu": flops / self.peak} | ({"mfu_datasheet": flops / self.promised} if self.promised else {})
        told = f"{used['mfu']:.1%}" + (f", of the datasheet {used['mfu_datasheet']:.1%}" if self.promised else "")
        scaled = f"{pairs}  " if (pairs := told_pairs(values)) else ""
        scaled += f"scale {values['loss_scale']:.0f}  " if "loss_scale" in values else ""
        scaled += f"{values['skipped_steps']} skipped  " if values["skipped_steps"] else ""
        speed = {"tokens_per_second": rate, "tokens_per_second_per_device": rate / dist.get_world_size()}
        told_of = {"data_wait": lap.data_wait, "memory": memory, "seconds": lap.elapsed}
        self._record(step, values | speed | used | told_of | pace, by_rank)
        self.log(
            f"step {step}/{self.total}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad norm {values['grad_norm']:.3f}  {scaled}{rate:,.0f} tokens/s  MFU {told}  "
            f"data wait {lap.data_wait:.1%}  {memory / 2**30:.2f} GiB  {duration(lap.elapsed)} < {duration(lap.left)}"
        )
        if behind:
            self.log(f"warning: {behind}")


def open_metrics(
    args: TrainArguments,
    plan: Plan,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    start: Start,
    held: ExitStack,
    log: Log,
) -> Metrics:
    """Where a run's numbers go from its ``start`` on, until ``held`` ends, and what its speed is measured against.

    The latter is told at once. Collective: all devices measure themselves together.
    """
    sinks = Sinks(log)
    if dist.get_rank() == 0:
        run = run_at(args.checkpoint) if args.checkpoint else None
        facts = run_facts(args, plan, layout, run, start.state)
        sinks = held.enter_context(open_sinks(run.notes if run is not None else None, start.step, facts, log))
    work, world = Work.of(layout.every, args.seq_len), plan.mesh.world
    rate = matrix_rate(dtype, device) if plan.total_steps else float("nan")
    peak, sheet = over_ranks(rate, dist.ReduceOp.SUM, device), datasheet_rate(device, dtype)
    progress = Progress(**{"step": start.step} | start.state.get("progress", {}))
    metrics = Metrics(sinks, log, plan.total_steps, work, peak, sheet and sheet * world, device, progress)
    if plan.total_steps:
        bubble = bubble_of(args, layout)
        known = {} if sheet is None else {"datasheet_flops_per_second": sheet * world}
        metrics.record(start.step, matrix_flops_per_second=peak, pipeline_bubble=bubble, **known)
        whole = work.flops(args.seq_len, (0, args.seq_len)) / args.seq_len
        of = "" if sheet is None else f", of {sheet / 1e12:.3g} by the datasheet of {device_name(device)}"
        log(
            f"{whole:.3g} FLOPs a token of a document of {args.seq_len} ({work.token:.3g} without attention); matrix "
            f"products of {args.dtype} reach {peak / world / 1e12:.3g} TFLOP/s a device{of}; "
            f"pipeline bubble {bubble:.1%}"
        )
    return metrics
