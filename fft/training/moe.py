"""What DeepSpeed is told of experts that are spread over ranks, so that it sums their gradients, and theirs alone, over
the ranks that have the same ones.

It knows such parameters by marks (``allreduce``, ``group_name``), groups of the optimizer by ``moe``, process groups by
a name in its own tables, and a model by a module of its class ``MoE``. See docs/deepspeed.md.
"""

from collections.abc import Iterable

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.utils import groups
from torch import Tensor, nn

from fft.models.causal_lm import StageBuilder
from fft.models.layers import canonical_parameters
from fft.parallel.expert import ExpertParallel
from fft.parallel.role import StageRole
from fft.training.optimizer import Holders, mark_experts


class _HasExperts(MoE):
    """By which DeepSpeed's engine finds that there are experts. It has none itself, and computes nothing."""

    def __init__(self, experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts

    def set_deepspeed_parallelism(self, *_: object) -> None:
        """The groups are there already."""


def announce_experts(module: nn.Module, builder: StageBuilder) -> str | None:
    """Mark what of a stage's parameters are experts that ranks share out; returns the mark.

    None where there are none, and where all of the model's experts are frozen: then there is nothing to sum up.
    """
    ranks, spec = builder.ranks.expert, builder.spec
    if ranks is None:
        return None
    name = f"ep_size_{ranks.size}"  # whose last number DeepSpeed reads
    groups._EXPERT_PARALLEL_GROUP[name] = ranks.group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = ranks.replicas
    mark_experts((p for path, p in canonical_parameters(module).items() if path in spec.experts), name)
    if not any(p.requires_grad for path, p in spec.skeleton.named_parameters() if path in spec.experts):
        return None
    module.add_module("has_experts", _HasExperts(ranks.size))
    return name


def holders_of(module: deepspeed.pipe.PipelineModule, role: StageRole, experts: ExpertParallel | None) -> Holders:
    """The ranks that hold one replica of a pipeline's model together; ``experts`` are those that share experts."""

    def counts(parameter: nn.Parameter) -> bool:
        if getattr(parameter, PIPE_REPLICATED, False):
            return False
        return role.leads or getattr(parameter, "model_parallel", False)

    return Holders(module.mpu().get_model_parallel_group(), counts, None if experts is None else experts.group)


def count_experts_once(optimizer: deepspeed.runtime.bf16_optimizer.BF16_Optimizer, holders: Holders) -> None:
    """Have the norm of DeepSpeed's optimizer for bf16 count each expert once.

    Its own would wait for ever for a stage that has no experts, and leaves out other tensor-parallel ranks' parts of
    them. What the ranks of a group have together goes in as a number of the stage's own.
    """
    given = optimizer.get_grads_for_norm

    def grads_for_norm(for_clipping: bool = False) -> list[Tensor] | tuple[list[Tensor], dict]:
        if for_clipping:
            return given(for_clipping)
        dense, _ = given()
        kept = zip(
            optimizer.bf16_groups, optimizer.fp32_groups_gradients, optimizer.optimizer.param_groups, strict=True
        )
        own = [
            gradient.detach()
            for parameters, gradients, group in kept
            if group.get("moe")
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if holders.counts(parameter)
        ]
        return [*dense, _norm_together(own, holders.experts)], {}

    optimizer.get_grads_for_norm = grads_for_norm


def _norm_together(tensors: Iterable[Tensor], ranks: dist.ProcessGroup | None) -> Tensor:
    """The norm of what all ranks of a group have, [1]. Collective."""
    norm = nn.utils.get_total_norm(list(tensors)).to(deepspeed.get_accelerator().current_device_name())
    squares = torch.square(norm).view(1)
    dist.all_reduce(squares, group=ranks)
    return squares.sqrt()
