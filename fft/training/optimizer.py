"""AdamW in one pass over memory, which clips, too; and the norm, which ZeRO's optimizers find, for when ZeRO is off."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fft.arguments import TrainArguments

#: Devices for which PyTorch has a kernel of a whole AdamW step. One operation at a time needs copies of the moments.
FUSED = ("cpu", "cuda")


@dataclass(frozen=True)
class Holders:
    """The ranks that hold one replica of the model together.

    ``counts`` says whether this rank is the one that counts a parameter that several of them have. ``experts`` are the
    ranks that have some experts each, where these are trained.
    """

    ranks: dist.ProcessGroup
    counts: Callable[[nn.Parameter], bool]
    experts: dist.ProcessGroup | None = None


def mark_experts(parameters: Iterable[nn.Parameter], name: str) -> None:
    """Say of experts' parameters, which ranks share out, in which group of ranks, as DeepSpeed asks for it."""
    for parameter in parameters:
        parameter.allreduce, parameter.group_name = False, name  # pyrefly: ignore[missing-attribute] - its own marks


def of_experts(parameter: nn.Parameter) -> bool:
    """Whether ranks share a parameter out, see :func:`mark_experts`."""
    return not getattr(parameter, "allreduce", True)


def parameter_groups(module: nn.Module, weight_decay: float, experts: str | None = None) -> list[dict]:
    """Matrices decay, vectors (norms, biases) do not; experts that ranks share out, marked ``experts``, are one more.

    DeepSpeed sums the gradients' norm over the stages group by group, so a stage that lacked one (the head alone has no
    vectors) would leave the others waiting for ever: it gets a parameter that nothing uses.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    spread = [p for p in parameters if of_experts(p)]
    kinds = [
        ("unused_matrix", weight_decay, [p for p in parameters if p.ndim >= 2 and not of_experts(p)]),
        ("unused_vector", 0.0, [p for p in parameters if p.ndim < 2]),
    ]
    groups: list[dict] = []
    for name, decay, chosen in [*kinds, ("unused_expert", weight_decay, spread)] if experts else kinds:
        if not chosen:
            module.register_parameter(name, nn.Parameter(next(module.parameters()).new_zeros(1)))
            chosen = [module.get_parameter(name)]
        groups.append({"params": chosen, "weight_decay": decay})
    if experts:
        mark_experts(groups[-1]["params"], experts)
        groups[-1] |= {"moe": True, "name": experts}
    return groups


def make_optimizer(
    args: TrainArguments, groups: list[dict], device: str, holders: Holders | None = None
) -> "OnePassAdamW":
    """AdamW of ``groups``, see :func:`parameter_groups`, on a type of device; with ``holders`` for when ZeRO is off."""
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "fused": device in FUSED}
    if holders is None:
        return OnePassAdamW(groups, args.max_grad_norm, **options)
    return ClippingAdamW(groups, args.max_grad_norm, holders, **options)


class OnePassAdamW(torch.optim.AdamW):
    """AdamW that bounds the gradients' norm by ``max_norm`` (0: any) as it reads them, if it is told what that is."""

    def __init__(self, groups: list[dict], max_norm: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self._max_norm = max_norm
        #: Gives the norm as it is when the step is taken. None where somebody else has clipped.
        self.norm: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip and step."""
        if self.norm is not None and self._max_norm:
            self._clip(self.norm())
        super().step()

    def _clip(self, norm: Tensor) -> None:
        divisor = ((norm + 1e-6) / self._max_norm).clamp(min=1)
        if self.defaults["fused"]:
            self.grad_scale = divisor  # by the name under which PyTorch's kernel is given it
            return
        held = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(held, divisor)


class ClippingAdamW(OnePassAdamW):
    """AdamW on whole parameters, whose gradients are already those of the global batch.

    The norm is that over the ranks of ``holders``. DeepSpeed would clip, too, where ZeRO is off, but keeps the norm to
    itself and counts tied weights twice. A step whose norm is not finite changes nothing, as with DeepSpeed's
    optimizers: clipped by it, gradients would be zero or NaN.
    """

    def __init__(self, groups: list[dict], max_norm: float, holders: Holders, **options: Any) -> None:
        super().__init__(groups, max_norm, **options)
        self._holders = holders
        #: The norm before clipping, by the name under which DeepSpeed's engine looks for it.
        self._global_grad_norm: Tensor | None = None
        #: Whether the last step was skipped, by the name under which DeepSpeed's engine looks for it.
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip and step, or skip the step. Collective over the holders."""
        held = [p for group in self.param_groups for p in group["params"]]
        parameters = [p for p in held if p.grad is not None]  # a frozen stage has none
        counted, device = [p for p in parameters if self._holders.counts(p)], held[0].device
        squares = _squares([p for p in counted if not of_experts(p)], device)
        if self._holders.experts is not None:
            own = _squares([p for p in counted if of_experts(p)], device)
            dist.all_reduce(own, group=self._holders.experts)
            squares += own
        dist.all_reduce(squares, group=self._holders.ranks)
        norm = self._global_grad_norm = squares.sqrt()
        self.overflow = not bool(norm.isfinite())
        if self.overflow:
            norm.fill_(math.inf)  # also for NaN, as theirs
            return
        self.norm = lambda: norm
        super().step()


def _squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Of the norm of gradients."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).to(device).square()
