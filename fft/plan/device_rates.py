"""What a device reaches, measured: products of matrices by their size, attention, memory, operators on activations."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, inf, log
from statistics import fmean, median

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from fft.ops.backends.choice import choose
from fft.ops.documents import Documents, Segments
from fft.plan.constants import FITTED_CONSTANTS, Constants
from fft.plan.hardware import Device
from fft.plan.kernels import product_time

#: Seconds that something is repeated for, and how often that is done.
_LONG, _BLOCKS = 0.06, 3
#: Tokens and widths of the products, tokens of the documents, elements of memory: of a processor, of other devices.
_PRODUCTS = {
    True: ((128, 512), (256, 512), (512, 512), (512, 1376), (1024, 1024), (2048, 1024)),
    False: ((512, 4096), (2048, 1024), (2048, 4096), (4096, 4096), (8192, 4096), (8192, 8192)),
}
_DOCUMENTS = {True: (128, 256, 512, 1024), False: (512, 1024, 4096, 16384)}
_ELEMENTS = {True: 1 << 24, False: 1 << 28}
_ACTIVATIONS = {True: (512, 1024), False: (8192, 4096)}
_HEADS, _KV_HEADS, _HEAD_SIZE = 8, 4, {True: 64, False: 128}


@dataclass(frozen=True)
class Timer:
    """How long something takes a device, while all ranks that ``together`` waits for do the same."""

    device: torch.device
    together: Callable[[], None]

    @property
    def cpu(self) -> bool:
        """Whether the device is a processor."""
        return self.device.type == "cpu"

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if not self.cpu:
            torch.accelerator.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Of ``work``: the median of some blocks of repetitions. Collective."""
        work()
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        count = max(1, min(1000, round(_LONG / max(1e-7, time.perf_counter() - begin))))
        self.together()
        blocks = []
        for _ in range(_BLOCKS):
            begin = time.perf_counter()
            for _ in range(count):
                work()
            self.wait()
            blocks.append((time.perf_counter() - begin) / count)
        return median(blocks)


@dataclass(frozen=True)
class LinearTime:
    """Seconds of a linear layer's forward and backward: ``tokens`` through a square weight of ``width``."""

    tokens: int
    width: int
    seconds: float

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return 6.0 * self.tokens * self.width**2 / self.seconds


def linear_times(timer: Timer, dtype: torch.dtype) -> list[LinearTime]:
    """By size. Collective."""
    found = []
    for tokens, width in _PRODUCTS[timer.cpu]:
        x, grad = (torch.randn(tokens, width, device=timer.device).to(dtype) for _ in range(2))
        weight = torch.randn(width, width, device=timer.device).to(dtype)

        def both(x: Tensor = x, grad: Tensor = grad, weight: Tensor = weight) -> None:
            torch.nn.functional.linear(x, weight)
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

        found.append(LinearTime(tokens, width, timer.seconds(both)))
    return found


def attention_rates(timer: Timer, dtype: torch.dtype) -> tuple[tuple[float, float, float], ...]:
    """FLOP/s of the kernel that the trainer takes here in forward and backward, by the length of a document.

    Of what counts: a query and the keys before it. Collective.
    """
    backend, size, found = choose(timer.device, dtype), _HEAD_SIZE[timer.cpu], []
    for tokens in _DOCUMENTS[timer.cpu]:
        shapes = ((tokens, heads, size) for heads in (_HEADS, _KV_HEADS, _KV_HEADS, _HEADS))
        q, k, v, dout = (torch.randn(shape, device=timer.device).to(dtype) for shape in shapes)
        within = Segments.within(Documents.of((0, tokens), timer.device), size**-0.5)
        out, lse = backend.forward(q, k, v, within)
        forward = timer.seconds(lambda i=(q, k, v, within): backend.forward(*i))
        backward = timer.seconds(lambda i=(dout, q, k, v, out, lse, within): backend.backward(*i))
        flops = 2.0 * tokens**2 * _HEADS * size
        found.append((float(tokens), flops / forward, 2.5 * flops / backward))
    return tuple(found)


def memory_rate(timer: Timer) -> float:
    """Bytes a second that adding up large tensors moves. Collective."""
    total, more = (torch.zeros(_ELEMENTS[timer.cpu], device=timer.device) for _ in range(2))
    return 12.0 * total.numel() / timer.seconds(lambda: total.add_(more))


def chain_rate(timer: Timer, dtype: torch.dtype) -> float:
    """Bytes a second that operators of a layer move, as a norm, a residual and SwiGLU make them. Collective."""
    x, gate = (torch.randn(_ACTIVATIONS[timer.cpu], device=timer.device).to(dtype) for _ in range(2))
    weight, half, wide = torch.ones_like(x[0]), x.element_size(), 4

    def chain() -> Tensor:
        long = x.float()
        scaled = long * torch.rsqrt(long.pow(2).mean(-1, keepdim=True))
        normed = weight * scaled.to(dtype)
        return normed + torch.nn.functional.silu(gate) * x

    # to float, square, mean, scale, back, weight, silu, product, sum: what each reads and writes of an element.
    moved = (half + wide) + 2 * wide + wide + 2 * wide + (wide + half) + 2 * half + 2 * half + 3 * half + 3 * half
    return x.numel() * moved / timer.seconds(chain)


def launch_seconds(timer: Timer) -> float:
    """Of an operator with next to no work, in forward and in backward. Collective."""
    x = torch.ones(16, device=timer.device, requires_grad=True)

    def both() -> None:
        y = x
        for _ in range(25):
            y = y * 1.5
        y.sum().backward()
        x.grad = None

    return timer.seconds(both) / 52


def host_seconds(timer: Timer) -> float:
    """Of a decoder layer's forward that computes next to nothing. Collective.

    A backward launches 1.3 times as much, as where layers are predicted.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(timer.device, torch.bfloat16)
    x = torch.randn(1, 8, 32, device=timer.device).bfloat16().requires_grad_()
    where = LlamaRotaryEmbedding(config).to(timer.device)(x, torch.arange(8, device=timer.device)[None])

    def both() -> None:
        layer(x, position_embeddings=where).sum().backward()

    return timer.seconds(both) / 2.3


def fitted_products(device: Device, times: list[LinearTime], at: Constants) -> tuple[float, float]:
    """The share of the device's peak that large products reach, and the tile: see :class:`Constants`.

    Those by which the predicted times of all sizes differ from the measured ones the least.
    """
    best = inf, 1.0, at.tile
    for tile in (0.0, *(2 * 1.15**step for step in range(45))):
        told = replace(at, tile=tile)
        logs = [log(_linear(replace(device, reached=1.0), one, told) / one.seconds) for one in times]
        reached = exp(fmean(logs))
        # What takes the bytes' time and not the products' does not go with the share: once more around it.
        for _ in range(3):
            off = fmean(log(_linear(replace(device, reached=reached), one, told) / one.seconds) for one in times)
            reached *= exp(off)
        error = sum(log(_linear(replace(device, reached=reached), one, told) / one.seconds) ** 2 for one in times)
        best = min(best, (error, reached, tile))
    return best[1:]


def _linear(device: Device, one: LinearTime, at: Constants) -> float:
    forward = product_time(device, one.tokens, one.width, one.width, at)
    return 2 * forward + product_time(device, one.width, one.width, one.tokens, at)


def device_of(name: str, timer: Timer, memory: float) -> tuple[Device, Constants, list[LinearTime]]:
    """A device as it is found here, with constants of its own, and its linear layers by size. Collective.

    ``memory`` is how many bytes of it a rank has. Its peak is the highest rate that was found.
    """
    half, wide = (linear_times(timer, dtype) for dtype in (torch.bfloat16, torch.float32))
    bandwidth = memory_rate(timer)
    chain = chain_rate(timer, torch.bfloat16) / bandwidth if timer.cpu else 1.0
    peak, share = max(one.rate for one in half), fmean(b.rate / a.rate for a, b in zip(half, wide, strict=True))
    # Where the device is the host, launching is the host's time, and adds to the kernels'.
    launch = 0.0 if timer.cpu else launch_seconds(timer)
    at = replace(FITTED_CONSTANTS, stream=1.0, launch=launch, chain=chain, host=host_seconds(timer))
    attention = attention_rates(timer, torch.bfloat16)
    flash = (attention[-1][1] / peak, attention[-1][2] / peak)
    device = Device(name, peak, 1.0, bandwidth, memory, flash, peak * share, timer.cpu, attention)
    reached, tile = fitted_products(device, half, at)
    return replace(device, reached=reached), replace(at, tile=tile), half
