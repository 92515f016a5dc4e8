"""Images of prompts: what engines take of them. Pixels are those of training."""

from collections.abc import Sequence

import numpy as np

from fft.images.pixels import normalized, patches_of, pixel_values
from fft.images.positions import image_begins
from fft.images.rules import GRIDS, ImageRules
from fft.text.image_parts import ReadImage


def values_of(images: Sequence[ReadImage], rules: ImageRules, raw: bool = False) -> dict[str, np.ndarray]:
    """What transformers' models take of images, one after the other: ``pixel_values`` float32, if ``raw`` uint8 and not
    normalized; and, of families that have grids, ``image_grid_thw`` int64 [images, 3].

    Raises :class:`fft.images.grids.ImageError` for what is no image.
    """
    pixels = []
    for image in images:
        patches = patches_of(image.data, image.grid, rules)
        pixels.append(pixel_values(patches if raw else normalized(patches, rules), image.grid, rules))
    values = {"pixel_values": np.concatenate(pixels)}
    if rules.family in GRIDS:
        values["image_grid_thw"] = np.array([image.grid for image in images], np.int64)
    return values


def stretches_of(ids: Sequence[int], images: Sequence[ReadImage], rules: ImageRules) -> list[tuple[int, int]]:
    """Where the tokens of each image begin in a prompt, and how many these are."""
    counts = np.array([image.tokens for image in images], np.int64)
    return list(zip(image_begins(np.array(ids), counts, rules.image_token).tolist(), counts.tolist(), strict=True))
