"""Attention kernels, one module a device. Each supplies the two functions of :class:`Backend`."""

from typing import Protocol

from torch import Tensor

from fft.ops.documents import Documents


class Backend(Protocol):
    """What a device must supply: softmax attention within documents, and its gradients.

    Layout THD: ``q``, ``out``, ``dout`` are [query tokens, heads, head size]; ``k``, ``v`` [key tokens, key/value
    heads, head size], heads a multiple of key/value heads (grouped-query attention); ``lse`` float32 (float64 for
    float64 inputs) [heads, query tokens]. Document i's queries see document i's keys: all of them, or with ``causal``,
    those up to their own position; queries and keys of a causal document are equally many. Every query has a key.

    ``backward`` takes ``out`` and ``lse`` of a softmax that may be larger than this call: gradients of the parts of a
    softmax, each computed with the whole's ``out`` and ``lse``, add up to the whole's gradients. A ring needs no more.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)``."""

    @staticmethod
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
        """Return ``(dq, dk, dv)``."""
