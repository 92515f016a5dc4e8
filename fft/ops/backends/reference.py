"""Plain matrix algebra, any device and dtype, scores capped or not. What the other backends are compared with.

Scores are held of some queries at a time, so that memory does not grow with the square of a document.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fft.ops.documents import Segments, lse_dtype

#: Queries whose scores are held at once.
_ROWS = 512


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q))
    for row, col, before in _blocks(segments):
        scores = _masked(_scores(q[row], k[col], segments), segments, before)
        lse[:, row] = scores.logsumexp(-1)
        weights = (scores - lse[:, row, None]).exp().to(v.dtype)
        out[row] = (weights @ _expand(v[col], q.shape[1])).transpose(0, 1)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the saved log-sum-exp, as in FlashAttention (arXiv:2205.14135, algorithm 4)."""
    dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=lse_dtype(q)) for x in (k, v))
    groups = q.shape[1] // k.shape[1]
    for row, col, before in _blocks(segments):
        scores = _scores(q[row], k[col], segments)
        weights = (_masked(scores, segments, before) - lse[:, row, None]).exp()
        grad = dout[row].transpose(0, 1).to(weights.dtype)
        values, expanded = (_expand(x[col], q.shape[1]).to(weights.dtype) for x in (v, k))
        delta = (grad * out[row].transpose(0, 1)).sum(-1, keepdim=True)
        dscores = weights * (grad @ values.transpose(1, 2) - delta) * segments.scale
        if segments.cap is not None:
            dscores *= 1 - (scores / segments.cap) ** 2
        dq[row] = (dscores @ expanded).transpose(0, 1)
        dk[col] += _fold(dscores.transpose(1, 2) @ q[row].transpose(0, 1).to(weights.dtype), groups)
        dv[col] += _fold(weights.transpose(1, 2) @ grad, groups)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _blocks(segments: Segments) -> Iterator[tuple[slice, slice, int]]:
    """Rows of some queries of a document, those of the keys that they see, and how many keys are before the first's."""
    for row, col in segments.spans():
        for start in range(row.start, row.stop, _ROWS):
            stop = min(start + _ROWS, row.stop)
            seen = col.start + stop - row.start if segments.causal else col.stop
            yield slice(start, stop), slice(col.start, seen), start - row.start


def _scores(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    """[heads, queries, keys], scaled and capped."""
    dtype = lse_dtype(q)
    scores = q.transpose(0, 1).to(dtype) @ _expand(k, q.shape[1]).transpose(1, 2).to(dtype) * segments.scale
    return scores if segments.cap is None else segments.cap * torch.tanh(scores / segments.cap)


def _masked(scores: Tensor, segments: Segments, before: int) -> Tensor:
    """With nothing for keys that a query does not see, of which the first sees ``before`` and its own."""
    if not segments.causal:
        return scores
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1 + before)
    return scores.masked_fill(hidden, float("-inf"))


def _expand(x: Tensor, heads: int) -> Tensor:
    """[tokens, kv heads, size] -> [heads, tokens, size]."""
    return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _fold(x: Tensor, groups: int) -> Tensor:
    """[heads, tokens, size] -> [tokens, kv heads, size], summing the heads of a group."""
    heads, tokens, size = x.shape
    return x.view(heads // groups, groups, tokens, size).sum(1).transpose(0, 1)
