"""The image processor's files of a model directory: whoever serves a model reads there how large images are, so that of
a trained one they say how large they were."""

import json
from pathlib import Path
from typing import Any

from fft.errors import UserError
from fft.files import write_atomically
from fft.images.rules import GRIDS, PREPROCESSOR, PROCESSOR, ImageRules, read_object

#: Other names of the limits of :data:`GRIDS`, beside the one of :data:`_SIZE` or in its place, in older files.
_SIZE, _OLD = "size", {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def set_limits(folder: Path, rules: ImageRules) -> None:
    """Have a directory's image processor give images the sizes of ``rules``; one that says so already stays as it is.

    Each is replaced whole. Raises :class:`UserError` for one that cannot be read or written.
    """
    for name in (PREPROCESSOR, PROCESSOR):
        path = folder / name
        content = read_object(path)
        inside = content.get("image_processor") if name == PROCESSOR else content
        if not isinstance(inside, dict) or not inside:
            continue
        told = _with_limits(inside, rules)
        if told == inside:
            continue
        whole = content | {"image_processor": told} if name == PROCESSOR else told
        try:
            write_atomically(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): make room there and run again.") from error


def _with_limits(settings: dict[str, Any], rules: ImageRules) -> dict[str, Any]:
    """An image processor's settings with these limits, under all names by which it is asked for them."""
    if rules.family not in GRIDS:
        return settings | {"min_patches": rules.min_tiles, "max_patches": rules.max_tiles}
    limits = {"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels}
    old = {name: limits[edge] for name, edge in _OLD.items() if settings.get(name) is not None}
    return settings | old | {_SIZE: limits}
