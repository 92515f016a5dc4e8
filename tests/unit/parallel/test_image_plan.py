"""A step's images are shared out so that no rank has much more to do than another."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fft.parallel.image_plan import deal_images
from fft.parallel.mesh import MeshSizes

WIDTH = 64
GRIDS = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)), max_size=6), min_size=1, max_size=5
)


def cost(grid):
    tiles, high, wide = grid
    patches = high * wide
    return tiles * patches * (12 * WIDTH**2 + 2 * WIDTH * patches)


@given(GRIDS, st.integers(1, 6))
def test_every_image_has_a_rank_and_none_has_much_more(steps, ranks):
    grids = [np.array(step, np.int32).reshape(-1, 3) for step in steps]
    owners = deal_images(grids, ranks, WIDTH)
    assert [len(owner) for owner in owners] == [len(grid) for grid in grids]
    loads = np.zeros(ranks)
    for grid, owner in zip(steps, owners, strict=True):
        for one, rank in zip(grid, owner.tolist(), strict=True):
            loads[rank] += cost(one)
    assert loads.sum() == sum(cost(one) for grid in steps for one in grid)
    # Dearest first, to whom has least: each rank was the lightest when its last, and cheapest, image came.
    for rank in range(ranks):
        own = [cost(one) for grid, owner in zip(grids, owners, strict=True) for one in grid[owner == rank]]
        assert loads[rank] - min(own, default=0) <= loads.min()


def test_a_large_image_goes_alone():
    (owners,) = deal_images([np.array([[1, 2, 2], [1, 60, 60], [1, 2, 2], [1, 4, 4]], np.int32)], 2, WIDTH)
    assert owners[1] != owners[0] == owners[2] == owners[3]


def test_ranks_that_encode_together_are_those_of_a_replica():
    mesh = MeshSizes(data=2, pipe=2, sequence=2, tensor=2)
    groups = mesh.tower_groups()
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
    assert groups[0] == [mesh.rank(p, 0, s, 0) for p in (0, 1) for s in (0, 1)]
    assert len({len(group) for group in groups}) == 1
