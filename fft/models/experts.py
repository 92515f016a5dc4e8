"""Mixture of experts: the loss that keeps the router from favouring a few of them (Switch, arXiv:2101.03961, eq. 4-6).

For a layer and the tokens of one micro-batch it is ``experts * sum(f * P)``: f is how often an expert was chosen, per
token, P the mean of its probability. The mean over layers, micro-batches and replicas, times the config's
``router_aux_loss_coef``, is added to the training loss by its gradient alone: layers of every pipeline stage have a
part in it, and only hidden states travel. Statistics of a micro-batch, rather than of the layers' tokens together as in
transformers, let every stage do so without asking another.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig


class LoadBalance:
    """The balance losses of this rank's layers, and the weight with which their gradients count.

    Before a step, :meth:`start` says how many micro-batches it has; afterwards ``total`` and ``count`` are the sum and
    the number of the losses. ``sequence`` is the group of ranks that share a row's tokens, if they do.
    """

    def __init__(self, config: PretrainedConfig, layers: int, sequence: dist.ProcessGroup | None = None) -> None:
        self.experts, self._coefficient, self._layers = config.num_experts, config.router_aux_loss_coef, layers
        self.sequence = sequence
        self.start(1)

    def start(self, micro_batches: int, loss_scale: float = 1.0) -> None:
        """Begin a step. ``loss_scale`` is what the optimizer will divide gradients by."""
        # DeepSpeed averages over its data axis; of that, the shares of a row are to be added up.
        shares = dist.get_world_size(self.sequence) if self.sequence is not None else 1
        self.weight = self._coefficient * loss_scale * shares / (micro_batches * self._layers)
        self.total: Tensor | float = 0.0
        self.count = 0

    def attach(self, hidden: Tensor, logits: Tensor, chosen: Tensor, real: tuple[int, int]) -> Tensor:
        """Return ``hidden``; its backward adds the gradient of this layer's loss.

        ``logits`` [tokens, experts] and ``chosen`` [tokens, top k] are the router's. Only the first ``real`` tokens of
        this rank, and of the whole row, count.
        """
        own, tokens = real
        loss = balance_loss(logits[:own], chosen[:own], tokens, self.sequence)
        self.total, self.count = self.total + loss.detach(), self.count + 1
        return _WithLoss.apply(hidden, loss, self.weight) if torch.is_grad_enabled() else hidden


def balance_loss(logits: Tensor, chosen: Tensor, tokens: int, sequence: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's share of a layer's balance loss (float32 scalar); shares add up over the ``sequence`` group.

    ``tokens`` are those of all ranks of the group; none at all have the loss 0.
    """
    experts, tokens = logits.shape[-1], max(1, tokens)
    frequency = torch.zeros(experts, dtype=torch.float32, device=logits.device)
    frequency.index_add_(0, chosen.flatten(), frequency.new_ones(chosen.numel()))
    if sequence is not None:
        dist.all_reduce(frequency, group=sequence)
    probability = logits.float().softmax(-1).sum(0) / tokens
    return experts * (frequency / tokens * probability).sum()


def watch_router(layer: nn.Module) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """Have the router of a decoder layer give away its logits and choices; None for a layer without one.

    Call the result after the layer's forward.
    """
    router = getattr(getattr(layer, "mlp", None), "gate", None)
    if not isinstance(router, nn.Module):
        return None
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(_: nn.Module, __: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _weights, chosen = output
        seen.append((logits, chosen))

    router.register_forward_hook(remember)
    return seen.pop


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, grad.new_full((), ctx.weight, dtype=torch.float32), None
