"""Parameters as they are written: whole, under the names of files, shared out over tensor-parallel ranks."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from fft.models.causal_lm import StageBuilder
from fft.parallel.tensor import TensorParallel
from fft.parallel.tensor_plan import Shard


def whole_tensors(parameters: Mapping[str, Tensor], builder: StageBuilder) -> dict[str, Tensor]:
    """The tensors that this rank writes of its stage's ``parameters``, by the names in files.

    Collective over the ranks of a tensor-parallel group: each gets whole tensors, about equal shares of the stage, in
    host memory, so that none holds a stage whole. Without one they are views of the parameters.
    """
    ranks, stored = builder.ranks.tensor, builder.spec.stored
    if ranks is None:
        return stored.to_stored({name: p.detach() for name, p in parameters.items()})
    every = [builder.spec.shards(rank, ranks.size) for rank in range(ranks.size)]
    whole = {name: builder.shards[name].shape if name in builder.shards else p.shape for name, p in parameters.items()}
    sizes: dict[str, int] = defaultdict(int)
    for name, shape in whole.items():
        sizes[stored.together(name)] += prod(shape)
    owners, own = _owners(sizes, ranks.size), {}
    for name in sorted(parameters, key=lambda name: (-prod(whole[name]), name)):
        owner = owners[stored.together(name)]
        local = parameters[name].detach().contiguous()
        if name in builder.shards:
            gathered = _collect(local, [shards[name] for shards in every], owner, ranks)
        else:
            gathered = local.cpu() if owner == ranks.rank else None
        if gathered is not None:
            own[name] = gathered
    return stored.to_stored(own)


def _collect(local: Tensor, shards: Sequence[Shard], owner: int, ranks: TensorParallel) -> Tensor | None:
    """Parts of all ranks as one tensor on ``owner``; None elsewhere. Copies are sent once."""
    if ranks.rank != owner:
        if shards[ranks.rank].copy == 0:
            dist.send(local, group=ranks.group, group_dst=owner)
        return None
    whole = torch.empty(shards[0].shape, dtype=local.dtype)
    for rank, shard in enumerate(shards):
        if rank != owner and shard.copy == 0:
            received = local.new_empty(shard.local_shape)
            dist.recv(received, group=ranks.group, group_src=rank)
            shard.put(whole, received)
        elif rank == owner:
            shard.put(whole, local)
    return whole


def _owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Share tensors out so that each rank has about the same size: the largest first, to whom has least."""
    heap, owners = [(0, rank) for rank in range(ranks)], {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        held, owners[name] = heapq.heappop(heap)
        heapq.heappush(heap, (held + size, owners[name]))
    return owners
