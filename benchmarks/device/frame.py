"""What every part of the device's benchmarks uses: the setting, rows of figures, and how time is taken."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

#: A column's name, with its unit, to a figure or a word.
Row = dict[str, float | str]
#: Of each case its name, which no other has, and what measures it.
Cases = Iterator[tuple[str, Callable[[], list[Row]]]]


@dataclass(frozen=True)
class Setting:
    """What is measured; ``smallest`` runs every line in the least time, for a rehearsal on a CPU."""

    device: torch.device
    smallest: bool


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time of some runs after two to warm up, by the device's own events (the CPU: by the clock)."""
    for _ in range(2):
        work()
    synchronize(device)
    if device.type == "cpu":
        return statistics.median(_clocked(work) for _ in range(repeats))
    module = torch.get_device_module(device)
    marks = [(module.Event(enable_timing=True), module.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def _clocked(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def release(device: torch.device) -> None:
    """Give back to the device what nobody refers to any more."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def free(device: torch.device) -> None:
    """:func:`release`, and count the memory's maximum from now on."""
    release(device)
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on the device since :func:`free`; 0 on a CPU, where nobody counts it."""
    return 0 if device.type == "cpu" else torch.get_device_module(device).max_memory_allocated()
