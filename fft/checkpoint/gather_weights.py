"""Parameters as they are written: whole, under the names of files, shared out over the ranks that hold a stage."""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from fft.models.causal_lm import StageBuilder
from fft.parallel.tensor_plan import Shard


def whole_tensors(parameters: Mapping[str, Tensor], builder: StageBuilder) -> dict[str, Tensor]:
    """The tensors that this rank writes of its stage's ``parameters``, by the names in files.

    Collective over the ranks that hold a stage together, tensor- and expert-parallel: each gets whole tensors, about
    equal shares of the stage, in host memory, so that none holds a stage whole. Of a stage that one rank holds they are
    views of the parameters.
    """
    ranks, stored = _Holding.of(builder), builder.spec.stored
    if ranks is None:
        return stored.to_stored({name: p.detach() for name, p in parameters.items()})
    every = ranks.shards(builder)
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


@dataclass(frozen=True)
class _Holding:
    """The ranks that hold a stage's parameters together, and this rank's place among them."""

    group: dist.ProcessGroup | None
    rank: int
    tensor: int
    expert: int

    @classmethod
    def of(cls, builder: StageBuilder) -> "_Holding | None":
        """None where a rank holds a stage by itself."""
        (rank, tensor, (place, expert)), ranks = builder.ranks.places, builder.ranks
        group = ranks.expert.holders if ranks.expert else ranks.tensor.group if ranks.tensor else None
        return cls(group, place * tensor + rank, tensor, expert) if tensor * expert > 1 else None

    @property
    def size(self) -> int:
        """Tensor ranks are neighbours."""
        return self.tensor * self.expert

    def shards(self, builder: StageBuilder) -> list[dict[str, Shard]]:
        """Of each rank what it holds."""
        places = product(range(self.expert), range(self.tensor))
        return [builder.spec.shards(rank, self.tensor, (place, self.expert)) for place, rank in places]


def _collect(local: Tensor, shards: Sequence[Shard], owner: int, ranks: _Holding) -> Tensor | None:
    """Parts of all ranks as one tensor on ``owner``; None elsewhere. Of what several have one copy is sent, or none."""
    parts = {(shards[owner].spans, shards[owner].experts): owner}
    for rank, shard in enumerate(shards):
        parts.setdefault((shard.spans, shard.experts), rank)
    if ranks.rank != owner:
        if ranks.rank in parts.values():
            dist.send(local, group=ranks.group, group_dst=owner)
        return None
    whole = torch.empty(shards[0].shape, dtype=local.dtype)
    for rank in sorted(parts.values()):
        received = local
        if rank != owner:
            received = local.new_empty(shards[rank].local_shape)
            dist.recv(received, group=ranks.group, group_src=rank)
        shards[rank].put(whole, received)
    return whole


def _owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Share tensors out so that each rank has about the same size: the largest first, to whom has least."""
    heap, owners = [(0, rank) for rank in range(ranks)], {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        held, owners[name] = heapq.heappop(heap)
        heapq.heappush(heap, (held + size, owners[name]))
    return owners
