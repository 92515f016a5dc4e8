"""Mixture of experts: the loss that keeps the router from favouring a few of them (Switch, arXiv:2101.03961, eq. 4-6).

Not all are balanced so: DeepSeek-V3 and its kind move a bias of their routers outside of training instead, which
transformers does not do, and neither do we. Where transformers adds a loss, we do.

For a layer and the tokens of one micro-batch it is ``experts * sum(f * P)``: f is how often an expert was chosen, per
token, P the mean of its probability. The mean over layers, micro-batches and replicas, times the config's
``router_aux_loss_coef``, is added to the training loss by its gradient alone: layers of every pipeline stage have a
part in it, and only hidden states travel. Statistics of a micro-batch, rather than of the layers' tokens together as in
transformers, let every stage do so without asking another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from fft.models.vision import PARTS

#: What models, or configs of decoders, call the number of experts, that of a token's, and the weight of the loss.
_SIZES = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")


@dataclass(frozen=True)
class Routing:
    """The routers of a model whose loss keeps experts in balance: modules of the class ``router`` of which output
    ``output`` is the logits of ``experts``, the ``chosen`` largest of them a token's; ``layers`` have one.
    ``coefficient`` multiplies the loss.
    """

    router: type[nn.Module]
    output: int
    experts: int
    chosen: int
    coefficient: float
    layers: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Routing | None":
        """As transformers records what it adds to the loss of ``model``; None where it adds nothing."""
        recorded = (model._can_record_outputs or {}).get("router_logits")
        says: dict[str, Any] = vars(model)
        if model.config.model_type in PARTS:  # which ask the decoder's config
            text = model.config.get_text_config()
            says = {name: getattr(text, name, None) for name in _SIZES}
        if recorded is None or says.get("router_aux_loss_coef") is None:
            return None
        layers = sum(isinstance(module, recorded.target_class) for module in model.modules())
        sizes = says["num_experts"], says["num_experts_per_tok"], says["router_aux_loss_coef"]
        return cls(recorded.target_class, recorded.index, *sizes, layers) if layers else None

    def watch(self, layer: nn.Module) -> Callable[[], Tensor] | None:
        """Have the router of a decoder layer give away its logits [tokens, experts]; None for a layer without one.

        Call the result after the layer's forward.
        """
        routers: list[Any] = [module for module in layer.modules() if isinstance(module, self.router)]
        if not routers:
            return None
        router = routers[0]
        # No hook: those have numbers of their own, and a compiler would make another graph for each layer.
        router.logits_output, router.forward = self.output, MethodType(_noting, router)

        def taken() -> Tensor:
            logits, router.noted = router.noted, None
            return logits.reshape(-1, logits.shape[-1])

        return taken


def _noting(router: Any, *args: Any, **kwargs: Any) -> Any:
    """A router's forward, whose logits are noted."""
    output = type(router).forward(router, *args, **kwargs)
    router.noted = output[router.logits_output] if isinstance(output, tuple) else output
    return output


class LoadBalance:
    """The balance losses of this rank's layers, and the weight with which their gradients count.

    Before a step, :meth:`start` says how many micro-batches it has; afterwards ``total`` and ``count`` are the sum and
    the number of the losses. ``sequence`` is the group of ranks that share a row's tokens, if they do.
    """

    def __init__(self, routing: Routing, sequence: dist.ProcessGroup | None = None) -> None:
        self.routing, self.sequence = routing, sequence
        self.start(1)

    def start(self, micro_batches: int, loss_scale: float = 1.0) -> None:
        """Begin a step. ``loss_scale`` is what the optimizer will divide gradients by."""
        # DeepSpeed averages over its data axis; of that, the shares of a row are to be added up.
        shares = dist.get_world_size(self.sequence) if self.sequence is not None else 1
        self.weight = self.routing.coefficient * loss_scale * shares / (micro_batches * self.routing.layers)
        self.total: Tensor | float = 0.0
        self.count = 0

    def attach(self, hidden: Tensor, logits: Tensor, real: tuple[int, int]) -> Tensor:
        """Return ``hidden``; its backward adds the gradient of this layer's loss.

        ``logits`` [tokens, experts] are the router's. Only the first ``real`` tokens of this rank, and of the whole
        row, count.
        """
        own, tokens = real
        loss = balance_loss(logits[:own], self.routing.chosen, tokens, self.sequence)
        self.total, self.count = self.total + loss.detach(), self.count + 1
        return _WithLoss.apply(hidden, loss, self.weight) if torch.is_grad_enabled() else hidden


def balance_loss(logits: Tensor, chosen: int, tokens: int, sequence: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's share of a layer's balance loss (float32 scalar); shares add up over the ``sequence`` group.

    The ``chosen`` largest logits of a token count as its experts. ``tokens`` are those of all ranks of the group; none
    at all have the loss 0.
    """
    experts, tokens = logits.shape[-1], max(1, tokens)
    probabilities = logits.float().softmax(-1)
    chosen_experts = probabilities.topk(chosen, dim=-1).indices
    frequency = torch.zeros(experts, dtype=torch.float32, device=logits.device)
    frequency.index_add_(0, chosen_experts.flatten(), frequency.new_ones(chosen_experts.numel()))
    if sequence is not None:
        dist.all_reduce(frequency, group=sequence)
    probability = probabilities.sum(0) / tokens
    return experts * (frequency / tokens * probability).sum()


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, grad.new_full((), ctx.weight, dtype=torch.float32), None
