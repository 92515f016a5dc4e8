"""A vision tower that all ranks of a replica have: before a step's pipeline begins they encode its images together.

Images are dealt by cost, see :func:`fft.parallel.image_plan.deal_images`; features go to the first stage, which embeds
them, and when the last backward is done, their gradients come back to who encoded the image. The tower's own gradients
are then summed over the stages, as those of any tied layer are: the step is the same as with one process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fft.data.image_batches import Chosen, ImageBatch
from fft.models.vision_layers import HeldTower
from fft.parallel.groups import own_group
from fft.parallel.image_plan import CHUNK, deal_images
from fft.parallel.role import StageRole


@dataclass
class _Chunk:
    """Images that this rank encodes at once, and what came of them."""

    patches: Tensor
    grids: Tensor
    #: Which of the features are of images of this rank's, not of blank ones.
    own: Tensor
    features: Tensor | None = None


@dataclass
class _Step:
    """Rows are features in the order of the first stage: micro-batch by micro-batch, each with a row of none last."""

    chunks: list[_Chunk]
    #: The rows that each rank of the replica encodes.
    rows: list[Tensor]
    #: How many rows each micro-batch has.
    sizes: list[int]
    gradients: list[list[Tensor | None]] = field(default_factory=list)


class SharedTower:
    """What the ranks of a replica do with their tower. Collective: every rank of the world creates it.

    Of tensor-parallel ranks each does the same as the others. With ``again`` the tower's blocks keep their inputs alone
    for the backward.
    """

    def __init__(self, role: StageRole, merge: int, width: int, again: bool) -> None:
        mesh = role.mesh
        self._group: dist.ProcessGroup | None = own_group(mesh.tower_groups())
        self._ranks, self._first = mesh.pipe * mesh.sequence, mesh.sequence
        self._rank = role.stage * mesh.sequence + role.sequence
        self._role, self._merge, self._width, self._again = role, merge, width, again
        self._held: HeldTower | None = None
        self._step: _Step | None = None
        self._loaded = 0

    def hold(self, held: HeldTower) -> None:
        """The tower itself, once it is built."""
        self._held = held

    @property
    def chosen(self) -> Chosen:
        """Which images of a step this rank decodes: those that it encodes."""

        def own(grids: list[np.ndarray]) -> list[Sequence[int]]:
            return [np.flatnonzero(owners == self._rank).tolist() for owners in self._deal(grids)]

        return own

    def encode(self, batches: Sequence[ImageBatch], together: bool) -> list[tuple[Tensor, ...]]:
        """Features, and those for decoder layers, of each micro-batch, each [tokens of images + 1, hidden size].

        Only the first stage gets some. Those of a step are encoded ``together``, of an evaluation one by one.
        Collective over a replica.
        """
        self._step = step = self._plan(batches, together)
        self._loaded = 0
        learns = torch.is_grad_enabled() and self._tower.is_trained
        made = []
        for chunk in step.chunks:
            with torch.set_grad_enabled(learns):
                chunk.features = self._tower.encode(chunk.patches, chunk.grids, self._again)
            made.append(chunk.features.detach()[chunk.own])
        own = torch.cat(made)
        sends = [len(own) if rank < self._first else 0 for rank in range(self._ranks)]
        receives = [len(rows) if self._role.first else 0 for rows in step.rows]
        received = self._exchange(own.repeat(self._first, 1, 1), sends, receives)
        if not self._role.first:
            return []
        whole = received.new_zeros(sum(step.sizes), *received.shape[1:])
        whole[torch.cat(step.rows)] = received
        step.gradients = [[None] * whole.shape[1] for _ in step.sizes]
        return [part.unbind(1) for part in whole.split(step.sizes)]

    def watch(self, inputs: Sequence[Tensor]) -> None:
        """Remember the gradients of a micro-batch's features, the floating ones of its ``inputs``, in their order."""
        step, number = self._running, self._loaded
        self._loaded += 1
        if not self._tower.is_trained:
            return
        for kind, features in enumerate(tensor for tensor in inputs if tensor.is_floating_point()):
            features.requires_grad_().register_hook(_keep(step.gradients[number], kind))

    def backward(self) -> None:
        """Give the tower its gradients, once the first stage has those of all features. Collective over a replica."""
        step, self._step = self._running, None
        if not self._tower.is_trained:
            return
        sends = [len(rows) if self._role.first else 0 for rows in step.rows]
        own = step.rows[self._rank]
        receives = [len(own) if rank < self._first else 0 for rank in range(self._ranks)]
        parts = self._gradients(step)[torch.cat(step.rows)] if self._role.first else self._tower.no_features()
        received = self._exchange(parts, sends, receives)
        gradients = received.view(self._first, len(own), *received.shape[1:]).sum(0)
        for chunk, share in zip(step.chunks, gradients.split([len(chunk.own) for chunk in step.chunks]), strict=True):
            if chunk.features is None:
                raise ValueError("images of which there are no features")
            whole = torch.zeros_like(chunk.features)
            whole[chunk.own] = share
            chunk.features.backward(whole)
            chunk.features = None  # and with it what its backward needed

    @property
    def _tower(self) -> HeldTower:
        if self._held is None:
            raise ValueError("the tower is not built yet")
        return self._held

    @property
    def _running(self) -> _Step:
        if self._step is None:
            raise ValueError("no step's images were encoded")
        return self._step

    def _deal(self, grids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return deal_images(grids, self._ranks, self._width)

    def _plan(self, batches: Sequence[ImageBatch], together: bool) -> _Step:
        grids = [batch.grids[:-1] for batch in batches]
        owners = self._deal(grids) if together else [owner for grid in grids for owner in self._deal([grid])]
        device, rows, sizes, begin = self._tower.device, [[] for _ in range(self._ranks)], [], 0
        chunks: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for batch, owner in zip(batches, owners, strict=True):
            tokens = batch.grids.prod(1) // self._merge**2
            ends = begin + np.cumsum(tokens[:-1])
            for rank, end, count in zip(owner.tolist(), ends.tolist(), tokens.tolist(), strict=False):
                rows[rank].append(np.arange(end - count, end))
            sizes.append(int(tokens[:-1].sum()) + 1)
            begin += sizes[-1]
            share = batch.grids[np.append(np.flatnonzero(owner == self._rank), len(owner))], batch.patches
            if chunks and sum(len(patches) for _, patches in chunks[-1]) + len(batch.patches) <= CHUNK:
                chunks[-1].append(share)
            else:
                chunks.append([share])
        whole = [torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)])).to(device) for parts in rows]
        return _Step([self._chunk(shares, device) for shares in chunks], whole, sizes)

    def _chunk(self, shares: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> _Chunk:
        """One of several micro-batches' shares, each with its blank image last."""
        tokens = [grids.prod(1) // self._merge**2 for grids, _ in shares]
        real = [np.arange(count.sum()) < count[:-1].sum() for count in tokens]
        grids, patches = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        own = torch.from_numpy(np.flatnonzero(np.concatenate(real)))
        return _Chunk(torch.from_numpy(patches).to(device), torch.from_numpy(grids), own.to(device))

    def _gradients(self, step: _Step) -> Tensor:
        """Of all rows, [rows, kinds, hidden size]."""
        parts = []
        for size, kinds in zip(step.sizes, step.gradients, strict=True):
            none = self._tower.no_features(size)[:, 0]
            parts.append(torch.stack([none if gradient is None else gradient for gradient in kinds], dim=1))
        return torch.cat(parts)

    def _exchange(self, rows: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        received = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receives, sends, group=self._group)
        return received


def _keep(kinds: list[Tensor | None], kind: int) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        kinds[kind] = gradient.clone()  # it may be part of what another micro-batch's is received into

    return keep
