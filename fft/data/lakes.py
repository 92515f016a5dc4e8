"""Tables whose folders hold more files than their newest version has: Delta, Iceberg, Hudi.

Read as loose files, such a folder would bring back what was overwritten or deleted. Delta tables are read by their log,
see :mod:`fft.data.delta`; the others are refused by name.
"""

import os
import posixpath
from pathlib import PurePosixPath

from pyarrow import fs

from fft.data.known import ICEBERG, LOGS
from fft.data.listing import Listing
from fft.data.manifest import is_hidden
from fft.data.storage import Storage, reaching
from fft.errors import UserError


def lake_tables(listing: Listing) -> dict[str, str]:
    """Folders of a listing that are such tables ("" is the whole), and which: "Delta", "Iceberg" or "Hudi"."""
    found = {}
    for folder in listing.folders:
        above, name = posixpath.split(folder)
        if name in LOGS:
            found[above] = LOGS[name]
    for file in listing.sizes:
        above, name = posixpath.split(file)
        if name.endswith(ICEBERG[1]) and posixpath.basename(above) == ICEBERG[0]:
            found[posixpath.dirname(above)] = "Iceberg"
    return {folder: kind for folder, kind in sorted(found.items()) if not is_hidden(PurePosixPath(folder))}


class EngineOnly(UserError):
    """A table of which files alone do not say the rows: an engine that has its ``format`` can read it.

    ``table`` is its path or URL, ``version`` that of a Delta table.
    """

    def __init__(self, table: str, format_: str, version: int | None, why: str, where: str = "") -> None:
        super().__init__(
            f"{where}{table} {why}: have Spark read it (the table's name in a catalog, or a DataFrame), or write it as "
            "parquet."
        )
        self.table, self.format, self.version = table, format_, version


def refuse_others(table: str, kind: str | None, where: str = "") -> None:
    """Raise :class:`EngineOnly` for a table of a kind that is not read here; None is no such table."""
    if kind not in (None, "Delta"):
        raise EngineOnly(table, kind, None, f"is of {kind}, whose folder also holds files of older versions", where)


def check_loose(storage: Storage, listing: Listing) -> None:
    """Raise :class:`UserError` when the files of a folder cannot be taken for one table of loose files: when it holds
    tables with a log, and for links to what is read already, or to nothing."""
    tables = lake_tables(listing)
    refuse_others(storage.name, tables.get(""))
    if tables:
        named = ", ".join(tables)
        raise UserError(f"{storage.name} is a folder of tables ({named}), not one table: name one of them.")
    seen: set[str] = set()
    for name in sorted(listing.repeated.keys() | listing.dead):
        other = listing.repeated.get(name, "")
        if name.endswith(".parquet") and not is_hidden(PurePosixPath(name)):
            if name in listing.dead:
                raise UserError(f"{storage.shown(name)} leads to nothing that can be read: remove it.")
            if other.endswith(".parquet") or other in seen:
                raise UserError(f"{storage.shown(name)} leads to a file that is read already: remove it.")
            seen.add(other)  # a file whose own name does not say what it is, as those of a cache


def check_not_inside(storage: Storage) -> None:
    """Raise :class:`UserError` when a path lies in the folder of such a table, whose log is above it."""
    local = isinstance(storage.filesystem, fs.LocalFileSystem)
    path = os.path.realpath(storage.root) if local else storage.root
    above = [str(folder) for folder in PurePosixPath(path).parents][: None if local else -1]
    marks = [(folder, kind, f"{folder}/{name}") for folder in above for name, kind in LOGS.items()]
    with reaching(storage.name):
        found = storage.filesystem.get_file_info([mark for _, _, mark in marks])
        tables = [
            (folder, kind)
            for (folder, kind, _), info in zip(marks, found, strict=True)
            if info.type == fs.FileType.Directory
        ]
        for folder in above:
            selector = fs.FileSelector(f"{folder}/{ICEBERG[0]}", allow_not_found=True)
            if any(info.path.endswith(ICEBERG[1]) for info in _files_of(storage, selector)):
                tables.append((folder, "Iceberg"))
    if tables:
        folder, kind = tables[0]
        raise UserError(
            f"{storage.name} lies in the {kind} table {folder}, of which it may be an older version: name the table."
        )


def _files_of(storage: Storage, selector: fs.FileSelector) -> list[fs.FileInfo]:
    try:
        return storage.filesystem.get_file_info(selector)
    except OSError:  # a file of that name, or a folder that is nobody's to look into
        return []
