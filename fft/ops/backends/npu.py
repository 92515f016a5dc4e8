"""Ascend's fused attention, ``torch_npu.npu_fusion_attention`` and ``_grad``, on packed rows (layout TND).

Written against the operators' published schemas and documentation (torch_npu 2.14.0); it has not run on an NPU. What
bites: lengths are cumulative ends on the host, without the leading 0. A boolean mask is True where nothing is seen, and
sparse mode 3 (causal) wants it compressed, always 2048 x 2048. Maximum and sum of the softmax come eight times over,
and without ``softmax_layout="TND"`` in the order [heads, tokens] of each document.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fft.ops.documents import Segments

_CAUSAL = 3
_REPEATS = 8


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    import torch_npu

    out, maximum, total, *_ = torch_npu.npu_fusion_attention(
        q, k, v, q.shape[1], "TND", scale=segments.plain_scale, **_options(q, segments)
    )
    return out, (maximum[..., 0] + total[..., 0].log()).t().contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`. The operator forms exp(score - max) / sum: lse as maximum, 1 as sum."""
    import torch_npu

    maximum = lse.t().unsqueeze(-1).expand(-1, -1, _REPEATS).contiguous()
    dq, dk, dv, *_ = torch_npu.npu_fusion_attention_grad(
        q,
        k,
        v,
        dout,
        q.shape[1],
        "TND",
        softmax_max=maximum,
        softmax_sum=torch.ones_like(maximum),
        attention_in=out,
        scale_value=segments.plain_scale,
        **_options(q, segments),
    )
    return dq, dk, dv


def _options(q: Tensor, segments: Segments) -> dict[str, Any]:
    return {
        "atten_mask": _causal_mask(q.device) if segments.causal else None,
        "actual_seq_qlen": list(segments.queries.bounds[1:]),
        "actual_seq_kvlen": list(segments.keys.bounds[1:]),
        "sparse_mode": _CAUSAL if segments.causal else 0,
        "softmax_layout": "TND",
    }


@lru_cache(maxsize=1)
def _causal_mask(device: torch.device) -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
