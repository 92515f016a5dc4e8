"""AdamW in one pass over memory; and clipping, which ZeRO's optimizers do, for when ZeRO is off."""

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.constants import PIPE_REPLICATED
from torch import Tensor, nn

from fft.arguments import TrainArguments

#: Devices for which PyTorch has a kernel of a whole AdamW step. One operation at a time needs copies of the moments.
FUSED = ("cpu", "cuda")


def make_optimizer(args: TrainArguments, module: PipelineModule, groups: list[dict], stage: int) -> torch.optim.AdamW:
    """What DeepSpeed wraps in ZeRO ``stage`` 1, or uses as it is in stage 0."""
    device = "cpu" if args.offload_optimizer else get_accelerator().device_name()
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "fused": device in FUSED}
    if stage:
        return torch.optim.AdamW(groups, **options)
    return ClippingAdamW(groups, args.max_grad_norm, module.mpu(), **options)


class ClippingAdamW(torch.optim.AdamW):
    """AdamW on whole parameters that first clips their gradients, which are already those of the global batch.

    ``max_norm`` (0: any) bounds their norm over the ranks of ``grid`` that hold one replica together. DeepSpeed would
    clip, too, where ZeRO is off, but keeps the norm to itself and counts tied weights twice.
    """

    def __init__(self, groups: list[dict], max_norm: float, grid: object, **options: object) -> None:
        super().__init__(groups, **options)
        self._max_norm, self._ranks = max_norm, grid.get_model_parallel_group()
        self._first = grid.get_slice_parallel_rank() == 0  # of the ranks that share layers
        #: The norm before clipping, by the name under which DeepSpeed's engine looks for it.
        self._global_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip and step."""
        held = [p for group in self.param_groups for p in group["params"]]
        parameters = [p for p in held if p.grad is not None]  # a frozen stage has none
        norm = nn.utils.get_total_norm([p.grad for p in parameters if self._counts(p)])
        squares = norm.to(held[0].device).square()
        dist.all_reduce(squares, group=self._ranks)
        self._global_grad_norm = squares.sqrt()
        if self._max_norm:
            nn.utils.clip_grads_with_norm_(parameters, self._max_norm, self._global_grad_norm)
        super().step()

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the one that counts a parameter that several ranks have."""
        if getattr(parameter, PIPE_REPLICATED, False):
            return False
        return self._first or getattr(parameter, "model_parallel", False)
