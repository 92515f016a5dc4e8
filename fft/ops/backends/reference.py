"""Plain matrix algebra, any device and dtype. What the other backends are compared with."""

import torch
from torch import Tensor

from fft.ops.documents import Segments, lse_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q))
    for row, col in segments.spans():
        scores = _scores(q[row], k[col], segments)
        lse[:, row] = scores.logsumexp(-1)
        weights = (scores - lse[:, row, None]).exp().to(v.dtype)
        out[row] = (weights @ _expand(v[col], q.shape[1])).transpose(0, 1)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the saved log-sum-exp, as in FlashAttention (arXiv:2205.14135, algorithm 4)."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = q.shape[1] // k.shape[1]
    for row, col in segments.spans():
        weights = (_scores(q[row], k[col], segments) - lse[:, row, None]).exp()
        grad = dout[row].transpose(0, 1).to(weights.dtype)
        values, expanded = (_expand(x[col], q.shape[1]).to(weights.dtype) for x in (v, k))
        delta = (grad * out[row].transpose(0, 1)).sum(-1, keepdim=True)
        dscores = weights * (grad @ values.transpose(1, 2) - delta) * segments.scale
        dq[row] = (dscores @ expanded).transpose(0, 1)
        dk[col] = _fold(dscores.transpose(1, 2) @ q[row].transpose(0, 1).to(weights.dtype), groups)
        dv[col] = _fold(weights.transpose(1, 2) @ grad, groups)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    dtype = lse_dtype(q)
    scores = q.transpose(0, 1).to(dtype) @ _expand(k, q.shape[1]).transpose(1, 2).to(dtype) * segments.scale
    if not segments.causal:
        return scores
    hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf"))


def _expand(x: Tensor, heads: int) -> Tensor:
    """[tokens, kv heads, size] -> [heads, tokens, size]."""
    return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _fold(x: Tensor, groups: int) -> Tensor:
    """[heads, tokens, size] -> [tokens, kv heads, size], summing the heads of a group."""
    heads, tokens, size = x.shape
    return x.view(heads // groups, groups, tokens, size).sum(1).transpose(0, 1)
