"""JSON, and small files, that a stranger may have written. Depends on nothing but the standard library."""

import json
import os
import stat
from typing import Any


def json_value(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, and nothing else, for what is none or cannot be read: also where it
    is nested too deeply, has a number of more digits than Python takes, or is no Unicode."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def small_text(path: str | os.PathLike[str], most: int = 1 << 26) -> str:
    """The text of a file that fits in memory, of fewer than ``most`` bytes. Raises OSError where it cannot be read, and
    ValueError for a pipe, a device or a folder, which is not waited for, for a longer one, and for what is no UTF-8."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a device may do something when it is opened
        raise ValueError("it is no file")
    if found.st_size >= most:
        raise ValueError(f"it has {most:,} bytes or more")
    with open(path, "rb") as stream:
        return stream.read(most).decode()
