"""How long kernels take: rooflines without a corner, whose efficiency falls with the size of what is computed."""

from itertools import pairwise
from math import hypot, log

from fft.plan.constants import Constants
from fft.plan.hardware import Device


def product_time(device: Device, rows: float, columns: float, inner: float, at: Constants, wide: bool = False) -> float:
    """Seconds of a matrix product [rows, inner] x [inner, columns] of 16 bits, or of 32 if it is ``wide``.

    Its arithmetic at the rate that its size reaches, beside the bytes of its operands: of both the longer, and more of
    the shorter the closer they are.
    """
    if not rows or not columns or not inner:
        return 0.0
    reached = (device.wide if wide else device.peak) * device.reached
    fill = (1 + at.tile / rows) * (1 + at.tile / columns) * (1 + at.tile / 4 / inner)
    moved = (4 if wide else 2) * (rows * inner + inner * columns + rows * columns)
    return hypot(2 * rows * columns * inner * fill / reached, moved / (device.bandwidth * at.stream)) + at.launch


def moving_time(device: Device, moved: float, launches: float, at: Constants) -> float:
    """Seconds of kernels that move so many bytes of the device's memory, and compute next to nothing."""
    return moved / (device.bandwidth * at.stream) + launches * at.launch


def chain_time(device: Device, moved: float, launches: float, at: Constants) -> float:
    """The same of operators on activations, one after the other, of which each reads what the last has written."""
    return moving_time(device, moved / at.chain, launches, at)


def flash_time(
    device: Device, flops: float, row: float, passes: tuple[float, float], at: Constants
) -> tuple[float, float]:
    """Seconds of forward and backward of a fused attention kernel, whose forward computes ``flops`` that count.

    ``row`` are the tokens of a document; ``passes`` the shares of the peak that it reaches on long ones. Where the
    device's file has rates by length, those of the nearest lengths count, and ``passes`` beside the device's own.
    """
    if device.attention:
        rates = [_between([(one[0], one[which]) for one in device.attention], row) for which in (1, 2)]
        reached = [rate * share / own for rate, share, own in zip(rates, passes, device.flash, strict=True)]
        return flops / reached[0] + at.launch, 2.5 * flops / reached[1] + at.launch
    fill = 1 + at.row / row
    forward = flops * fill / (device.peak * passes[0]) + at.launch
    return forward, 2.5 * flops * fill / (device.peak * passes[1]) + at.launch


def _between(points: list[tuple[float, float]], at: float) -> float:
    """What lies between neighbouring points on a line, by the logarithm; at the ends what they have."""
    for (a, x), (b, y) in pairwise(points):
        if at <= b:
            return x + (y - x) * max(0.0, log(at / a) / log(b / a))
    return points[-1][1]
