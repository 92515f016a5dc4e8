"""Attention kernels, one module a device. Each supplies the two functions of :class:`Backend`."""

from typing import Protocol

from torch import Tensor

from fft.ops.documents import Segments


class Backend(Protocol):
    """What a device must supply: softmax attention within documents, and its gradients. A ring needs no more.

    Layout THD: ``q``, ``out``, ``dout`` are [query tokens, heads, head size]; ``k``, ``v`` [key tokens, key/value
    heads, head size], heads a multiple of key/value heads (grouped-query attention); ``lse``, the log-sum-exp of the
    scaled scores, is float32 (float64 for float64 inputs) [heads, query tokens].

    :class:`~fft.ops.documents.Segments` say which queries see which keys. A call is causal only with queries and keys
    of equal length in every document; all else is a dense rectangle. Callers never launch a query with nothing to
    attend to: kernels disagree on its ``lse`` (FlashAttention-2 +inf, 3 -inf, the CPU's 0).
    """

    __name__: str

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)``."""
        ...

    @staticmethod
    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(dq, dk, dv)``, shaped as ``q``, ``k`` and ``v``.

        ``out`` and ``lse`` may be those of a softmax that is larger than this call: gradients of the parts of a
        softmax, each computed with the whole's ``out`` and ``lse``, add up to the whole's gradients.
        """
        ...
