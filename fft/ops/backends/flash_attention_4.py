"""FlashAttention 4 (package flash-attn-4: Hopper and Blackwell, kernels compiled at first use).

Written against the published interface (flash-attn-4 4.0.0b36); it has not run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from fft.ops.documents import Documents


def forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **_lengths(queries, keys)
    )
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Documents,
    keys: Documents,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`. The package takes ``dout`` after ``out``."""
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=scale,
        causal=causal,
        deterministic=deterministic,
        **_lengths(queries, keys),
    )
    return dq, dk, dv


def _lengths(queries: Documents, keys: Documents) -> dict[str, Any]:
    return {
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "max_seqlen_q": queries.max_length,
        "max_seqlen_k": keys.max_length,
    }
