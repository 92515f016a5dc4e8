"""Delta tables of parquet files: the files of a version, and committing new ones, through ``deltalake`` (no Spark).

Names may pin a version: ``path@v12``. A commit of ours carries the manifest in its metadata, so that files, schema and
facts appear in one atomic step, and every older version stays readable with its own facts. Tables lie in local or
mounted folders (on Databricks a Unity Catalog volume) or in object stores. Those of which files alone do not say the
rows, by deletion vectors or column mapping, are for an engine; features that it does not know, ``deltalake`` refuses.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from fft.data.commits import write_list
from fft.data.lakes import EngineOnly
from fft.data.listing import Listing
from fft.data.manifest import Manifest, in_order
from fft.data.storage import Storage, is_url, reaching
from fft.errors import UserError, one_line

if TYPE_CHECKING:
    import deltalake
    from deltalake.transaction import AddAction

_MANIFEST = "fft_manifest"
#: Footers that are read at once before a commit.
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class Snapshot:
    """One version of a table: its files in name order, and the manifest if a job of ours committed it.

    ``names`` are relative to the table's folder; of files that lie elsewhere, as a clone's may, they are paths.
    ``partitions`` has, of each file of a partitioned table, the values of the columns that are not in it; ``sizes``
    their bytes.
    """

    version: int
    names: tuple[str, ...]
    manifest: Manifest | None
    partitions: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


def split_version(path: str | Path) -> tuple[Path, int | None]:
    """``runs/table@v12`` -> (``runs/table``, 12); without a version, (path, None)."""
    name, version = split_name(str(path))
    return Path(name), version


def split_name(name: str) -> tuple[str, int | None]:
    """The same for a URL, of which a path would swallow a slash."""
    pinned = re.fullmatch(r"(.+)@v(\d+)", name)
    return (pinned[1], int(pinned[2])) if pinned else (name, None)


def is_delta(folder: Path) -> bool:
    """Whether a Delta log lies in the folder."""
    return (folder / "_delta_log").is_dir()


def read_snapshot(table: Storage, version: int | None = None, listing: Listing | None = None) -> Snapshot:
    """The files of a version, by default the latest; ``listing`` is what lies there, if that is known.

    Raises :class:`EngineOnly` where they are not all that decides the rows, and :class:`UserError` for tables that
    cannot be read, and when a file is missing.
    """
    log = _open(table, version)
    if found := _beside_files(log):
        raise EngineOnly(table.name, "Delta", log.version(), f"uses {' and '.join(found)}, which is not read here")
    names = tuple(sorted((_name(uri, log.table_uri, table) for uri in log.file_uris()), key=in_order))
    sizes = _sizes(table, names, listing or table.list())
    # deltalake 1.6 numbers the history of an older version wrongly; that of the latest, which comes first, is right.
    latest = _open(table) if version is not None else log
    history = latest.history(latest.version() - log.version() + 1)
    text = next((entry.get(_MANIFEST) for entry in history if entry["version"] == log.version()), None)
    manifest = Manifest.from_json(text, f"the Delta log of {table.name}", table.read) if text else None
    return Snapshot(log.version(), names, manifest, _partitions(log), sizes)


def _sizes(table: Storage, names: Iterable[str], listing: Listing) -> dict[str, int]:
    """Bytes of the files, of which some may lie elsewhere. Raises :class:`UserError` for one that is missing."""
    sizes = {}
    for name in names:
        if name in listing.sizes:
            sizes[name] = listing.sizes[name]
            continue
        with reaching(table.name):
            info = table.filesystem.get_file_info(table.path(name))
        if info.type != fs.FileType.File:
            file = table.shown(name)
            raise UserError(f"{file} is in the Delta log of {table.name} but is missing: was the table vacuumed?")
        sizes[name] = info.size
    return sizes


def _beside_files(log: "deltalake.DeltaTable") -> list[str]:
    """What of a version decides which rows there are, or what they are called, beside the parquet files."""
    found = []
    if log.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        found.append("column mapping")
    # Only files that have a deletion vector are told; most tables that may have some have none.
    if "deletionVectors" in (log.protocol().reader_features or ()) and next(iter(log.deletion_vectors()), None):
        found.append("deletion vectors")
    return found


def latest_version(table: Storage) -> int | None:
    """The latest version's number, None where there is no table. Raises :class:`UserError` when it cannot be read."""
    with reaching(table.name):
        there = table.filesystem.get_file_info(table.path("_delta_log")).type == fs.FileType.Directory
    return _open(table).version() if there else None


def commit_delta(table: Storage, manifest: Manifest, seen: int | None = None) -> int:
    """Make the manifest's files, which lie in ``table``, its content in one commit; returns its version.

    ``seen`` is the latest version at the start of the job, None if there was no table: the new version replaces all
    files of that one. The commit carries a hash of the manifest as the id of a transaction: to repeat it, because
    nobody knows whether it went through, changes nothing. Raises :class:`UserError` when another writer has committed
    since then. What it has added would be lost otherwise; to keep it beside the new files would make a table that is
    not what the manifest says.
    """
    _need_deltalake()
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.exceptions import DeltaError
    from deltalake.transaction import create_table_with_add_actions

    text = manifest.own_json()
    write_list(table, manifest)
    app = f"fft-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    schema, actions = _schema_of(table, manifest), _add_actions(table, manifest)
    properties = CommitProperties({_MANIFEST: text}, 0, [Transaction(app, 0)])
    delta_schema = Schema.from_arrow(schema)
    try:
        if _committed(table, app, text) is None:
            if seen is not None:
                log = _open(table, seen)
                log.create_write_transaction([*actions], "overwrite", delta_schema, commit_properties=properties)
            else:
                create_table_with_add_actions(_location(table), delta_schema, actions, commit_properties=properties)
    except (DeltaError, OSError) as error:
        if _committed(table, app, text) is None:
            check_version(table, seen)
            raise UserError(f"{table.name}: the commit failed ({one_line(error)}): run the job again.") from error
    return _committed(table, app, text) or 0


def _schema_of(table: Storage, manifest: Manifest) -> pa.Schema:
    """The columns of all files, of which the log would take whatever it is told."""
    paths = [table.path(info.path) for info in manifest.files]
    with reaching(table.name), ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        found = pool.map(lambda path: pq.read_schema(path, filesystem=table.filesystem).remove_metadata(), paths)
        schemas = set(found)
    if len(schemas) != 1:
        raise UserError(f"the files of {table.name} have {len(schemas)} different schemas: run the job again.")
    return schemas.pop()


def _add_actions(table: Storage, manifest: Manifest) -> "list[AddAction]":
    from deltalake.transaction import AddAction

    with reaching(table.name):
        found = table.filesystem.get_file_info([table.path(info.path) for info in manifest.files])
    return [
        AddAction(info.path, info.bytes, {}, there.mtime_ns // 10**6, True, f'{{"numRecords": {info.rows}}}')
        for info, there in zip(manifest.files, found, strict=True)
    ]


def _committed(table: Storage, app: str, manifest: str) -> int | None:
    """The version in which the transaction of this id was committed, None where it was not."""
    if latest_version(table) is None:
        return None
    log = _open(table)
    if log.transaction_version(app) is None:
        return None
    return next((entry["version"] for entry in log.history() if entry.get(_MANIFEST) == manifest), log.version())


def check_version(table: Storage, seen: int | None) -> None:
    """Raise :class:`UserError` when the latest version of a Delta table is no longer the one that was ``seen``."""
    found = latest_version(table)
    if found != seen:
        was = "there was no table" if seen is None else f"version {seen} was the latest"
        raise UserError(
            f"{table.name}: another writer committed version {found} while this job ran ({was} at its start), which "
            "this job would have replaced unseen; nothing was changed: run it again."
        )


def _location(table: Storage) -> str:
    """What ``deltalake`` calls it. Raises :class:`UserError` for a name that it takes for another."""
    if not isinstance(table.filesystem, fs.LocalFileSystem):
        return table.name
    if unquote(table.root) != table.root:
        escape = re.search("%[0-9A-Fa-f]{2}", table.root)
        raise UserError(
            f"{table.name}: {escape and escape[0]} in its path is read as another character where Delta tables are: "
            "rename the folder."
        )
    return table.root


def _open(table: Storage, version: int | None = None) -> "deltalake.DeltaTable":
    _need_deltalake()
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    try:
        return DeltaTable(_location(table), version=version)
    except TableNotFoundError as error:
        raise UserError(f"{table.name} is no Delta table: leave out @v{version}, or give one.") from error
    except (DeltaError, OSError) as error:
        said = re.sub(r"\x1b\[\d+m", "", one_line(error))  # colours
        raise UserError(f"{table.name}{'' if version is None else f'@v{version}'} cannot be opened: {said}.") from error


def _partitions(log: "deltalake.DeltaTable") -> dict[str, dict[str, str | None]]:
    """Partition values of each file, by its name as it lies in the folder."""
    columns = log.metadata().partition_columns
    if not columns:
        return {}
    files = pa.table(log.get_add_actions(flatten=True))
    values = [files.column(f"partition.{column}").cast(pa.string()).to_pylist() for column in columns]
    names = map(unquote, files.column("path").to_pylist())
    return {name: dict(zip(columns, own, strict=True)) for name, *own in zip(names, *values, strict=True)}


def _need_deltalake() -> None:
    if importlib.util.find_spec("deltalake") is None:
        raise UserError("Delta tables need deltalake: pip install deltalake.")


def _name(uri: str, root: str, table: Storage) -> str:
    """A file's name below the table's ``root``, of which ``deltalake`` says both with the same escapes, or its path."""
    path, folder = uri.removeprefix("file://"), root.removeprefix("file://")
    if path.startswith(folder):
        return path.removeprefix(folder)
    if is_url(path) and not is_url(table.name):
        raise UserError(f"{table.name} has the file {uri}, which is not on a mounted file system.")
    return unquote(path) if path != uri else uri
