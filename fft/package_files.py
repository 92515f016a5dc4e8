"""The modules of an installed package, wherever they lie: in a folder, or in a zip that travels."""

import importlib.resources
from collections.abc import Iterator
from importlib.resources.abc import Traversable


def modules_of(package: str) -> Iterator[tuple[str, Traversable]]:
    """Its modules and their names as files, ``fft/data/table.py``, in the order of names in each folder."""
    return _modules(importlib.resources.files(package), package)


def _modules(folder: Traversable, name: str) -> Iterator[tuple[str, Traversable]]:
    for one in sorted(folder.iterdir(), key=lambda found: found.name):
        inside = f"{name}/{one.name}"
        if one.is_dir():
            yield from _modules(one, inside)
        elif one.name.endswith(".py"):
            yield inside, one
