"""Attention on a device: every kernel that runs there beside PyTorch's own, and the ring's work beside one call."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import DOCUMENTS, HEADS, KV_HEADS, SIZE, bounds_of
from benchmarks.device.frame import Cases, Row, Setting, milliseconds
from fft.errors import UserError, one_line
from fft.ops.backends import Backend
from fft.ops.backends.choice import KERNELS, choose, kernel_name
from fft.ops.documents import Documents, Segments
from fft.ops.ring import Ring, ring_backward, ring_forward
from fft.parallel.ring_plan import plan_rank, plan_shards, shards_of

#: What PyTorch's scaled_dot_product_attention is told to take; a vendor's best is among them.
_SDPA = {"SDPA, FlashAttention-2": SDPBackend.FLASH_ATTENTION, "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """Tokens of a row, and heads; a kernel's arithmetic is counted with two products forward and five backward."""

    tokens: int
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    size: int = SIZE

    def inputs(self, device: torch.device) -> list[Tensor]:
        """q, k, v and the output's gradient, random."""
        generator = torch.Generator(device).manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.tokens, count, self.size) for count in heads]
        return [torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes]

    def forward_flops(self, bounds: tuple[int, ...]) -> float:
        """Of causal attention within documents."""
        return sum(shards_of(bounds, [0]).areas) * 4 * self.heads * self.size


def cases(setting: Setting) -> Cases:
    """Documents of one length to a row, and of mixed lengths; the ring of 2 and 8 ranks, one rank after another."""
    if setting.smallest:
        shapes, rings = [(Shape(256, 2, 1, 32), 64)], [(Shape(512, 2, 1, 32), 2)]
    else:
        shapes = [(Shape(32768), length) for length in (1024, 4096, 8192, 32768)]
        rings = [(Shape(32768), 2), (Shape(131072), 8)]
    for shape, length in shapes:
        yield f"documents of {length}", functools.partial(compare, shape, length, setting)
    mixed = shapes[-1][0]
    yield "documents of mixed lengths", functools.partial(compare, mixed, None, setting)
    for shape, ranks in rings:
        yield f"ring of {ranks}", functools.partial(emulate, shape, ranks, setting)


def compare(shape: Shape, length: int | None, setting: Setting) -> list[Row]:
    """All kernels on a row of documents of ``length``, or of mixed lengths, which PyTorch's own cannot take."""
    device = setting.device
    bounds = tuple(range(0, shape.tokens + 1, length)) if length else bounds_of(_mixed, shape.tokens)
    segments = Segments.within(Documents.of(bounds, device), shape.size**-0.5)
    rows, flops = [], shape.forward_flops(bounds)
    for name, work in _timed(shape, length, segments, shape.inputs(device)):
        row: Row = {"documents": f"{len(bounds) - 1} of {length or 'mixed lengths'}", "kernel": name}
        try:
            forward, backward = work()
            times = [milliseconds(each, device, 3 if setting.smallest else 20) for each in (forward, backward)]
        except (RuntimeError, UserError) as error:  # not for this device, type or shape
            rows.append(row | {"note": one_line(error)[:60]})
            continue
        rates = [flops / times[0] / 1e9, 2.5 * flops / times[1] / 1e9]
        rows.append(
            row
            | dict(zip(("forward ms", "backward ms"), times, strict=True))
            | dict(zip(("forward TFLOP/s", "backward TFLOP/s"), rates, strict=True))
        )
    return rows


def _mixed(rng: object) -> float:
    return DOCUMENTS["log-normal, median 2k"](rng)


def _timed(
    shape: Shape, length: int | None, segments: Segments, inputs: list[Tensor]
) -> Iterator[tuple[str, Callable[[], tuple[Callable, Callable]]]]:
    """Of each kernel its name, and what makes its forward and backward."""
    for name, kernel in KERNELS.items():
        if kernel.fits(inputs[0].device, inputs[0].dtype) and kernel.is_installed():
            yield name, functools.partial(_ours, name, shape, segments, inputs)
    if length:
        for name, choice in _SDPA.items():
            yield name, functools.partial(_sdpa, choice, length, segments.scale, inputs)


def _ours(name: str, shape: Shape, segments: Segments, inputs: list[Tensor]) -> tuple[Callable, Callable]:
    q, k, v, dout = inputs
    backend = choose(q.device, q.dtype, name, shape.size)
    out, lse = backend.forward(q, k, v, segments)
    forward = functools.partial(backend.forward, q, k, v, segments)
    return forward, functools.partial(backend.backward, dout, q, k, v, out, lse, segments)


def _sdpa(choice: SDPBackend, length: int, scale: float, inputs: list[Tensor]) -> tuple[Callable, Callable]:
    """``scaled_dot_product_attention`` on a batch of documents of one length, keys repeated where it asks for that."""
    q, k, v, dout = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in inputs)
    q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with sdpa_kernel(choice):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )

    out = forward()
    return forward, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


class Nobody:
    """An exchange without others, for timing: what would arrive is zeros."""

    rank = 0

    def start(self, sends: list, receives: list) -> Callable[[], None]:
        """Fill the buffers."""
        for _, buffer in receives:
            buffer.zero_()
        return lambda: None


def emulate(shape: Shape, ranks: int, setting: Setting) -> list[Row]:
    """All ranks' kernels, merges and copies on one device, one rank after another, against one call over the row."""
    device, bounds = setting.device, bounds_of(_mixed, shape.tokens)
    inputs, scale = shape.inputs(device), shape.size**-0.5
    backend = choose(device, inputs[0].dtype, "auto", shape.size)
    shards, repeats = plan_shards(bounds, ranks), 3 if setting.smallest else 10
    segments = Segments.within(Documents.of(bounds, device), scale)
    whole = milliseconds(functools.partial(_one_call, backend, segments, inputs), device, repeats)
    parts = []
    for rank in range(ranks):
        tokens = torch.from_numpy(shards.tokens(rank)).to(device)
        ring = Ring(plan_rank(shards, rank), Nobody(), backend, scale)
        work = functools.partial(_one_rank, ring, [x[tokens] for x in inputs])
        parts.append(milliseconds(work, device, repeats))
    flops = 3.5 * shape.forward_flops(bounds)
    ways = {"one call": whole, "all ranks": sum(parts), "ranks x the slowest": max(parts) * ranks}
    return [
        {
            "documents": f"{len(bounds) - 1} of mixed lengths",
            "kernel": f"{kernel_name(backend)}, {ranks} ranks: {way}",
            "forward and backward ms": spent,
            "TFLOP/s": flops / spent / 1e9,
            "of one call %": 100 * whole / spent,
        }
        for way, spent in ways.items()
    ]


def _one_call(backend: Backend, segments: Segments, inputs: list[Tensor]) -> None:
    q, k, v, dout = inputs
    out, lse = backend.forward(q, k, v, segments)
    backend.backward(dout, q, k, v, out, lse, segments)


def _one_rank(ring: Ring, inputs: list[Tensor]) -> None:
    q, k, v, dout = inputs
    out, lse = ring_forward(q, k, v, ring)
    ring_backward(dout, q, k, v, out, lse, ring)
