"""PyTorch's own variable-length FlashAttention: one launch for all documents, no extra package."""

import torch
from torch import Tensor

from fft.ops.documents import Documents


def forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_lengths(queries, keys), 0.0, causal, False, scale=scale
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
    """See :class:`fft.ops.backends.Backend`."""
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's random state; there is no dropout
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *_lengths(queries, keys), 0.0, causal, unused, unused[:0], scale=scale
    )


def _lengths(queries: Documents, keys: Documents) -> tuple[Tensor, Tensor, int, int]:
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_length, keys.max_length
