"""From an image's bytes to uint8 patches, by Pillow and numpy: the same bits on every machine.

What becomes of what is no plain RGB, here and so in every table and run:

- An orientation in EXIF turns the image, which changes width and height.
- Palettes, grey, CMYK and the like become RGB by Pillow's conversion; transparency is dropped, its colours stay.
- Of 16 bits a pixel, the upper 8 are taken (Pillow's own conversion would make nearly all of them white).
- Of an animation, the first frame.
- Refused, as an :class:`ImageError`: what Pillow cannot read to its end, 32 bits a pixel, whose range nobody knows, and
  more than :data:`MOST_PIXELS`.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fft.errors import one_line
from fft.images.grids import Grid, ImageError, arrangement
from fft.images.rules import GRIDS, ImageRules

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels of an image at most: where Pillow begins to warn of a file that is made to fill the memory.
MOST_PIXELS = 89_478_485
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
#: Of several pictures in one file, these are no animation: the others are previews.
_SEVERAL_PICTURES = ("MPO",)


@dataclass(frozen=True)
class ImageSize:
    """An image's ``width`` and ``height`` in pixels, upright; ``frames`` is true of an animation."""

    width: int
    height: int
    frames: bool = False


def check_image(data: bytes) -> ImageSize:
    """Decode an image's bytes to the end, and say how large it is.

    Raises :class:`ImageError` where the loader would stumble over it.
    """
    with _opened(data) as image:
        seen = _seen(image)
        _check_mode(image.mode)
        image.load()
    return seen


def size_of(data: bytes) -> ImageSize:
    """How large an image is, from its header alone. Raises :class:`ImageError` when that cannot be read."""
    with _opened(data) as image:
        return _seen(image)


def to_rgb(data: bytes) -> "Image":
    """The image upright, in RGB. Raises :class:`ImageError`."""
    from PIL import Image, ImageOps

    with _opened(data) as image:
        _check_mode(image.mode)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # neither this nor the last line copies where it need not
        turned = image
        if turned.mode.startswith("I;16"):
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        return turned if turned.mode == "RGB" else turned.convert("RGB")


def patches_of(data: bytes, grid: Grid, rules: ImageRules, into: np.ndarray | None = None) -> np.ndarray:
    """An image's patches: uint8 [patches, 3 * patch * patch], colour by colour; ``into`` such an array, if it is given.

    Of :data:`GRIDS`, the patches of a token follow each other, and the second of two frames is the first; of tiles, the
    patches of a tile are in rows. :func:`normalized` makes of them what a tower takes. Raises :class:`ImageError` when
    the bytes are no image, or none of this grid.
    """
    image = to_rgb(data)
    tiles, high, wide = grid
    patches = np.empty((math.prod(grid), 3 * rules.patch**2), np.uint8) if into is None else into
    if rules.family in GRIDS:
        pixels = _resized(image, wide * rules.patch, high * rules.patch, rules)
        _patchify(pixels, rules.patch, rules.merge, patches)
        return patches
    own, side = max(1, tiles - 1), rules.tile
    columns, rows = arrangement(image.width, image.height, side, own, own)
    if columns * rows != own:
        raise ImageError(f"has {image.width} x {image.height} pixels, of which no {own} tiles are made")
    pixels = _resized(image, columns * side, rows * side, rules)
    squares = list(pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(own, side, side, 3))
    if own > 1:
        squares.append(_resized(image, side, side, rules))
    for square, part in zip(squares, np.split(patches, tiles), strict=True):
        _patchify(square, rules.patch, 1, part)
    return patches


def normalized(patches: np.ndarray, rules: ImageRules) -> np.ndarray:
    """Patches of uint8 as float32 around 0, as transformers' processors give them (for one of the frames)."""
    colours = patches.reshape(len(patches), 3, -1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32)[:, None] for values in (rules.mean, rules.std))
    return ((colours - mean) / std).reshape(len(patches), -1)


def pixel_values(patches: np.ndarray, grid: Grid, rules: ImageRules) -> np.ndarray:
    """An image's patches, normalized or not, in the form that transformers' towers take as ``pixel_values``.

    Of :data:`GRIDS`, [patches, 3 * temporal * patch * patch], every frame the same; of tiles, [tiles, 3, tile, tile].
    """
    if rules.family in GRIDS:
        return patches.reshape(len(patches), 3, 1, -1).repeat(rules.temporal, axis=2).reshape(len(patches), -1)
    squares = patches.reshape(*grid, 3, rules.patch, rules.patch)
    return squares.transpose(0, 3, 1, 4, 2, 5).reshape(grid[0], 3, rules.tile, rules.tile)


def _resized(image: "Image", width: int, height: int, rules: ImageRules) -> np.ndarray:
    """uint8 [height, width, 3]."""
    from PIL import Image

    return np.asarray(image.resize((width, height), Image.Resampling(rules.resample)))


def _patchify(pixels: np.ndarray, patch: int, merge: int, into: np.ndarray) -> None:
    """uint8 [height, width, 3] to [patches, 3 * patch * patch], by blocks of ``merge`` x ``merge`` patches."""
    height, width, _ = pixels.shape
    blocks = pixels.reshape(height // (merge * patch), merge, patch, width // (merge * patch), merge, patch, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    into.reshape(ordered.shape)[...] = ordered


@contextmanager
def _opened(data: bytes) -> "Iterator[Image]":
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageError(f"has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            yield image
    except ImageError:
        raise
    except Exception as error:  # whatever its bytes make Pillow stumble over
        raise ImageError(f"cannot be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """What Pillow says, without the address of the buffer."""
    return "it is no image" if type(error).__name__ == "UnidentifiedImageError" else one_line(error)


def _seen(image: "Image") -> ImageSize:
    width, height = image.size
    if image.getexif().get(_ORIENTATION) in _TURNED:
        width, height = height, width
    frames = getattr(image, "is_animated", False) and image.format not in _SEVERAL_PICTURES
    return ImageSize(width, height, frames)


def _check_mode(mode: str) -> None:
    if mode in ("I", "F"):
        raise ImageError("has 32 bits a pixel, of which nobody says what is white: save it with 8 or 16")
