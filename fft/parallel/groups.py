"""The process group that a rank is in."""

import torch.distributed as dist


def own_group(groups: list[list[int]]) -> dist.ProcessGroup:
    """Make a process group of each of ``groups``, lists of global ranks, and return the one this rank is in.

    Collective: every rank of the default group calls it, with the same groups. Raises ValueError on a rank that is in
    none.
    """
    group, _ = dist.new_subgroups_by_enumeration(groups)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"rank {dist.get_rank()} is in none of the groups {groups}")
    return group
