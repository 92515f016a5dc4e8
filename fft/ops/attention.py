"""Causal attention over packed documents that never see each other.

A device supplies two functions (the contract every backend meets, layout THD = [tokens, heads, head size]):

- ``forward(q, k, v, documents, scale) -> (out, lse)``
- ``backward(dout, q, k, v, out, lse, documents, scale) -> (dq, dk, dv)``

``lse`` is float32 (float64 for float64 inputs) [heads, tokens]. Key/value heads may be fewer than query heads
(grouped-query attention). No mask is ever built: work is the sum of the squared document lengths.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

#: The name under which :func:`hf_attention` is registered with transformers.
HF_NAME = "fft_packed"


@dataclass(frozen=True)
class Documents:
    """The documents of a packed row of tokens.

    ``cu_seqlens`` is an int32 tensor [documents + 1] on the device, ``bounds`` the same numbers on the host, so that
    no layer waits for the device to learn them.
    """

    cu_seqlens: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def from_padded(cls, cu_seqlens: Tensor) -> "Documents":
        """Drop the repeated last entries that pad ``cu_seqlens`` to a fixed length (one host synchronisation)."""
        host = cu_seqlens.tolist()
        bounds = tuple(host[: host.index(host[-1]) + 1])
        return cls(cu_seqlens[: len(bounds)], bounds)

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(b - a for a, b in pairwise(self.bounds))

    def positions(self) -> Tensor:
        """Position of every token within its document, int64 [tokens]."""
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.diff().long()
        total = self.bounds[-1]
        return torch.arange(total, device=starts.device) - starts.repeat_interleave(lengths, output_size=total)


class ReferenceBackend:
    """Plain matrix algebra, any device and dtype. What the others are compared with."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
        """Softmax attention, one document at a time."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))
        for a, b in _spans(documents):
            scores = ReferenceBackend._scores(q[a:b], k[a:b], scale)
            lse[:, a:b] = scores.logsumexp(-1)
            weights = (scores - lse[:, a:b, None]).exp().to(v.dtype)
            out[a:b] = (weights @ _expand(v[a:b], q.shape[1])).transpose(0, 1)
        return out, lse

    @staticmethod
    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients from the saved log-sum-exp, as in FlashAttention (arXiv:2205.14135, algorithm 4)."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        groups = q.shape[1] // k.shape[1]
        for a, b in _spans(documents):
            weights = (ReferenceBackend._scores(q[a:b], k[a:b], scale) - lse[:, a:b, None]).exp()
            grad = dout[a:b].transpose(0, 1).to(weights.dtype)
            values, keys = (_expand(x[a:b], q.shape[1]).to(weights.dtype) for x in (v, k))
            delta = (grad * out[a:b].transpose(0, 1)).sum(-1, keepdim=True)
            dscores = weights * (grad @ values.transpose(1, 2) - delta) * scale
            dq[a:b] = (dscores @ keys).transpose(0, 1)
            dk[a:b] = _fold(dscores.transpose(1, 2) @ q[a:b].transpose(0, 1).to(weights.dtype), groups)
            dv[a:b] = _fold(weights.transpose(1, 2) @ grad, groups)
        return dq, dk, dv

    @staticmethod
    def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
        dtype = _lse_dtype(q)
        scores = q.transpose(0, 1).to(dtype) @ _expand(k, q.shape[1]).transpose(1, 2).to(dtype) * scale
        length = q.shape[0]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, float("-inf"))


class CpuBackend:
    """The CPU's fused kernel, one call per document."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
        """See the module's contract."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))
        for a, b in _spans(documents):
            piece, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _bhtd(q[a:b]), _bhtd(k[a:b]), _bhtd(v[a:b]), 0.0, True, scale=scale
            )
            out[a:b] = piece[0].transpose(0, 1)
            lse[:, a:b] = piece_lse[0]
        return out, lse

    @staticmethod
    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the module's contract."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for a, b in _spans(documents):
            pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_bhtd(x[a:b]) for x in (dout, q, k, v, out)), lse[None, :, a:b], 0.0, True, scale=scale
            )
            for grad, piece in zip((dq, dk, dv), pieces, strict=True):
                grad[a:b] = piece[0].transpose(0, 1)
        return dq, dk, dv


class CudaBackend:
    """PyTorch's own variable-length FlashAttention: one launch for all documents, no extra package."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
        """See the module's contract."""
        cu, longest = documents.cu_seqlens, documents.max_length
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scale
        )
        return out, lse

    @staticmethod
    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the module's contract."""
        cu, longest = documents.cu_seqlens, documents.max_length
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's random state; there is no dropout
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, True, unused, unused[:0], scale=scale
        )


_BACKENDS = {"cpu": CpuBackend, "cuda": CudaBackend}


def backend_for(tensor: Tensor) -> type:
    """The backend of a tensor's device; the reference where the device has none of its own."""
    if tensor.dtype == torch.float64:
        return ReferenceBackend
    return _BACKENDS.get(tensor.device.type, ReferenceBackend)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, backend: type) -> Tensor:
        out, lse = backend.forward(q, k, v, documents, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.scale, ctx.backend = documents, scale, backend
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        grads = ctx.backend.backward(dout.contiguous(), *ctx.saved_tensors, ctx.documents, ctx.scale)
        return *grads, None, None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, backend: type | None = None
) -> Tensor:
    """Causal attention inside each document of a packed row.

    ``q`` is [tokens, heads, head size], ``k`` and ``v`` [tokens, key/value heads, head size]; returns q's shape.
    """
    return _PackedAttention.apply(q, k, v, documents, scale, backend or backend_for(q))


def hf_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    documents: Documents,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """:func:`packed_attention` in the calling convention of transformers ([1, heads, tokens, head size] in).

    Raises ValueError for what a model may ask for and would silently not get: a mask, dropout, capped scores, attention
    sinks (``s_aux``), or a window shorter than a document.
    """
    if attention_mask is not None or dropout:
        raise ValueError("packed attention takes documents, no mask and no dropout")
    if softcap is not None or s_aux is not None:
        raise ValueError("packed attention caps no scores and has no attention sinks")
    if sliding_window and documents.max_length > sliding_window:
        raise ValueError(f"packed attention has no window: {documents.max_length} tokens exceed {sliding_window}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, documents, scaling)[None], None


@lru_cache(maxsize=1)
def register_with_transformers() -> str:
    """Make :func:`hf_attention` known to transformers and return its name for ``_attn_implementation``."""
    AttentionInterface.register(HF_NAME, hf_attention)
    # Without a mask function of its own transformers would build, or silently drop, a mask; ours needs none.
    AttentionMaskInterface.register(HF_NAME, lambda *_, **__: None)
    return HF_NAME


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _spans(documents: Documents) -> list[tuple[int, int]]:
    return [(a, b) for a, b in pairwise(documents.bounds) if b > a]


def _bhtd(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _expand(x: Tensor, heads: int) -> Tensor:
    """[tokens, kv heads, size] -> [heads, tokens, size]."""
    return x.transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _fold(x: Tensor, groups: int) -> Tensor:
    """[heads, tokens, size] -> [tokens, kv heads, size], summing the heads of a group."""
    heads, tokens, size = x.shape
    return x.view(heads // groups, groups, tokens, size).sum(1).transpose(0, 1)
