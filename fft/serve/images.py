"""Images of prompts: the flags that have them read, and what engines take of them. Pixels are those of training."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fft.errors import UserError, positive
from fft.images.pixels import normalized, patches_of, pixel_values
from fft.images.positions import image_begins
from fft.images.rules import GRIDS, LIMITS, ImageLimits, ImageRules
from fft.text.chat import ImageSettings
from fft.text.image_parts import ReadImage


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :func:`image_settings_of`."""
    group = parser.add_argument_group("images")
    group.add_argument("--image_path", metavar="DIR", help="read images of prompts, named files from this folder")
    for name, meaning in LIMITS.items():
        group.add_argument(f"--{name}", type=positive, help=f"{meaning} (default: the model's own limit)")


def image_settings_of(given: Mapping[str, Any]) -> ImageSettings | None:
    """What the values of flags, by their names, say; None where no images are read.

    Raises :class:`UserError` for a folder that is none, and for limits without it.
    """
    limits = ImageLimits(**{name: given.get(name) for name in LIMITS})
    if given.get("image_path") is None:
        if limits.given:
            raise UserError(
                f"`{limits.given[0]}` is a limit of images: give `image_path`, the folder in which they lie."
            )
        return None
    folder = Path(given["image_path"])
    if not folder.is_dir():
        raise UserError(f"`image_path` {folder} is no folder: give the one in which the images of the prompts lie.")
    return ImageSettings(str(folder.absolute()), limits)


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
