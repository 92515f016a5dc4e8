"""cuDNN's attention through PyTorch, which has kernels for Hopper: a launch for each document, where they are long.

PyTorch also hands all documents of a row to cuDNN in one call, but up to 2.12 at least it plans that call anew each
time, tens of milliseconds, and its backward takes the width of heads for the longest document (pytorch 186142). What is
planned here is kept, one plan a length. So that lengths are few, a document is computed longer than it is: as causal,
it does not see what follows in the row, and what that sees is thrown away. Short documents, wide heads, and what is not
causal, are PyTorch's FlashAttention's. Compared, before it is used, like all others; it has not run on a GPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fft.ops.backends import cuda
from fft.ops.documents import Segments, lse_dtype

#: Tokens that documents have in the mean where a launch for each pays, and the least one is computed with.
LONG, SHORTEST = 2048, 128
#: The widest heads whose gradients every Hopper version of it has.
WIDEST = 128
#: Elements of a document's queries that 31 bits do not count: whether its kernels could was not tried.
MOST = 1 << 31
#: Lengths between one power of two and the next.
_LENGTHS = 16


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    if not _suits(q, segments):
        return cuda.forward(q, k, v, segments)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q))
    for rows, _ in segments.spans():
        inputs = (_document(x, rows) for x in (q, k, v))
        own, own_lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *inputs, None, True, 0.0, True, False, scale=segments.plain_scale
        )
        count = rows.stop - rows.start
        out[rows], lse[:, rows] = own[0].transpose(0, 1)[:count], own_lse[0, :, :count, 0]
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`fft.ops.backends.Backend`."""
    if not _suits(q, segments):
        return cuda.backward(dout, q, k, v, out, lse, segments)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's random state; there is no dropout
    for rows, _ in segments.spans():
        count = rows.stop - rows.start
        length, (query, key, value, result) = computed(count), (_document(x, rows) for x in (q, k, v, out))
        grad = pad(dout[rows], (0, 0, 0, 0, 0, length - count)).transpose(0, 1)[None]
        # Of what is beyond the document all weights are exp(-inf).
        whole = pad(lse[:, rows], (0, length - count), value=float("inf"))[None, ..., None]
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, query, key, value, result, whole, unused, unused, None, None, None),
            *(length, length, 0.0, True),
            scale=segments.plain_scale,
        )
        for all_of, own in zip((dq, dk, dv), found, strict=True):
            all_of[rows] = own[0].transpose(0, 1)[:count]
    return dq, dk, dv


def computed(tokens: int) -> int:
    """With how many a document of so many tokens is computed: at most a 16th more, but for very short ones."""
    step = max(SHORTEST, (1 << (tokens - 1).bit_length()) // (2 * _LENGTHS))
    return -(-tokens // step) * step


def _suits(q: Tensor, segments: Segments) -> bool:
    documents, (_, heads, size) = segments.queries, q.shape
    long = documents.bounds[-1] >= LONG * (len(documents.bounds) - 1)
    few = computed(documents.max_length) * heads * size < MOST
    return segments.causal and long and few and size <= WIDEST and size % 8 == 0


def _document(x: Tensor, rows: slice) -> Tensor:
    """[tokens, heads, size] of a document and of what follows it in the row, as [1, heads, tokens, size]."""
    stop = rows.start + computed(rows.stop - rows.start)
    return pad(x[rows.start : stop], (0, 0, 0, 0, 0, max(0, stop - x.shape[0]))).transpose(0, 1)[None]
