"""The CPU's fused kernel, one call per document."""

import torch
from torch import Tensor

from fft.ops.documents import Segments, lse_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q))
    for row, col in segments.spans():
        own, own_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _bhtd(q[row]), _bhtd(k[col]), _bhtd(v[col]), 0.0, segments.causal, scale=segments.plain_scale
        )
        out[row] = own[0].transpose(0, 1)
        lse[:, row] = own_lse[0]
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for row, col in segments.spans():
        inputs = (_bhtd(x) for x in (dout[row], q[row], k[col], v[col], out[row]))
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, lse[None, :, row], 0.0, segments.causal, scale=segments.plain_scale
        )
        dq[row], dk[col], dv[col] = (gradient[0].transpose(0, 1) for gradient in gradients)
    return dq, dk, dv


def _bhtd(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]
