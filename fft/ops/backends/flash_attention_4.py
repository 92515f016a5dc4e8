"""FlashAttention 4 (package flash-attn-4: Hopper and Blackwell, kernels compiled at first use).

Written against the published interface (flash-attn-4 4.0.0b36); it has not run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from fft.ops.backends.limits import backward_within, forward_within
from fft.ops.documents import Segments


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    return forward_within(_forward, q, k, v, segments)


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **_options(segments))
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`. The package takes ``dout`` after ``out``."""
    return backward_within(_backward, dout, q, k, v, out, lse, segments)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        deterministic=deterministic,
        **_options(segments),
    )
    return dq, dk, dv


def _options(segments: Segments) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    lengths = dict(zip(names, segments.lengths, strict=True))
    return {"softmax_scale": segments.scale, "causal": segments.causal, "softcap": segments.cap or 0.0, **lengths}
