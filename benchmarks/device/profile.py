"""Where the time of a step goes: what the device ran, by kind, and how long it waited for its host.

A kernel's kind is told by the range that launched it (the loss, the optimizer, a gradient's sum, attention), else by
the operator or by its own name. Shares add up to the step's time by the clock, of which host gaps are what is left.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.device.frame import Row, Setting, milliseconds
from benchmarks.device.shapes import Case, fitted, operators, with_layers
from benchmarks.engines import with_engine
from fft.training.engine import StageEngine

LOSS, OPTIMIZER, SUMS, ATTENTION = "loss", "optimizer", "gradient sums", "attention"
PRODUCTS, COPIES, ELEMENTWISE, GAPS = "matrix products", "copies, communication", "norms, elementwise", "host gaps"
KINDS = (ATTENTION, PRODUCTS, ELEMENTWISE, LOSS, SUMS, OPTIMIZER, COPIES)
#: By what a range that launches begins with: our own ranges, autograd functions and their nodes.
_RANGES = {
    LOSS: ("loss", "_LinearCrossEntropy"),
    OPTIMIZER: ("optimizer",),
    SUMS: ("torch::autograd::AccumulateGrad",),
    ATTENTION: ("_PackedAttention",),
}
#: Calls of the driver, as events of the host.
_DRIVER = re.compile(r"cuda|cu[A-Z]|hip")
#: Operators that are matrix products, and what is in the names of kernels: cuBLAS's, CUTLASS's, Triton's, CANN's.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")
_NAMES = {
    ATTENTION: ("flash", "fmha", "sdpa", "attention"),
    PRODUCTS: ("gemm", "gemv", "nvjet", "cutlass", "xmma", "matmul", "splitkreduce"),
    COPIES: ("memcpy", "memset", "nccl", "hccl"),
}


@dataclass(frozen=True)
class Work:
    """What a device ran: its name, the ranges and operators that launched it, innermost first, and microseconds."""

    name: str
    within: tuple[str, ...]
    spent: float


def kind_of(name: str, within: Sequence[str]) -> str:
    """The one of :data:`KINDS` that a kernel, or an operator on a CPU, is counted under."""
    for kind, begins in _RANGES.items():
        if any(part.startswith(begins) for part in within):
            return kind
    if name in _PRODUCTS or any(part in _PRODUCTS for part in within[:1]):
        return PRODUCTS
    plain = name.lower()
    return next((kind for kind, parts in _NAMES.items() if any(part in plain for part in parts)), ELEMENTWISE)


def account(work: Iterable[Work], wall: float) -> list[Row]:
    """A row for each kind that took time, with its largest kernel, and one for the rest of ``wall`` microseconds."""
    kinds: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for item in work:
        kinds[kind_of(item.name, item.within)].setdefault(item.name, []).append(item.spent)
    rows, busy = [], 0.0
    for kind, kernels in kinds.items():
        if not kernels:
            continue
        spent = sum(map(sum, kernels.values()))
        largest = max(kernels, key=lambda name: sum(kernels[name]))
        row = told(kind, spent / 1e3, 100 * spent / wall)
        row |= {"launches": str(sum(map(len, kernels.values()))), "largest": largest[:60]}
        rows.append(row | {"largest ms": sum(kernels[largest]) / 1e3})
        busy += spent
    return [*rows, told(GAPS, (wall - busy) / 1e3, 100 * (wall - busy) / wall)]


def told(where: str, spent: float, share: float | str) -> Row:
    """A row that no kernel is named in."""
    return {"where": where, "ms": spent, "share %": share, "launches": "", "largest": "", "largest ms": ""}


def alone(spans: Iterable[tuple[float, float]]) -> Iterator[float]:
    """Of spans in the order of their begin, the time of each that none before it covers: streams may overlap."""
    covered = float("-inf")
    for begin, end in spans:
        yield max(0.0, end - max(begin, covered))
        covered = max(covered, end)


def work_of(profiled: profile) -> list[Work]:
    """What a profile saw the device do; where none but the CPU was watched, its operators without those they call."""
    events = profiled.events()
    # Calls of the driver have numbers of their own, which may be those of operators.
    hosts = {e.id: e for e in events if e.device_type == DeviceType.CPU and not _DRIVER.match(e.name)}
    # Ranges of the host that the profiler draws on the device's line, too, are no work.
    kernels = [
        event
        for event in profiled.profiler.kineto_results.events()
        if event.device_type() != DeviceType.CPU and not event.is_user_annotation()
    ]
    if not kernels:
        operations = [event for event in hosts.values() if event.name.startswith(("aten::", "c10d::"))]
        return [Work(event.name, ranges(event.cpu_parent), event.self_cpu_time_total) for event in operations]
    kernels.sort(key=lambda event: event.start_ns())
    spans = [(event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3) for event in kernels]
    launched = [hosts.get(event.linked_correlation_id()) for event in kernels]
    return [
        Work(event.name(), ranges(host), spent)
        for event, host, spent in zip(kernels, launched, alone(spans), strict=True)
    ]


def ranges(event: "torch.autograd.profiler_util.FunctionEvent | None") -> tuple[str, ...]:
    """Names of an event and of all that it ran within."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(names)


def measure(setting: Setting, case: Case) -> list[Row]:
    """The table of a step with as many layers as fit."""
    if setting.device.type not in ("cpu", "cuda"):
        return [{"step": case.name, "where": f"torch's own profiler does not see {setting.device.type}"}]
    whole, layers = fitted(setting, case)
    if not layers:
        return [{"step": case.name, "where": "not even one layer fits"}]
    ran = with_layers(whole, layers)
    about: Row = {"step": case.name, "operators": operators(setting, case.fused), "layers": str(layers)}

    def watch(step: Callable[[], float], engine: StageEngine) -> list[Row]:
        plain = milliseconds(step, setting.device, 2)
        mark(engine)
        with profile(activities=activities(setting.device)) as profiled:
            begun = time.perf_counter()
            step()
            wall = 1e6 * (time.perf_counter() - begun)
        rows = account(work_of(profiled), wall)
        return [*rows, told("the step", wall / 1e3, 100.0), told("the same, unwatched", plain, "")]

    return [about | row for row in with_engine(ran, watch)]


def mark(engine: StageEngine) -> None:
    """Name the ranges of the loss and of the optimizer's step, for the profiler."""
    inner = engine.deepspeed
    inner.module.loss_fn = _named("loss", inner.module.loss_fn)
    inner._take_model_step = _named("optimizer", inner._take_model_step)


def _named(name: str, function: Callable[..., object]) -> Callable[..., object]:
    def call(*args: object, **options: object) -> object:
        with record_function(name):
            return function(*args, **options)

    return call


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What is watched: the host, and the device where torch's own profiler knows it."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
