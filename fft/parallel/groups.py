"""The process group that a rank is in, and what ranks tell one another."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def own_group(groups: list[list[int]]) -> dist.ProcessGroup:
    """Make a process group of each of ``groups``, lists of global ranks, and return the one this rank is in.

    Collective: every rank of the default group calls it, with the same groups. Raises ValueError on a rank that is in
    none.
    """
    group, _ = dist.new_subgroups_by_enumeration(groups)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"rank {dist.get_rank()} is in none of the groups {groups}")
    return group


def trade(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Send each rank of a group its part of what is ``sent``, by rank, and receive what each has for this one.

    Parts are contiguous, may be empty, and differ in size between ranks; both sides know them. gloo says that a
    receive is ready on the socket that data goes by: behind a long message that this rank has begun to send, the other
    side would read it when that has arrived, and only then begin. So receives come first: both directions are full.
    Its own all-to-all begins with sends. Collective.
    """
    own = dist.get_rank(group)
    received[own].copy_(sent[own])
    operations = [
        dist.P2POp(operation, part, group=group, group_peer=peer)
        for operation, parts in ((dist.irecv, received), (dist.isend, sent))
        for peer, part in enumerate(parts)
        if peer != own and part.numel()
    ]
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()


def tell_all(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """What every rank of a group that sends host memory tells the others, by rank. Collective over ``group``.

    It travels as JSON: who can send here cannot run anything, as a pickle would. Tuples come as lists.
    """
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(own)]), group)
    longest = max(int(size) for size in sizes)
    told = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(told, torch.nn.functional.pad(own, (0, longest - len(own))), group)
    return [json.loads(bytes(one[: int(size)].tolist())) for one, size in zip(told, sizes, strict=True)]


def told_by_first(value: Any, group: dist.ProcessGroup) -> Any:
    """What rank 0 of the group tells; what the others give does not matter. As :func:`tell_all`, collective."""
    return tell_all(value if dist.get_rank(group) == 0 else None, group)[0]
