"""PyTorch's own variable-length FlashAttention: one launch for all documents, no extra package."""

import torch
from torch import Tensor

from fft.ops.backends.limits import backward_within, forward_within
from fft.ops.documents import Segments


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    return forward_within(_forward, q, k, v, segments)


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *segments.lengths, 0.0, segments.causal, False, scale=segments.plain_scale
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
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's random state; there is no dropout
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, *segments.lengths, 0.0, segments.causal, unused, unused[:0], scale=segments.plain_scale
    )
