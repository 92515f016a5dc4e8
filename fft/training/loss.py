"""The loss of a step's micro-batches, as DeepSpeed's engine is given it: the mean over trained tokens."""

import torch
from torch import Tensor, nn

from fft.models.causal_lm import StageBuilder
from fft.ops.cross_entropy import HeadSum, Targets, linear_cross_entropy
from fft.training.sums import GradientSums


class TokenMeanLoss:
    """Loss function of the last stage: a sum over tokens times ``scale``.

    With ``scale = data axis * micro_batches / trained tokens of the global batch``, set before every step, DeepSpeed's
    division by its data axis (replicas x sequence) and micro-batches leaves the exact mean over all trained tokens.
    """

    def __init__(self, builder: StageBuilder) -> None:
        self._vocabulary, self.scale = builder.vocabulary, 1.0
        self._sums: GradientSums | None = None
        self._micro_batches, self._checked = 1, False

    def sum_into(self, sums: GradientSums, micro_batches: int) -> None:
        """Add gradients of the head to their sums: backward divides losses by the ``micro_batches`` of a step."""
        self._sums, self._micro_batches = sums, micro_batches

    def __call__(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, Tensor]) -> Tensor:
        """``outputs`` are hidden states [tokens, hidden size], the head's weight, or this rank's part, and its bias;
        ``labels`` what :class:`~fft.ops.cross_entropy.Targets` has.
        """
        hidden, weight, *bias = outputs
        head = self._head(weight)
        loss = linear_cross_entropy(hidden, weight, Targets(*labels), self._vocabulary, *bias, head=head) * self.scale
        if head is not None and not self._checked:
            loss.register_hook(self._check)
        return loss

    def _head(self, weight: Tensor) -> HeadSum | None:
        """The head's sum, where there is one: not for a weight that is itself computed from the one that is trained."""
        parameter = weight._base
        if self._sums is None or not isinstance(parameter, nn.Parameter) or not torch.is_grad_enabled():
            return None
        if not parameter.requires_grad:
            return None
        return HeadSum(*self._sums.of(parameter), factor=self.scale / self._micro_batches)

    def _check(self, grad: Tensor) -> None:
        """Once: a loss multiplied by anything else would leave the head's gradient as it is."""
        self._checked = True
        if abs(float(grad) * self._micro_batches - 1) > 1e-5:
            raise RuntimeError(f"DeepSpeed multiplies losses by {float(grad)}, not by 1 / {self._micro_batches}.")
