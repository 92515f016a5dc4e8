"""FlashAttention 3 (Hopper), the module ``flash_attn_interface`` that its sources install.

Written against the published interface (``hopper`` of flash-attn 2.8.3); it has not run on a GPU. Later sources renamed
backward's ``causal`` but kept its place, so it and all before it are given by position.
"""

import torch
from torch import Tensor

from fft.ops.backends.limits import backward_within, forward_within
from fft.ops.documents import Segments


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    return forward_within(_forward, q, k, v, segments)


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward

    unused = (None,) * 4  # new keys and values, a second query, the output's buffer
    cu_queries, cu_keys, longest_query, longest_key = segments.lengths
    lengths = (cu_queries, cu_keys, None, None, None, longest_query, longest_key)
    cache = (None,) * 9  # pages, rotary embedding and scales of 8-bit inputs, all for inference
    how, cap = (segments.scale, segments.causal), segments.cap or 0.0
    out, lse, *_ = _flash_attn_forward(q, k, v, *unused, *lengths, *cache, *how, softcap=cap)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    return backward_within(_backward, dout, q, k, v, out, lse, segments)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    cu_queries, cu_keys, longest_query, longest_key = segments.lengths
    lengths = (cu_queries, cu_keys, None, None, longest_query, longest_key)
    how, cap = (segments.scale, segments.causal), segments.cap or 0.0
    deterministic = torch.are_deterministic_algorithms_enabled()
    _flash_attn_backward(dout, q, k, v, out, lse, *lengths, dq, dk, dv, *how, softcap=cap, deterministic=deterministic)
    return dq, dk, dv
