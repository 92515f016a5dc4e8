"""What the loss makes of a piece of logits: log-sum-exp and the target's score of each row, then the gradient in place.

Two ways: PyTorch's operators, on any device, and a kernel in Triton (fft/ops/logits_kernel.py), which leaves a logit
in its own type and place: it is read twice and written once, as a float32 it exists in registers alone.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from fft.errors import UserError
from fft.ops.compare import disagreement
from fft.ops.documents import lse_dtype


class Logits(Protocol):
    """Rows of logits. The loss of each is ``lse`` - ``score``, both [rows, 1], float32 or wider."""

    lse: Tensor
    score: Tensor

    def gradient(self, lse: Tensor) -> Tensor:
        """That of the sum of the losses with respect to the scores [rows, columns], in the logits' memory and type.

        ``lse`` is what a row's log-sum-exp is over the columns of all ranks.
        """
        ...


#: Makes them of ``logits`` [rows, columns], which it may write over, ``targets`` [rows, 1], columns or, beyond those,
#: another rank's, a ``bias`` [columns] and a ``cap``: scores are logits + bias, and c * tanh(scores / c) with a cap c.
MakeLogits = Callable[[Tensor, Tensor, Tensor | None, float | None], Logits]


class PlainLogits:
    """By PyTorch's operators, see :data:`MakeLogits`."""

    def __init__(self, logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None) -> None:
        self._logits, self._cap = logits, cap
        scores = logits.to(lse_dtype(logits))
        if bias is not None:
            scores += bias
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        self._own = targets.clamp(0, logits.shape[1] - 1)
        self._hit = (self._own == targets).to(scores.dtype)
        self.score = scores.gather(1, self._own) * self._hit
        first = scores[:, :1].clone()
        # Where they are: what it reads of a row it has read before it writes.
        self._log = torch.ops.aten._log_softmax.out(scores, 1, False, out=scores)
        self.lse = first - self._log[:, :1]

    def gradient(self, lse: Tensor) -> Tensor:
        """See :class:`Logits`."""
        log, cap = self._log, self._cap
        if lse is not self.lse:
            log += self.lse - lse
        own = log.gather(1, self._own).exp_() - self._hit
        if cap is None:
            grad = torch.exp(log, out=self._logits)
            return grad.scatter_(1, self._own, own.to(grad.dtype))
        grad = log.exp().scatter_(1, self._own, own)
        slope = log.add_(lse).div_(cap).square_().neg_().add_(1)
        return torch.mul(grad, slope, out=self._logits)


class FusedLogits:
    """By the kernel, see :data:`MakeLogits`."""

    def __init__(self, logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None) -> None:
        self._given = logits, targets, bias, cap
        self.lse, self.score = _row_sums(logits, targets, bias, cap)

    def gradient(self, lse: Tensor) -> Tensor:
        """See :class:`Logits`."""
        _row_gradients(*self._given, lse)
        return self._given[0]


@torch.library.custom_op("fft::row_sums", mutates_args=())
def _row_sums(logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None) -> tuple[Tensor, Tensor]:
    from fft.ops import logits_kernel

    lse, score = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
    logits_kernel.row_sums(logits, targets, bias, cap, lse, score)
    return lse, score


@_row_sums.register_fake
def _(logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None) -> tuple[Tensor, Tensor]:
    lse, score = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
    return lse, score


@torch.library.custom_op("fft::row_gradients", mutates_args=("logits",))
def _row_gradients(logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None, lse: Tensor) -> None:
    from fft.ops import logits_kernel

    logits_kernel.row_gradients(logits, targets, bias, cap, lse)


@_row_gradients.register_fake
def _(logits: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None, lse: Tensor) -> None:
    """Nothing is returned."""


@lru_cache(maxsize=16)
def choose_logits(device: torch.device, dtype: torch.dtype) -> MakeLogits:
    """The kernel for half types where ``device`` has it, and it is right; operators else. A wrong one is warned of.

    Raises :class:`UserError` where a device's operators are wrong, too: one of them writes over what it reads.
    """
    if device.type == "cuda" and dtype.itemsize == 2 and find_spec("triton"):
        wrong = _wrong(FusedLogits, device, dtype)
        if not wrong:
            return FusedLogits
        warnings.warn(f"passed over: the kernel of the loss on {device} {wrong}", stacklevel=2)
    if device.type != "cpu" and (wrong := _wrong(PlainLogits, device, dtype)):
        raise UserError(
            f"the loss on {device} in {str(dtype).removeprefix('torch.')} {wrong}; install a torch for this device and "
            "driver, or choose another --dtype."
        )
    return PlainLogits


def _wrong(made: MakeLogits, device: torch.device, dtype: torch.dtype) -> str:
    return disagreement(results(made, device, dtype), dtype, "fails", "differs from its formula")


def results(made: MakeLogits, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each result's name, that of ``made``, and that of the formula in float64; with and without bias and cap."""
    generator = torch.Generator().manual_seed(0)
    logits, bias = (torch.randn(shape, generator=generator).mul_(3).to(dtype) for shape in ((9, 5003), (5003,)))
    targets = torch.tensor([0, 5002, 17, 4096, 1, 5003, -1, 99_999, 2500])[:, None]  # some are another rank's
    inside = (targets >= 0) & (targets < 5003)
    for shift, cap in ((None, None), (bias, None), (bias, 5.0)):
        scores = logits.double() if shift is None else logits.double() + shift.double()
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        lse, own = scores.logsumexp(1, keepdim=True), targets.clamp(0, 5002)
        # As if other ranks had as much again in all: a part of the whole softmax.
        grad = (scores - lse).exp() / 2 - torch.zeros_like(scores).scatter_(1, own, inside.double())
        grad = grad if cap is None else grad * (1 - (scores / cap) ** 2)
        given = logits.to(device, copy=True), targets.to(device), None if shift is None else shift.to(device), cap
        ours = made(*given)
        yield "log-sum-exp", ours.lse, lse
        yield "score", ours.score, scores.gather(1, own) * inside
        yield "gradient", ours.gradient(ours.lse + torch.tensor(2.0).log().to(device)), grad
