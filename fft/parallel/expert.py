"""Experts spread over ranks: who has which, and the exchange of rows between tokens' ranks and experts' ranks.

An expert-parallel group are neighbours on the axis of data x sequence (GShard, arXiv:2006.16668). Each has some experts
of every layer and all of the rest; tokens travel to their experts and back.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fft.parallel.groups import own_group
from fft.parallel.mesh import MeshSizes


class ExpertParallel:
    """The ranks among which this rank's layers have their experts. Collective: every rank of the world creates it."""

    def __init__(self, mesh: MeshSizes) -> None:
        groups, rank = mesh.expert_groups(), dist.get_rank()
        self.size = mesh.expert
        self.rank = next(group.index(rank) for group in groups if rank in group)
        self.group: dist.ProcessGroup | None = own_group(groups)
        #: The ranks that have the same experts, of other tokens.
        self.replicas: dist.ProcessGroup | None = own_group(mesh.expert_data_groups())
        #: The ranks that have all parameters of a stage between them.
        self.holders: dist.ProcessGroup | None = own_group(mesh.holder_groups())

    def counts(self, sends: Tensor, rows: int) -> tuple[Tensor, list[int], list[int]]:
        """Who sends how much. ``sends`` is int64 [experts], the rows that this rank has for each, ``rows`` in all.

        Returns the rows for each of this rank's experts by the rank that sends them, int64 [ranks, own experts], and
        how many rows this rank sends to and receives from each. Collective.
        """
        own = len(sends) // self.size
        receives = self.all_to_all(sends, [own] * self.size, [own] * self.size).view(self.size, own)
        both = torch.stack((sends.view(self.size, own).sum(1), receives.sum(1))).tolist()
        return receives, both[0], both[1]

    def exchange(self, rows: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """``sends[r]`` of the [rows, size] go to rank r; returns those received, by rank. Collective, also backward."""
        return _Exchange.apply(rows, self, sends, receives)

    def bring_back(self, rows: Tensor, sends: list[int], receives: list[int], places: Tensor) -> Tensor:
        """:meth:`exchange` of what experts made; of the rows received, the i-th goes to ``places[i]``. Collective."""
        return _BringBack.apply(rows, self, sends, receives, places)

    def all_to_all(self, rows: Tensor, sends: list[int], receives: list[int], back: bool = False) -> Tensor:
        """:meth:`exchange` without gradients. Collective.

        What comes ``back`` from experts is not kept by selective recomputation: nothing in the backward asks for it.
        """
        name = self.group.group_name if self.group is not None else ""
        return (_come_back if back else _send)(rows.contiguous(), receives, sends, name)


def _send(rows: Tensor, receives: list[int], sends: list[int], group: str) -> Tensor:
    # Operators that return what they receive, which selective recomputation keeps, so that it does not send again.
    received = torch.ops._c10d_functional.all_to_all_single(rows, receives, sends, group)
    return torch.ops._c10d_functional.wait_tensor(received)


#: The same under another name, by which recomputation tells it apart.
_come_back = torch.library.custom_op("fft::come_back", _send, mutates_args=())
_come_back.register_fake(lambda rows, receives, sends, group: rows.new_empty(sum(receives), *rows.shape[1:]))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: ExpertParallel, sends: list[int], receives: list[int]) -> Tensor:
        ctx.ranks, ctx.sends, ctx.receives = ranks, sends, receives
        return ranks.all_to_all(rows, sends, receives)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return ctx.ranks.all_to_all(grad, ctx.receives, ctx.sends), None, None, None


class _BringBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, ranks: ExpertParallel, sends: list[int], receives: list[int], places: Tensor
    ) -> Tensor:
        # Not saved as tensors are: recomputation would have to run until here, and exchange again, to have it.
        ctx.ranks, ctx.sends, ctx.receives, ctx.places = ranks, sends, receives, places
        received = ranks.all_to_all(rows, sends, receives, back=True)
        return torch.empty_like(received).index_copy_(0, places, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return ctx.ranks.all_to_all(grad[ctx.places], ctx.receives, ctx.sends), None, None, None, None
