"""The loss of a step's micro-batches, as DeepSpeed's engine is given it: the mean over trained tokens, or pairs."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fft.models.causal_lm import StageBuilder
from fft.ops.cross_entropy import HeadSum, Targets, linear_cross_entropy, token_log_probs
from fft.training.preference import Preference, measures_of
from fft.training.sums import GradientSums


class MeanLoss(Protocol):
    """Loss function of the last stage: a sum, of which a step's ``scale`` makes DeepSpeed's engine the mean."""

    scale: float
    #: Takes the losses of a micro-batch's documents, or pairs, while there is a list.
    recorded_losses: list[Tensor] | None

    def sum_into(self, sums: GradientSums, micro_batches: int) -> None:
        """Where gradients are summed, and over how many micro-batches."""

    def __call__(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        """Of a micro-batch, for what the last layer gives and what :class:`fft.training.inputs.Sender` sends."""
        ...


class TokenMeanLoss:
    """Loss function of the last stage: a sum over tokens times ``scale``.

    With ``scale = data axis * micro_batches / trained tokens of the global batch``, set before every step, DeepSpeed's
    division by its data axis (replicas x sequence) and micro-batches leaves the exact mean over all trained tokens.
    """

    def __init__(self, builder: StageBuilder) -> None:
        self._vocabulary, self.scale = builder.vocabulary, 1.0
        self._sums: GradientSums | None = None
        self._micro_batches, self._checked = 1, False
        self.recorded_losses: list[Tensor] | None = None

    def sum_into(self, sums: GradientSums, micro_batches: int) -> None:
        """Add gradients of the head to their sums: backward divides losses by the ``micro_batches`` of a step."""
        self._sums, self._micro_batches = sums, micro_batches

    def __call__(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        """``outputs`` are hidden states [tokens, hidden size], the head's weight, or this rank's part, and its bias;
        ``labels`` what :class:`~fft.ops.cross_entropy.Targets` has, and, where losses of documents are recorded, how
        many of these each has, int64 [documents].
        """
        (hidden, weight, *bias), (positions, ids, *own) = outputs, labels
        targets = Targets(positions, ids)
        head, each = self._head(weight), []
        found = linear_cross_entropy(hidden, weight, targets, self._vocabulary, *bias, head=head, each=each)
        loss = found * self.scale
        if self.recorded_losses is not None:
            self.recorded_losses.append(_sums(each[0], *own))
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


class PairMeanLoss:
    """Loss function of the last stage for preferences: a sum over pairs times ``scale``, see :class:`TokenMeanLoss`,
    which has it of tokens.

    What the ranks that share a row's tokens have of each document is added up, and each has its share of the loss.
    Collective over these, and over those that share the vocabulary.
    """

    def __init__(self, builder: StageBuilder, preference: Preference) -> None:
        self._vocabulary, self._preference, self.scale = builder.vocabulary, preference, 1.0
        self._row = None if builder.ranks.sequence is None else builder.ranks.sequence.group
        self._measured: list[Tensor] = []
        self.recorded_losses: list[Tensor] | None = None
        #: Takes the log-probabilities of a micro-batch's documents, in place of measures, while there is a list.
        self.recorded: list[Tensor] | None = None

    def sum_into(self, sums: GradientSums, micro_batches: int) -> None:
        """Nothing: what gradients of the head are multiplied by is known in backward alone, which makes them."""

    def __call__(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        """``outputs`` as of :class:`TokenMeanLoss`; ``labels`` are positions and ids of targets, how many targets this
        rank has of each document, int64 [documents], and the documents' reference log-probabilities [documents].
        """
        (hidden, weight, *bias), (positions, ids, own, reference) = outputs, labels
        found = token_log_probs(hidden, weight, Targets(positions, ids), self._vocabulary, *bias)
        policy, tokens, ranks = _sums(found, own), own, 1
        if self._row is not None:
            ranks = dist.get_world_size(self._row)
            policy, tokens = _Sum.apply(policy, self._row), own.clone()
            dist.all_reduce(tokens, group=self._row)
        if self.recorded is not None:
            self.recorded.append(policy.detach())
        losses, rewards = self._preference.losses(*(x.view(-1, 2) for x in (policy, reference, tokens)))
        if self.recorded is None:
            self._measured.append(measures_of(rewards))
        if self.recorded_losses is not None:
            self.recorded_losses.append(losses.detach() / ranks)
        return losses.sum() * (self.scale / ranks)

    def take_measures(self) -> Tensor:
        """The sums of :func:`measures_of` over the micro-batches since it was last called."""
        taken, self._measured = self._measured, []
        return torch.stack(taken).sum(0) if taken else torch.zeros(5, dtype=torch.float64)


def _sums(values: Tensor, counts: Tensor) -> Tensor:
    """The sum of each of so many stretches [counts] of ``values``, in an order that is always the same."""
    if not len(counts):  # of no pairs, whose gradients are zero, and still wanted
        return values.new_zeros(0) + values.sum()
    return torch.segment_reduce(values, "sum", lengths=counts, initial=0, unsafe=True)  # checks wait for the device


class _Sum(torch.autograd.Function):
    """The sum over a group's ranks, all of which go on with it alike: their gradients are equal, and add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks, total = dist.get_world_size(group), x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad * ctx.ranks, None
