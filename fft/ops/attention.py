"""Causal attention over packed documents that never see each other, and its way into transformers.

No mask is ever built: work is half the sum of the squared document lengths. The kernels are in ``fft/ops/backends``.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from fft.ops.alibi import widened
from fft.ops.backends import Backend
from fft.ops.backends.choice import choose
from fft.ops.documents import Boundaries, Documents, Segments, Softmax
from fft.ops.packed_operator import opaque_attention
from fft.ops.ring import NOBODY, Ring, gradient_of_sinks, ring_attention, with_sinks
from fft.ops.sequence_parallel import PLAIN, ShardedDocuments
from fft.parallel.ring_plan import plan_shards
from fft.parallel.window_plan import plan_attention

#: The name under which :func:`hf_attention` is registered with transformers.
HF_NAME = "fft_packed"
#: The window of a module that does not pass one on.
_UNSAID = -1


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Segments, backend: Backend
    ) -> Tensor:
        out, lse = with_sinks(*backend.forward(q, k, v, segments), sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.segments, ctx.backend = segments, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,), (q, k, v, out, lse, sinks) = grads, ctx.saved_tensors
        gradients = ctx.backend.backward(dout.contiguous(), q, k, v, out, lse, ctx.segments)
        return *gradients, gradient_of_sinks(dout, out, lse, sinks), None, None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float,
    backend: Backend | None = None,
    softmax: Softmax = PLAIN,
) -> Tensor:
    """Causal attention inside each document of a packed row.

    ``q`` is [tokens, heads, head size], ``k`` and ``v`` [tokens, key/value heads, head size]; returns q's shape.
    """
    backend = backend or choose(q.device, q.dtype, size=q.shape[-1], capped=softmax.cap is not None)
    if softmax.window is not None and softmax.window < documents.max_length:
        plan = plan_attention(plan_shards(documents.bounds, 1), 0, softmax.window)
        return ring_attention(q, k, v, Ring(plan, NOBODY, backend, scale, softmax.cap), softmax.sinks)
    segments = Segments.within(documents, scale, softmax.cap)
    return segment_attention(q, k, v, segments, backend, softmax.sinks)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: Backend, sinks: Tensor | None = None
) -> Tensor:
    """What one call of ``backend`` computes, with its gradient; shapes as in :func:`packed_attention`."""
    return _PackedAttention.apply(q, k, v, sinks, segments, backend)


def hf_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    documents: Documents | ShardedDocuments | Boundaries,
    attention: str = "auto",
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = _UNSAID,
    position_ids: Tensor | None = None,
    alibi: tuple[float, ...] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """:func:`packed_attention` in the calling convention of transformers.

    Takes [1, heads, tokens, head size] and returns [1, tokens, heads, head size] and None for the weights. Collective
    where the documents are sharded; with :class:`~fft.ops.documents.Boundaries` in their place it can be compiled.
    ``attention`` names the backend, see :func:`fft.ops.backends.choice.choose`. With ``alibi``, slopes of this rank's
    heads, ``position_ids`` are the tokens' in their documents [1, tokens].
    ``sliding_window``, which is the module's own if it does not say, attention sinks (``s_aux``) and ``softcap`` are
    those of :class:`~fft.ops.documents.Softmax`; heads of keys and values may differ in size. Raises ValueError for
    what a model may ask for and would silently not get: a mask, or dropout.
    """
    if attention_mask is not None or dropout:
        raise ValueError("packed attention takes documents, no mask and no dropout")
    size = value.shape[-1]
    widest = max(size, query.shape[-1])
    # Zeros beyond their ends change neither scores nor what is summed; kernels want heads of one size.
    padded = (x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in (query, key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in padded)  # an index would fill zeros in backward
    if alibi is not None:
        if position_ids is None:
            raise ValueError("ALiBi needs the positions of tokens in their documents")
        q, k, v = widened(q, k, v, position_ids[0], alibi, scaling)
    if sliding_window == _UNSAID:  # Qwen2-MoE leaves it to the mask, which is not made here
        sliding_window = getattr(module, "sliding_window", None)
    softmax = Softmax(sliding_window or None, s_aux, softcap)
    if isinstance(documents, Boundaries):
        return opaque_attention(q, k, v, documents, scaling, attention, softmax)[None, ..., :size], None
    backend = choose(q.device, q.dtype, attention, q.shape[-1], softcap is not None)
    if isinstance(documents, ShardedDocuments):
        out = documents.parallel.attention(q, k, v, documents.shards, scaling, backend, softmax)
    else:
        out = packed_attention(q, k, v, documents, scaling, backend, softmax)
    return out[None, ..., :size], None


@lru_cache(maxsize=1)
def register_with_transformers() -> str:
    """Make :func:`hf_attention` known to transformers and return its name for ``_attn_implementation``."""
    AttentionInterface.register(HF_NAME, hf_attention)
    # Without a mask function of its own transformers would build, or silently drop, a mask; ours needs none.
    AttentionMaskInterface.register(HF_NAME, lambda *_, **__: None)
    return HF_NAME
