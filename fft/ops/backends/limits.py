"""What FlashAttention's kernels do not take, made into what they take.

Heads of a multiple of 8 alone: others get zeros at their ends, which change neither scores nor sums.

Backward sums the gradient of the queries in fp32 in a buffer of its own, [tokens + 128 a document, heads, head size],
and counts places in 32 bits: of 2^32 elements and more the gradients of one document were added to those of another, in
silence (seen on an H200 with PyTorch 2.11, on 2^20 tokens with 32 heads of 128). So many go in several calls.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fft.ops.documents import Segments

Forward = Callable[[Tensor, Tensor, Tensor, Segments], tuple[Tensor, Tensor]]
#: Gradients of q, k, v from (gradient of the output, q, k, v, output, log-sum-exp, segments).
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Segments], tuple[Tensor, Tensor, Tensor]]

_EIGHT = 8
#: What 31 bits can count: some of the kernels' numbers have a sign.
_LIMIT = 1 << 31
#: Tokens that the buffer has more for every document, and what it rounds the size of heads up to.
_PADDING, _ROUND = 128, 64


def forward_within(forward: Forward, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """What ``forward`` gives of the rest, heads of any size; see :class:`fft.ops.backends.Backend`."""
    size = q.shape[-1]
    if size % _EIGHT == 0:
        return forward(q, k, v, segments)
    out, lse = forward(_widened(q), _widened(k), _widened(v), segments)
    return out[..., :size], lse


def backward_within(
    backward: Backward, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``backward`` gives of the rest, heads of any size and any number of elements."""
    size = q.shape[-1]
    if size % _EIGHT:
        dout, q, k, v, out = (_widened(x) for x in (dout, q, k, v, out))
        dq, dk, dv = backward_within(backward, dout, q, k, v, out, lse, segments)
        return dq[..., :size], dk[..., :size], dv[..., :size]
    documents = len(segments.queries.bounds) - 1
    each = (q.shape[0] + _PADDING * documents) * -(-size // _ROUND) * _ROUND
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    if each * heads < _LIMIT:
        return backward(dout, q, k, v, out, lse, segments)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (k, v))
    step = _heads_a_call(shared, max(1, (_LIMIT - 1) // each))
    for first in range(0, heads, step):
        own = slice(first, min(first + step, heads))
        keys = slice(first // shared, -(-own.stop // shared))
        part = backward(dout[:, own], q[:, own], k[:, keys], v[:, keys], out[:, own], lse[own], segments)
        dq[:, own] = part[0]
        dk[:, keys] += part[1]
        dv[:, keys] += part[2]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _widened(x: Tensor) -> Tensor:
    return pad(x, (0, -x.shape[-1] % _EIGHT))


def _heads_a_call(shared: int, most: int) -> int:
    """At most ``most`` heads of queries: all ``shared`` by some heads of keys, or equal parts of those of one."""
    if most >= shared:
        return most - most % shared
    return next(count for count in range(most, 0, -1) if shared % count == 0)
