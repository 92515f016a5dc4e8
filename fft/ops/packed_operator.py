"""Attention as an operator that a compiler does not look into: what compiled layers call in place of a kernel.

Its boundaries are tensors, also those on the host, so that a graph made for some documents serves all others.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fft.ops.backends.choice import choose
from fft.ops.documents import Boundaries, Documents, Segments, Softmax, lse_dtype
from fft.ops.ring import NOBODY, Ring, gradient_of_sinks, ring_backward, ring_forward, with_sinks
from fft.ops.sequence_parallel import SequenceParallel
from fft.parallel.ring_plan import plan_shards
from fft.parallel.window_plan import plan_attention

#: The operator's name, as recomputation knows it.
NAME = "fft::packed_attention"


def opaque_attention(
    q: Tensor, k: Tensor, v: Tensor, boundaries: Boundaries, scale: float, kernel: str, softmax: Softmax
) -> Tensor:
    """:func:`fft.ops.attention.packed_attention`, by the backend that is called ``kernel``, as one operator.

    Collective, in forward and in backward, where ranks share the tokens.
    """
    *bounds, ranks = boundaries
    return _forward([q, k, v], softmax.sinks, bounds, scale, kernel, softmax.window, softmax.cap, ranks)[0]


@torch.library.custom_op(NAME, mutates_args=())
def _forward(
    states: Sequence[Tensor],
    sinks: Tensor | None,
    boundaries: Sequence[Tensor],
    scale: float,
    kernel: str,
    window: int | None,
    cap: float | None,
    ranks: str | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; ``states`` are q, k, v, ``boundaries`` those of documents, on the device and the host."""
    q, k, v = states
    forward, _ = _passes(q, boundaries, scale, kernel, Softmax(window, None, cap), ranks)
    out, lse = forward(q, k, v)
    out, lse = with_sinks(out, lse, sinks)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op(f"{NAME}_backward", mutates_args=())
def _backward(
    states: Sequence[Tensor],
    sinks: Tensor | None,
    boundaries: Sequence[Tensor],
    scale: float,
    kernel: str,
    window: int | None,
    cap: float | None,
    ranks: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks, which are empty without; ``states`` are the output's gradient, q, k, v, the
    output and the log-sum-exp.
    """
    dout, q, k, v, out, lse = states
    _, backward = _passes(q, boundaries, scale, kernel, Softmax(window, None, cap), ranks)
    gradients = backward(dout.contiguous(), q, k, v, out, lse)
    through = gradient_of_sinks(dout, out, lse, sinks)
    dq, dk, dv = (x.contiguous() for x in gradients)
    return dq, dk, dv, q.new_empty(0) if through is None else through


def _passes(
    q: Tensor, boundaries: Sequence[Tensor], scale: float, kernel: str, softmax: Softmax, ranks: str | None
) -> tuple[Callable, Callable]:
    """What computes (output, log-sum-exp), and the gradients from these."""
    cu_seqlens, host = boundaries
    documents = Documents(cu_seqlens, tuple(host.tolist()))
    backend = choose(q.device, q.dtype, kernel, q.shape[-1], softmax.cap is not None)
    if ranks is not None:
        parallel = SequenceParallel.called(ranks)
        ring = parallel.ring(parallel.shards(documents.bounds), scale, backend, softmax.window, softmax.cap)
        return partial(ring_forward, ring=ring), partial(ring_backward, ring=ring)
    if softmax.window is not None and softmax.window < documents.max_length:
        plan = plan_attention(plan_shards(documents.bounds, 1), 0, softmax.window)
        ring = Ring(plan, NOBODY, backend, scale, softmax.cap)
        return partial(ring_forward, ring=ring), partial(ring_backward, ring=ring)
    segments = Segments.within(documents, scale, softmax.cap)
    return partial(backend.forward, segments=segments), partial(backend.backward, segments=segments)


@_forward.register_fake
def _(states: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    q = states[0]
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q))


@_backward.register_fake
def _(states: Sequence[Tensor], sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    q, k, v = states[1:4]
    last = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(x.new_empty(x.shape) for x in (q, k, v)), last


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    states, sinks, boundaries, *ctx.how = inputs
    ctx.save_for_backward(*states, *output, sinks, *boundaries)


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple:
    *states, sinks, cu_seqlens, host = ctx.saved_tensors
    *gradients, last = _backward([dout, *states], sinks, [cu_seqlens, host], *ctx.how)
    return gradients, None if sinks is None else last, [None, None], *[None] * 5


_forward.register_autograd(_gradients, setup_context=_keep)
