"""Put a new table in an old one's place: two renames, and what an interruption between them leaves is finished."""

import os
import shutil
from pathlib import Path


def place_beside(table: Path) -> Path:
    """Where the new table is written: hidden, on the same file system."""
    return table.parent / f".{table.name}.new"


def swap(table: Path) -> None:
    """Replace ``table`` by the finished one beside it."""
    os.rename(table, _old(table))
    finish_swap(table)


def finish_swap(table: Path) -> None:
    """Do what is left of a :func:`swap` that was interrupted; nothing when none was."""
    old = _old(table)
    if old.is_dir():
        if not table.exists():
            os.rename(place_beside(table), table)
        shutil.rmtree(old)


def _old(table: Path) -> Path:
    return table.parent / f".{table.name}.old"
