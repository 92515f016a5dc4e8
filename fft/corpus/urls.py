"""URLs of inputs: the file systems behind them, names as they stand there, and wild cards."""

import os
import posixpath
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial

import pyarrow as pa
from pyarrow import fs

from fft.data.asking import asking, file_system
from fft.data.manifest import in_order
from fft.data.storage import SCHEMES, Storage, is_url, reaching, whole
from fft.errors import UserError

#: Seconds for a store that would be asked for a quarter of an hour.
_PATIENCE = 10
_WILD = re.compile(r"[*?\[{]")


class Unreached(Exception):
    """Nothing answers here for a URL: its file system is known, or its credentials are, to the engine alone."""


def storage_of(place: str | os.PathLike[str]) -> Storage:
    """The storage of a path, or of a URL whose name is taken as it stands: blanks and ``%`` in it are no escapes.

    Raises :class:`UserError` for a URL of no known file system.
    """
    if not is_url(place):
        return Storage.at(place)
    url = whole(str(place))
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    patience = f"?retry_limit_seconds={_PATIENCE}" if scheme in ("gs", "gcs") else ""
    base = f"{SCHEMES.get(scheme, scheme)}://{host}/{patience}"
    with reaching(url):
        filesystem, root = file_system(base)
    return Storage(url, posixpath.join(root, path).rstrip("/") or "/", filesystem)


def expand_url(url: str) -> tuple[Storage, list[tuple[Storage, fs.FileInfo]]]:
    """The folder above all wild cards of a URL, and what there is of such names, in order; without wild cards, the
    place itself, twice. Raises :class:`Unreached`."""
    try:
        wild = _WILD.search(url)
        if wild is None:
            storage = storage_of(url)
            return storage, [(storage, storage.info())]
        fixed = url[: wild.start()].rpartition("/")[0]
        above = storage_of(fixed)
        found = {
            place.root: (place, info)
            for pattern in _alternatives(url[len(fixed) + 1 :])
            for place, info in _matches(above, pattern.split("/"))
        }
        return above, [found[root] for root in sorted(found, key=in_order)]
    except (UserError, OSError, pa.ArrowException) as error:
        raise Unreached(str(error)) from error


def _alternatives(pattern: str) -> list[str]:
    """``part-{1,2}`` as ``part-1`` and ``part-2``."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [one for middle in braces[1].split(",") for one in _alternatives(f"{before}{middle}{after}")]


def _matches(folder: Storage, parts: list[str]) -> Iterator[tuple[Storage, fs.FileInfo]]:
    part, *more = parts
    if _WILD.search(part):
        selector = fs.FileSelector(folder.root, allow_not_found=True)
        there = asking(partial(folder.filesystem.get_file_info, selector))
        found = [info for info in there if _is_named(info.base_name, part)]
    else:
        found = [folder.info(part)]
    for info in found:
        place = folder.below(info.base_name)
        if not more and info.type != fs.FileType.NotFound:
            yield place, info
        elif more and info.type == fs.FileType.Directory:
            yield from _matches(place, more)


def _is_named(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and not name.startswith(("_", "."))
