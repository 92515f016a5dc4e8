"""From an image's size alone to its grid of patches and its tokens, as transformers' processors have them.

A grid is (tiles, patches high, patches wide): one tile of the image's own shape, or several equal squares. Tokens are
its patches divided by ``merge`` squared, whatever the family.
"""

import math
from functools import lru_cache

import numpy as np

from fft.images.rules import GRIDS, ImageRules

#: Longer sides are at most this many times the shorter ones.
_MOST_ASPECT = 200

Grid = tuple[int, int, int]


class ImageError(ValueError):
    """Bytes or a size of which no image can be made; the message says why, in a few words that follow its name."""


def grid_of(rules: ImageRules, width: int, height: int) -> Grid:
    """The grid of an image of so many pixels. Raises :class:`ImageError` for one that is too long and thin."""
    if rules.family in GRIDS:
        high, wide = smart_size(rules, width, height)
        return 1, high // rules.patch, wide // rules.patch
    columns, rows = arrangement(width, height, rules.tile, rules.min_tiles, rules.max_tiles)
    tiles, side = columns * rows, rules.tile // rules.patch
    return tiles + (tiles > 1), side, side


def tokens_of(rules: ImageRules, grid: Grid) -> int:
    """Tokens of a grid, those around it not counted."""
    return math.prod(grid) // rules.merge**2


def smart_size(rules: ImageRules, width: int, height: int) -> tuple[int, int]:
    """(height, width) in pixels to which an image of :data:`GRIDS` is resized: multiples of a token's side, of about
    its aspect ratio, with ``min_pixels`` to ``max_pixels`` pixels. Raises :class:`ImageError`."""
    if max(height, width) / min(height, width) > _MOST_ASPECT:
        raise ImageError(f"has {width} x {height} pixels: one side is more than {_MOST_ASPECT} times the other")
    factor = rules.factor
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > rules.max_pixels:
        beta = math.sqrt((height * width) / rules.max_pixels)
        high = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif high * wide < rules.min_pixels:
        beta = math.sqrt(rules.min_pixels / (height * width))
        high, wide = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return high, wide


@lru_cache(maxsize=4096)
def arrangement(width: int, height: int, tile: int, fewest: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the tiles that are nearest to an image's aspect ratio.

    Of several, the one with more tiles, unless these have more than twice the image's area. Which one it is follows
    from the size and the number of tiles alone, whatever the limits were: with both limits at that number, the same.
    """
    nearest, best = math.inf, (1, 1)
    for columns, rows in _arrangements(fewest, most):
        distance = abs(width / height - columns / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * tile * tile * columns * rows):
            nearest, best = distance, (columns, rows)
    return best


@lru_cache(maxsize=64)
def _arrangements(fewest: int, most: int) -> list[tuple[int, int]]:
    pairs = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    return sorted((pair for pair in pairs if math.prod(pair) >= fewest), key=math.prod)


def blank_grid(rules: ImageRules) -> Grid:
    """The grid of the smallest image there is: a token, or a tile."""
    side = rules.merge if rules.family in GRIDS else rules.tile // rules.patch
    return 1, side, side


def are_grids(grids: np.ndarray, rules: ImageRules) -> np.ndarray:
    """Of [images, 3] numbers, whether each three are a grid of stills."""
    tiles, high, wide = grids.T
    if rules.family in GRIDS:
        return (tiles == 1) & (high > 0) & (wide > 0) & (high % rules.merge == 0) & (wide % rules.merge == 0)
    side = rules.tile // rules.patch
    # Of several tiles, one is the picture of the whole: there are never two.
    return (tiles > 0) & (tiles != 2) & (high == side) & (wide == side)
