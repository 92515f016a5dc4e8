"""Which rank encodes which of a step's images: arithmetic on their grids, the same on all ranks."""

import heapq
from collections.abc import Sequence

import numpy as np

#: Patches that a rank encodes at once.
CHUNK = 16384


def deal_images(grids: Sequence[np.ndarray], ranks: int, width: int) -> list[np.ndarray]:
    """Share images out so that each rank has about the same to do: the dearest first, to whom has least.

    ``grids`` are int32 [images, 3] of each micro-batch; of each the result has the rank by image, int64 [images]. An
    image costs what a tower of hidden size ``width`` computes of it: its patches times what the matrices of a block
    do, 12 * width^2, and what attention to its own tile does, 2 * width a patch.
    """
    sizes = [grid.astype(np.int64) for grid in grids]
    flat = np.concatenate([*sizes, np.empty((0, 3), np.int64)])
    tile = flat[:, 1] * flat[:, 2]
    costs = flat[:, 0] * tile * (6 * width + tile)
    owners = np.zeros(len(flat), np.int64)
    heap = [(0, rank) for rank in range(ranks)]
    for image in np.argsort(-costs, kind="stable").tolist():
        held, owner = heapq.heappop(heap)
        owners[image] = owner
        heapq.heappush(heap, (held + int(costs[image]), owner))
    return np.split(owners, np.cumsum([len(size) for size in sizes])[:-1])
