"""Delta tables of parquet files: the files of a version, and committing new ones, through ``deltalake`` (no Spark).

Names may pin a version: ``path@v12``. A commit of ours carries the manifest in its metadata, so that files, schema and
facts appear in one atomic step, and every older version stays readable with its own facts. Paths are local or mounted
(on Databricks a Unity Catalog volume), or, to read a log, URLs of an object store; tables with deletion vectors or
column mapping are refused.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from fft.data.manifest import Manifest, in_order
from fft.data.storage import Listing, Storage, is_url
from fft.errors import UserError, one_line

if TYPE_CHECKING:
    import deltalake

_MANIFEST = "fft_manifest"
_UNREADABLE = {"deletionVectors": "deletion vectors", "columnMapping": "column mapping"}


@dataclass(frozen=True)
class Snapshot:
    """One version of a table: its files in name order, and the manifest if a job of ours committed it.

    ``names`` are relative to the table's folder; of files that lie elsewhere, as a clone's may, they are paths.
    ``partitions`` has, of each file of a partitioned table, the values of the columns that are not in it.
    """

    version: int
    names: tuple[str, ...]
    manifest: Manifest | None
    partitions: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)


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

    Raises :class:`UserError` for tables that cannot be read, and when a file is missing.
    """
    log = _open(table.name, version)
    features = set(log.protocol().reader_features or ())
    configured = log.metadata().configuration
    if configured.get("delta.columnMapping.mode", "none") != "none":
        features.add("columnMapping")
    if found := [text for name, text in _UNREADABLE.items() if name in features]:
        raise UserError(f"{table.name} uses {' and '.join(found)}, which is not read here: rewrite it without.")
    names = tuple(sorted((_name(uri, log.table_uri, table) for uri in log.file_uris()), key=in_order))
    sizes = (listing or table.list()).sizes
    missing = next((name for name in names if name not in sizes and not table.exists(name)), None)
    if missing is not None:
        raise UserError(
            f"{table.shown(missing)} is in the Delta log of {table.name} but is missing: was the table vacuumed?"
        )
    # deltalake 1.6 numbers the history of an older version wrongly; that of the latest is right.
    history = (_open(table.name) if version is not None else log).history()
    text = next((entry.get(_MANIFEST) for entry in history if entry["version"] == log.version()), None)
    manifest = Manifest.from_json(text, f"the Delta log of {table.name}") if text else None
    return Snapshot(log.version(), names, manifest, _partitions(log))


def latest_version(folder: Path) -> int | None:
    """The latest version's number, None where there is no table. Raises :class:`UserError` when it cannot be read."""
    return _open(str(folder)).version() if is_delta(folder) else None


def commit_delta(folder: Path, manifest: Manifest, seen: int | None = None) -> int:
    """Make the manifest's files, which lie in ``folder``, the table's content in one commit; returns its version.

    ``seen`` is the latest version at the start of the job, None if there was no table: the new version replaces all
    files of that one. Raises :class:`UserError` when another writer has committed since then. What it has added would
    be lost otherwise; to keep it beside the new files would make a table that is not what the manifest says.
    """
    _need_deltalake()
    from deltalake import CommitProperties, Schema
    from deltalake.exceptions import CommitFailedError, DeltaError
    from deltalake.transaction import AddAction, create_table_with_add_actions

    paths = [folder / info.path for info in manifest.files]
    schemas = {pq.read_schema(path).remove_metadata() for path in paths}
    if len(schemas) != 1:  # the log would take whatever it is told
        raise UserError(f"the files of {folder} have {len(schemas)} different schemas: run the job again.")
    (schema,) = schemas
    actions = [
        AddAction(info.path, info.bytes, {}, int(path.stat().st_mtime * 1000), True, f'{{"numRecords": {info.rows}}}')
        for info, path in zip(manifest.files, paths, strict=True)
    ]
    properties = CommitProperties(custom_metadata={_MANIFEST: manifest.to_json()}, max_commit_retries=0)
    delta_schema = Schema.from_arrow(schema)
    try:
        if seen is not None:
            table = _open(str(folder), seen)
            table.create_write_transaction([*actions], "overwrite", delta_schema, commit_properties=properties)
        else:
            create_table_with_add_actions(str(folder), delta_schema, actions, commit_properties=properties)
    except (CommitFailedError, DeltaError) as error:
        check_version(folder, seen)
        raise UserError(f"{folder}: the commit failed ({one_line(error)}): run the job again.") from error
    return 0 if seen is None else seen + 1


def check_version(folder: Path, seen: int | None) -> None:
    """Raise :class:`UserError` when the latest version of a Delta table is no longer the one that was ``seen``."""
    found = latest_version(folder)
    if found != seen:
        was = "there was no table" if seen is None else f"version {seen} was the latest"
        raise UserError(
            f"{folder}: another writer committed version {found} while this job ran ({was} at its start), which this "
            "job would have replaced unseen; nothing was changed: run it again."
        )


def _open(table: str, version: int | None = None) -> "deltalake.DeltaTable":
    _need_deltalake()
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    try:
        return DeltaTable(table, version=version)
    except TableNotFoundError as error:
        raise UserError(f"{table} is no Delta table: leave out @v{version}, or give one.") from error
    except (DeltaError, OSError) as error:
        said = re.sub(r"\x1b\[\d+m", "", one_line(error))  # colours
        raise UserError(f"{table}{'' if version is None else f'@v{version}'} cannot be opened: {said}.") from error


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
        raise UserError("Delta tables need deltalake: pip install 'flash-fine-tuning[delta]'.")


def _name(uri: str, root: str, table: Storage) -> str:
    """A file's name below the table's ``root``, of which ``deltalake`` says both with the same escapes, or its path."""
    path, folder = uri.removeprefix("file://"), root.removeprefix("file://")
    if path.startswith(folder):
        return path.removeprefix(folder)
    if is_url(path) and not is_url(table.name):
        raise UserError(f"{table.name} has the file {uri}, which is not on a mounted file system.")
    return unquote(path) if path != uri else uri
