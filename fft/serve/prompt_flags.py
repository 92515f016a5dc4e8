"""How prompts are read, as flags say it."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fft.errors import UserError, positive
from fft.images.rules import LIMITS, ImageLimits, ImageSettings

#: Whether a text is a user's turn, as ``--chat`` says; "auto": where the model has a chat template.
CHAT = ("auto", "yes", "no")


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
