"""Directories of models, tokenizers and adapters, which strangers have made: what of them may be read, or copied.

Files that a run reads end up in what it writes: in a copied tokenizer, in a template that stands in prompts. A link in
a directory that was fetched may lead to a user's own secrets; a pipe in it keeps who reads it waiting for ever.
"""

import os
import re
import stat
from functools import lru_cache
from pathlib import Path

from fft.data.replaceable import MODEL
from fft.errors import UserError, one_line
from fft.json_text import json_value

#: Names of files that are read in such a directory.
_READ = rf"{MODEL.files}|.*\.(json|py|txt|safetensors|bin|pt|pth)"
#: The one folder in such a directory that is looked into.
_TEMPLATES = "additional_chat_templates"
#: Settings of a config that say how many of something are made, each with memory of its own, and how many are believed.
_COUNTS, _MOST = re.compile(r"(?:.*_)?(?:layers?|experts|blocks|depths?)"), 10_000


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Raise :class:`UserError` for a file of a model directory that is a link out of it, that is no file at all, or
    that is no JSON where a model's file of that name is. Nothing is done for what is no folder."""
    folder = Path(directory)
    check_file(folder / _TEMPLATES, folder)
    for place in (folder, folder / _TEMPLATES):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if re.fullmatch(_READ, file.name):
                check_file(file, folder)
                if file.suffix == ".json" and file.is_file() and re.fullmatch(MODEL.files, file.name):
                    found = file.stat()
                    _check_json(str(file), found.st_size, found.st_mtime_ns)


def check_file(file: Path, directory: Path) -> None:
    """Raise :class:`UserError` for one file as :func:`check_directory` does. One that is not there does not matter.

    A snapshot of the Hugging Face cache is made of links to the ``blobs`` of the same model, which belong to it.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): restore it.") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{file} is no file, but a pipe or a device: remove it, and trust this directory less.")
    real = file.resolve()
    if not any(real.is_relative_to(home) for home in _homes(directory.resolve())):
        raise UserError(
            f"{file} is a link to {real}, outside of its directory, whose content would end up in outputs: put a copy, "
            "or a hard link, in its place if that is meant."
        )


def _homes(directory: Path) -> list[Path]:
    """Where files of a directory may lie."""
    blobs = directory.parent.parent / "blobs"
    cached = directory.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink()
    return [directory, blobs] if cached else [directory]


@lru_cache(maxsize=64)
def _check_json(file: str, size: int, changed: int) -> None:
    """Once for each content of a file: a tokenizer's is large."""
    try:
        content = json_value(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON ({one_line(error)[:120]}): restore it.") from error
    if Path(file).name == "config.json":
        check_counts(content, file)


def check_counts(config: object, file: str | os.PathLike[str]) -> None:
    """Raise :class:`UserError` for a config of so many layers or experts that to make them would never end."""
    left = [config]
    while left:
        one = left.pop()
        for name, value in one.items() if isinstance(one, dict) else ():
            if isinstance(value, (int, float)) and value > _MOST and _COUNTS.fullmatch(name):
                raise UserError(f"{file}: {name} is {value:,}, and no model has more than {_MOST:,}: restore the file.")
            left.append(value)
        left += one if isinstance(one, list) else []
