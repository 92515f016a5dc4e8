"""What the device is and what it reaches: the yardsticks of all other figures."""

import functools

import torch

from benchmarks.device.frame import Cases, Row, Setting, milliseconds
from fft.training.work import datasheet_rate, device_name


def cases(setting: Setting) -> Cases:
    """One case, one row."""
    yield "rates", lambda: [hardware(setting)]


@functools.cache
def hardware(setting: Setting) -> Row:
    """Name, datasheet and measured rates of the device: measured once in a process."""
    known = datasheet_rate(setting.device)
    return {
        "device": device_name(setting.device),
        "datasheet TFLOP/s": "unknown" if known is None else known / 1e12,
        "matrix TFLOP/s": matrix_rate(setting) / 1e12,
        "copy GB/s": copy_rate(setting) / 1e9,
        "memory GB": device_memory(setting.device) / 1e9,
    }


def device_memory(device: torch.device) -> int:
    """Bytes that are free on it, with what this process's allocator keeps for later (of a CPU's, 1 GB)."""
    if device.type == "cpu":
        return 10**9
    module = torch.get_device_module(device)
    return module.mem_get_info()[0] + module.memory_reserved() - module.memory_allocated()


@functools.cache
def matrix_rate(setting: Setting) -> float:
    """FLOPs a second of a large square product in bf16, the median: of random numbers, as zeros draw less power."""
    rows = 256 if setting.smallest else 8192
    return 2 * rows**3 / product_milliseconds(setting, rows, rows, rows) * 1e3


def product_milliseconds(setting: Setting, rows: int, inner: int, columns: int) -> float:
    """Of a product [rows, inner] x [inner, columns] in bf16, the second laid out as a linear layer's weight is."""
    generator = torch.Generator(setting.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=setting.device).bfloat16()

    a, weight = random(rows, inner), random(columns, inner)
    out = a.new_empty(rows, columns)
    return milliseconds(lambda: torch.mm(a, weight.t(), out=out), setting.device, 3 if setting.smallest else 20)


@functools.cache
def copy_rate(setting: Setting) -> float:
    """Bytes a second, read and written, of a copy within the device that no cache holds."""
    source = torch.empty(1 << (24 if setting.smallest else 31), dtype=torch.uint8, device=setting.device)
    source.random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), setting.device) * 1e3
