"""The kernels of :class:`~fft.ops.logits.FusedLogits`, a row a program. In registers scores are float32."""
# ruff: noqa: ANN001 - Triton would take types of arguments for its own

import triton
import triton.language as tl
from torch import Tensor

#: Columns that a program has at once, and its warps.
_BLOCK, _WARPS = 8192, 16


@triton.jit
def _scores(logits, bias, at, inside, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_CAP:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)  # the hyperbolic tangent
    return x


@triton.jit
def _sums(
    logits, targets, bias, lse, score, stride, columns, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = _scores(logits, bias, at, inside, cap, HAS_BIAS, HAS_CAP)
        x = tl.where(inside, x, -float("inf"))
        most = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - most) + tl.sum(tl.exp(x - most))
        largest = most
    tl.store(lse + row, largest + tl.log(total))
    own = tl.load(targets + row)
    hit = (own >= 0) & (own < columns)
    tl.store(score + row, tl.where(hit, _scores(logits, bias, own, hit, cap, HAS_BIAS, HAS_CAP), 0.0))


@triton.jit
def _gradients(
    logits, targets, bias, lse, stride, columns, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    whole = tl.load(lse + row)
    own = tl.load(targets + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = _scores(logits, bias, at, inside, cap, HAS_BIAS, HAS_CAP)
        grad = tl.exp(x - whole) - tl.where(at == own, 1.0, 0.0)
        if HAS_CAP:
            grad *= 1 - (x / cap) * (x / cap)
        tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=inside)


def row_sums(
    logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None, lse: Tensor, score: Tensor
) -> None:
    """Write log-sum-exps and the targets' scores of ``logits`` [rows, columns] to ``lse`` and ``score`` [rows, 1]."""
    pointers = logits, targets, logits if bias is None else bias, lse, score
    _launch(_sums, pointers, logits, bias, cap)


def row_gradients(logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None, lse: Tensor) -> None:
    """Write over ``logits`` [rows, columns] their gradients, ``lse`` [rows, 1] being the rows' log-sum-exps."""
    _launch(_gradients, (logits, targets, logits if bias is None else bias, lse), logits, bias, cap)


def _launch(
    kernel: triton.JITFunction, pointers: tuple, logits: Tensor, bias: Tensor | None, cap: float | None
) -> None:
    rows, columns = logits.shape
    kinds = {"HAS_BIAS": bias is not None, "HAS_CAP": cap is not None, "BLOCK": _BLOCK, "num_warps": _WARPS}
    kernel[(rows,)](*pointers, logits.stride(0), columns, 1.0 if cap is None else cap, **kinds)
