"""What arithmetic training on tokens is, and what a device's datasheet says that it can do."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fft.planning.costs import LayerCost, multiply_adds, pairs

#: Dense bf16 TFLOP/s by what a device's name contains; the first that fits counts. NVIDIA's datasheets of the A100,
#: H100, H200, HGX B200 and GB200, most of which print twice as much, with sparsity; Huawei's of the Atlas 800T A2: 2.5
#: PFLOPS of eight.
DATASHEET = {
    "A100": 312.0,
    "A800": 312.0,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "H200": 989.4,
    "H20": 148.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "910B3": 313.0,
}


def device_name(device: torch.device) -> str:
    """As its driver has it."""
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def datasheet_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOPs a second by the device's datasheet; None where we have none, and for types of more than 16 bits."""
    if dtype.itemsize > 2:
        return None
    name = device_name(device)
    return next((1e12 * rate for part, rate in DATASHEET.items() if part in name), None)


def flops_per_token(forward: Sequence[float], backward: Sequence[float] | None = None) -> float:
    """FLOPs of forward and backward for one token, from the multiply-adds of every layer.

    Without ``backward`` it is twice the ``forward``, as where every parameter is trained.
    """
    return 2.0 * sum(forward) + (4.0 * sum(forward) if backward is None else 2.0 * sum(backward))


@dataclass(frozen=True)
class Work:
    """FLOPs of forward and backward: of a ``token``, but for its attention, and for each of the ``pairs`` of a query
    and a key that layers with a window compute, by its tokens (None: without one).
    """

    token: float
    pairs: Mapping[int | None, float]

    @classmethod
    def of(cls, costs: Sequence[LayerCost], seq_len: int) -> "Work":
        """Of layers whose costs were counted for documents of ``seq_len`` tokens."""
        whole, each = flops_per_token(*multiply_adds(costs)), defaultdict[int | None, float](float)
        for cost, back in zip(costs, multiply_adds(costs)[1], strict=True):
            if cost.pair:
                each[cost.window] += cost.pair * (6.0 if back else 2.0)
        return cls(whole - sum(flops * float(pairs(seq_len, w)) / seq_len for w, flops in each.items()), dict(each))

    def flops(self, tokens: int, bounds: Sequence[int] | np.ndarray) -> float:
        """Of so many tokens with documents between ``bounds``, the last of which may be repeated."""
        lengths = np.diff(np.asarray(bounds, np.float64))
        lengths = lengths[lengths > 0]
        seen = (pairs(lengths, window).sum() * flops for window, flops in self.pairs.items())
        return self.token * tokens + float(sum(seen))
