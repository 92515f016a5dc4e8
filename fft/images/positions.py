"""Positions of tokens for rotary embeddings of three axes: time, height and width."""

from collections.abc import Sequence

import numpy as np


def positions_of(ids: np.ndarray, ends: Sequence[int], grids: np.ndarray, image_token: int, merge: int) -> np.ndarray:
    """int32 [3, tokens] of a row, as transformers' ``get_rope_index`` has them document by document.

    Documents end at ``ends``; each begins at 0. Texts count up on all axes; an image's tokens are at their row and
    column, counted from the position where it begins, and what follows begins after the larger of both. ``grids``
    [images, 3] are those of the row, in its order; a grid of several frames counts them on the axis of time. Raises
    :class:`ValueError` when ids and grids do not belong together.
    """
    positions = np.empty((3, len(ids)), np.int32)
    shapes = np.asarray(grids, np.int64).reshape(-1, 3) // (1, merge, merge)
    begins = image_begins(ids, shapes.prod(1), image_token)
    at = image = 0
    for end in np.asarray(ends).tolist():
        following = 0
        while at < end:
            stop = end if image == len(begins) else min(end, int(begins[image]))
            positions[:, at:stop] = np.arange(following, following + stop - at, dtype=np.int32)
            following, at = following + stop - at, stop
            if at < end:
                shape = tuple(shapes[image].tolist())
                size = shape[0] * shape[1] * shape[2]
                positions[:, at : at + size] = np.indices(shape, np.int32).reshape(3, -1) + following
                following, at, image = following + max(shape[1:]), at + size, image + 1
    return positions


def image_begins(ids: np.ndarray, counts: np.ndarray, image_token: int) -> np.ndarray:
    """Where the images of a row begin in its ids, int64 [images], from how many tokens each has.

    Raises :class:`ValueError` when there are more or fewer of these tokens, or some image's do not lie together.
    """
    places = np.flatnonzero(ids == image_token)
    if counts.sum() != len(places):
        raise ValueError(f"{len(places)} tokens are of images, their grids have {int(counts.sum())}")
    firsts = np.cumsum(counts) - counts
    begins, lasts = places[firsts], places[firsts + counts - 1]  # no image is without tokens
    if (lasts - begins != counts - 1).any():
        raise ValueError("the tokens of an image do not lie together")
    return begins
