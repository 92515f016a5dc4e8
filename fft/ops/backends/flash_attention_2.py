"""The flash-attn package, version 2: one launch for all documents.

Written against the published interface (flash-attn 2.8.3); it has not run on a GPU.
"""

import torch
from torch import Tensor

from fft.ops.backends.limits import backward_within, forward_within
from fft.ops.documents import Segments


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    return forward_within(_forward, q, k, v, segments)


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        q,
        k,
        v,
        *segments.lengths,
        dropout_p=0.0,
        softmax_scale=segments.scale,
        causal=segments.causal,
        softcap=segments.cap or 0.0,
    )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    return backward_within(_backward, dout, q, k, v, out, lse, segments)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        *segments.lengths,
        dropout_p=0.0,
        softmax_scale=segments.scale,
        causal=segments.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=segments.cap or 0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv
