"""Where gradients are summed over micro-batches, in fp32, and how some get there in one pass: without being made first.

Autograd makes a gradient, and then it is added to what there is. The head's is added to its sum by the very product
that makes it (:class:`fft.ops.cross_entropy.HeadSum`); of an embedding only the rows are added that were looked up.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fft.parallel.groups import trade

#: Devices on which rows are known to be added in the same order every time, see :func:`add_rows`.
_ORDERED = ("cpu", "cuda")
#: Elements of a part that are added up at a time, from every rank.
_CHUNK = 1 << 22


class SumPlace(NamedTuple):
    """A parameter's sum, of its shape; what is in it does not count if it is ``empty``."""

    total: Tensor
    empty: bool = False


class GradientSums(Protocol):
    """Where the sums of a stage's trained parameters are."""

    def of(self, parameter: nn.Parameter) -> SumPlace:
        """That of a parameter, which is then taken to have a gradient."""
        ...


class OwnSums:
    """Of parameters in fp32 without ZeRO: their own gradients."""

    def of(self, parameter: nn.Parameter) -> SumPlace:
        """See :class:`GradientSums`."""
        if parameter.grad is not None:
            return SumPlace(parameter.grad)
        parameter.grad = torch.empty_like(parameter)
        return SumPlace(parameter.grad, empty=True)


class Bf16Optimizer(Protocol):
    """DeepSpeed's: groups of parameters, their flat sums, and whether these have a gradient."""

    bf16_groups: list[list[nn.Parameter]]
    fp32_groups_gradients: list[list[Tensor]]
    fp32_groups_has_gradients: list[list[bool]]
    fp32_groups_gradients_flat: list[Tensor]
    fp32_groups_gradient_flat_partition: list[Tensor]
    dp_process_group: dist.ProcessGroup
    zero_grad: Callable[..., None]
    get_grads_for_norm: Callable[..., Any]
    _update_hp_grad: Callable[..., None]


class Bf16Sums:
    """Of DeepSpeed's optimizer for bf16, which then adds its own gradients in one pass, too.

    It would make an fp32 copy of each first, zero all sums twice a step, as it ends and then once more, and launch
    operators for the norm of each. It is not referred to: it goes when its engine does.
    """

    def __init__(self, optimizer: Bf16Optimizer) -> None:
        self._sums, self._have = optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients
        self._index = {id(p): (i, j) for i, group in enumerate(optimizer.bf16_groups) for j, p in enumerate(group)}
        optimizer._update_hp_grad = self._update
        optimizer.zero_grad = _leave
        optimizer.get_grads_for_norm = partial(_norms, weakref.proxy(optimizer), type(optimizer).get_grads_for_norm)

    def of(self, parameter: nn.Parameter) -> SumPlace:
        """See :class:`GradientSums`."""
        group, index = self._index[id(parameter)]
        total = self._sums[group][index]
        self._have[group][index] = True
        parameter._hp_grad = total  # pyrefly: ignore[missing-attribute] - where the engine looks for tied weights'
        return SumPlace(total.view(parameter.shape))

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter, *_: object, **__: object) -> None:
        """Add the gradient that backward has made."""
        if parameter.grad is not None:
            self.of(parameter).total.add_(parameter.grad)


def _leave(*_: object, **__: object) -> None:
    """Zero nothing: sums are zero after a step, and gradients are gone as soon as they are added."""


def _norms(optimizer: Bf16Optimizer, given: Callable[..., Any], for_clipping: bool = False) -> Any:
    """In place of the dense gradients, whose norm is asked for, their norms: those have the same."""
    if for_clipping:
        return given(optimizer, for_clipping)
    dense, experts = given(optimizer)
    return [torch.stack(torch._foreach_norm(dense))] if dense else dense, experts


def reduce_to_owners(optimizer: Bf16Optimizer) -> None:
    """Average gradients over replicas, each part on the rank alone that takes its step, and the norm over all parts.

    Half of what an all-reduce moves, of which DeepSpeed's optimizer uses this rank's part, and the norm. Collective.
    """
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13
    group = optimizer.dp_process_group
    if dist.get_backend(group) == "gloo":
        reduce = add_to_owners
    for sums, own in zip(
        optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition, strict=True
    ):
        reduce(own, sums, group=group)
        own.mul_(1.0 / dist.get_world_size(group))


def add_to_owners(own: Tensor, sums: Tensor, group: dist.ProcessGroup) -> None:
    """Add up ``sums`` [ranks x n] of all ranks of a group, each rank the part of it that is its ``own`` [n].

    gloo's own reduce-scatter sends what an all-reduce does, twice as much. Collective.
    """
    parts = sums.view(dist.get_world_size(group), -1)
    for start in range(0, own.numel(), _CHUNK):
        sent = parts[:, start : start + _CHUNK]
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        trade([*sent], [*received], group)
        torch.sum(received, 0, out=own[start : start + _CHUNK])


class ZeroOptimizer(Protocol):
    """DeepSpeed's for all types but bf16, which reduces gradients by buckets as backward makes them."""

    dp_process_group: dist.ProcessGroup
    allreduce_and_scatter: Callable[..., None]
    _add_to_grad_partition_buffer: Callable[[Tensor | None, Tensor], None]


def scatter_to_owners(
    optimizer: ZeroOptimizer,
    bucket: Sequence[tuple[frozenset[int], Tensor, Tensor | None]],
    communication_data_type: torch.dtype,
    process_group: dist.ProcessGroup,
    **_: object,
) -> None:
    """In place of an all-reduce of a bucket: each of its slices is added up on the rank that owns it, and left there.

    ``bucket`` has the owner of each slice, the slice, and where its sum goes besides. Collective.
    """
    slices: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in range(dist.get_world_size(process_group))]
    for (owner,), part, output in bucket:
        slices[owner].append((part, output))
    sent = torch.cat([part for owned in slices for part, _ in owned]).to(communication_data_type)
    sizes, own = [sum(part.numel() for part, _ in owned) for owned in slices], slices[dist.get_rank(process_group)]
    received = sent.new_empty(len(sizes), sizes[dist.get_rank(process_group)])
    trade(sent.split(sizes), [*received], process_group)
    total = received.float().sum(0)
    for (part, output), summed in zip(own, total.split([part.numel() for part, _ in own]), strict=True):
        part.copy_(summed)
        optimizer._add_to_grad_partition_buffer(output, part)


def _norm_of_parts(optimizer: Bf16Optimizer, given: Callable[..., Any], for_clipping: bool = False) -> Any:
    """As :func:`_norms`, where every rank of the replicas has a part of the gradients. Collective."""
    if for_clipping:
        return given(optimizer, for_clipping)
    dense, experts = given(optimizer)
    if not dense:
        return dense, experts
    owned = [_within(own, x) for own in optimizer.fp32_groups_gradient_flat_partition for x in dense]
    norms = torch._foreach_norm([x for x in owned if x is not None])
    squares = torch.stack(norms).square().sum() if norms else dense[0].new_zeros(())
    dist.all_reduce(squares, group=optimizer.dp_process_group)
    return [squares.sqrt().view(1)], experts


def _within(part: Tensor, tensor: Tensor) -> Tensor | None:
    """What of a flat ``tensor`` lies in ``part`` of the same memory; None for nothing."""
    if part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return None
    start, stop = part.storage_offset(), part.storage_offset() + part.numel()
    first, last = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
    a, b = max(start, first), min(stop, last)
    return part[a - start : b - start] if a < b else None


class PipelineEngine(Protocol):
    """DeepSpeed's."""

    optimizer: Any
    using_bf16_optimizer: bool
    has_moe_layers: bool
    zero_optimization: Callable[[], bool]
    _bf16_reduce_grads: Callable[[], None]


def gradient_sums(engine: PipelineEngine) -> GradientSums | None:
    """Where the sums of an engine's stage are. None where they come after backward, as those of ZeRO's optimizer."""
    if engine.using_bf16_optimizer:
        sums, optimizer = Bf16Sums(engine.optimizer), engine.optimizer
        if not engine.has_moe_layers and dist.get_world_size(optimizer.dp_process_group) > 1:
            outer: Any = weakref.proxy(optimizer)
            engine._bf16_reduce_grads = partial(reduce_to_owners, outer)
            optimizer.get_grads_for_norm = partial(_norm_of_parts, outer, type(optimizer).get_grads_for_norm)
        return sums
    if not engine.zero_optimization():
        return OwnSums()
    if dist.get_backend(engine.optimizer.dp_process_group) == "gloo":
        zero: Any = weakref.proxy(engine.optimizer)
        engine.optimizer.allreduce_and_scatter = partial(scatter_to_owners, zero)
    return None


class _Lookup(torch.autograd.Function):
    """Rows of a weight, whose gradients go to its sum by themselves."""

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, ids: Tensor, padding: int | None, sums: GradientSums) -> Tensor:
        ctx.save_for_backward(ids)
        total, empty = sums.of(weight)
        ctx.padding, ctx.total = padding, total.zero_() if empty else total
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (grad,), (ids,) = grads, ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding)[..., None], 0)
        add_rows(ctx.total, ids.view(-1), grad.view(-1, grad.shape[-1]))
        return None, None, None, None


@torch.no_grad()
def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add ``rows`` [n, width] to the rows ``ids`` [n] of ``total``, those of one number in the order that they have.

    On CUDA numbers are sorted first: ``index_add_`` would add in whatever order its threads come.
    """
    rows = rows.to(total.dtype)
    if total.device.type == "cpu":
        total.index_add_(0, ids, rows)
    else:
        total.index_put_((ids.long(),), rows, accumulate=True)


def sum_embeddings(module: nn.Module, sums: GradientSums) -> None:
    """Let every trained embedding in ``module`` add the rows that it looked up to its sum.

    Its weight gets no gradient from autograd then, which would be as large as it is, and zero but for those rows.
    """
    for child in module.modules():
        if type(child) is nn.Embedding and child.weight.requires_grad and child.weight.device.type in _ORDERED:
            child.forward = MethodType(partial(_looked_up, sums), child)


def _looked_up(sums: GradientSums, embedding: nn.Embedding, ids: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return nn.functional.embedding(ids, embedding.weight)
    return _Lookup.apply(embedding.weight, ids, embedding.padding_idx, sums)
