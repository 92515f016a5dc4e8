"""Tensor parallelism over plain local tensors (Megatron-LM, arXiv:1909.08053), by the plan that a model publishes.

transformers' own modules run unchanged on their part of the weights. A hook where the region of parts begins passes
activations on and sums their gradients over the ranks; one where it ends sums activations and passes gradients on.
Between layers every rank has the same hidden states.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fft.parallel.groups import own_group
from fft.parallel.mesh import MeshSizes
from fft.parallel.tensor_plan import LENGTHS, Shard, style_of

#: What experts that have biases call that behind their last product.
_LAST_BIAS = "down_proj_bias"


class TensorParallel:
    """The ranks that share this rank's parameters. Collective: every rank of the world creates it.

    Where there are fewer key/value heads than ranks, several neighbours hold the same head: ``copies`` is their group.
    """

    def __init__(self, mesh: MeshSizes, kv_heads: int) -> None:
        self.size = mesh.tensor
        self.rank = dist.get_rank() % mesh.tensor
        groups, number = mesh.tensor_groups(), max(1, mesh.tensor // kv_heads)
        self.group: dist.ProcessGroup | None = own_group(groups)
        sharing = [group[i : i + number] for group in groups for i in range(0, mesh.tensor, number)]
        self.copies: dist.ProcessGroup | None = own_group(sharing) if number > 1 else None

    def all_reduce(
        self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Reduce in place, over all that share the parameters or over a group of them; returns ``x``. Collective."""
        dist.all_reduce(x, op, group=group or self.group)
        return x

    def enter(self, x: Tensor) -> Tensor:
        """Where what every rank has is used by parts: returns ``x``; gradients are summed. Collective in backward."""
        return _Enter.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        """Where parts of a sum become the sum on every rank: returns it, shaped as ``x``. Collective in forward."""
        return _Leave.apply(x, self)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return ctx.ranks.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorParallel) -> Tensor:
        return ranks.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad, None


def parallelise(
    layer: nn.Module, path: str, plan: Mapping[str, str], shards: Mapping[str, Shard], ranks: TensorParallel
) -> None:
    """Let a layer whose parameters are parts compute what the whole layer would.

    ``path`` is the layer's name relative to the decoder, ``shards`` what this rank holds, by names within the layer.
    """
    regions: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        style = style_of(f"{path}.{name}", plan)
        if style in ("colwise", "packed_colwise"):
            # One sum for all that a block's input goes into: q, k and v, or gate and up.
            block = name.rpartition(".")[0]
            regions[block] = layer.get_submodule(block)
        elif style == "moe_tp_experts":
            regions[name] = module
            _sum_up_experts(module, ranks, shards.get(f"{name}.{_LAST_BIAS}"))
        elif style == "rowwise":
            _sum_up(module, ranks)
            if (lengths := module._parameters.get(LENGTHS)) is not None:  # each rank multiplies its part by them
                lengths.register_hook(lambda grad: ranks.all_reduce(grad.clone()))
        elif style == "replicated_with_grad_allreduce":
            # Whole on every rank, but used for its part of the heads.
            for parameter in filter(_is_trained, module.parameters()):
                parameter.register_hook(lambda grad: ranks.all_reduce(grad.clone()))
    for region in regions.values():
        region.register_forward_pre_hook(lambda _, args, kwargs: _enter_all(ranks, args, kwargs), with_kwargs=True)
    for name, parameter in layer.named_parameters():
        mark(parameter, shards.get(name), ranks)


def _sum_up(module: nn.Module, ranks: TensorParallel) -> None:
    """Make the sum over ranks of what parts of a linear layer give; its bias, whole on every rank, is added once."""
    kind = type(module)
    if module._parameters.get("bias") is None:
        module.register_forward_hook(lambda _, __, output: ranks.leave(output))
        return

    def forward(hidden: Tensor) -> Tensor:
        bias = module.get_parameter("bias")
        module._parameters["bias"] = None
        try:
            part = kind.forward(module, hidden)
        finally:
            module._parameters["bias"] = bias
        return ranks.leave(part) + bias

    module.forward = forward


def _sum_up_experts(module: nn.Module, ranks: TensorParallel, shard: Shard | None) -> None:
    """The same of experts. Of the bias behind their last product a rank adds the columns that ``shard`` says it has."""
    module.register_forward_hook(lambda _, __, output: ranks.leave(output))
    if shard is None:
        return
    kind, parameters = type(module), cast(dict[str, Tensor | None], module._parameters)
    ((start, stop),) = shard.spans

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        bias = module.get_parameter(_LAST_BIAS)
        parameters[_LAST_BIAS] = nn.functional.pad(bias, (start, shard.shape[-1] - stop))
        try:
            return kind.forward(module, *args, **kwargs)
        finally:
            parameters[_LAST_BIAS] = bias

    module.forward = forward


def mark(parameter: nn.Parameter, shard: Shard | None, ranks: TensorParallel) -> None:
    """Have a part count once in DeepSpeed's gradient norm; copies of a part sum their gradients."""
    # DeepSpeed counts what is marked on every rank, and all else on the first rank of a group. The mark is its own.
    parameter.model_parallel = shard is not None and shard.copy == 0  # pyrefly: ignore[missing-attribute]
    if shard is not None and shard.copies > 1 and _is_trained(parameter):
        parameter.register_hook(lambda grad: ranks.all_reduce(grad.clone(), group=ranks.copies))


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _enter_all(ranks: TensorParallel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def enter(x: object) -> object:
        return ranks.enter(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(enter, args)), {name: enter(x) for name, x in kwargs.items()}
