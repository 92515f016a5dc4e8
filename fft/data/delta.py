"""Delta tables of parquet files: the files of a version, and committing new ones, through ``deltalake`` (no Spark).

Names may pin a version: ``path@v12``. A commit of ours carries the manifest in its metadata, so that files, schema and
facts appear in one atomic step, and every older version stays readable with its own facts. Paths are local or mounted
(on Databricks a Unity Catalog volume), or, to read a log, URLs of an object store; tables with deletion vectors or
column mapping are refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq

from fft.data.manifest import Manifest
from fft.errors import UserError, one_line

_MANIFEST = "fft_manifest"
_UNREADABLE = {"deletionVectors": "deletion vectors", "columnMapping": "column mapping"}


@dataclass(frozen=True)
class Log:
    """What the log says of one version: where the table lies, its files there, and the manifest if there is one."""

    version: int
    root: str
    files: tuple[str, ...]
    manifest: Manifest | None


@dataclass(frozen=True)
class Snapshot:
    """One version of a table: its files in name order, and the manifest if a job of ours committed it."""

    version: int
    files: tuple[Path, ...]
    manifest: Manifest | None


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


def read_snapshot(folder: Path, version: int | None = None) -> Snapshot:
    """The files of a version, by default the latest. Raises :class:`UserError` for tables that cannot be read."""
    log = read_log(folder, version)
    files = tuple(sorted(_local(uri, folder) for uri in log.files))
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} is in the Delta log of {folder} but is missing: was the table vacuumed?")
    return Snapshot(log.version, files, log.manifest)


def read_log(folder: Path | str, version: int | None = None) -> Log:
    """A version, by default the latest. Raises :class:`UserError` for tables that cannot be read."""
    table = _open(folder, version)
    features = set(table.protocol().reader_features or ())
    configured = table.metadata().configuration
    if configured.get("delta.columnMapping.mode", "none") != "none":
        features.add("columnMapping")
    if found := [text for name, text in _UNREADABLE.items() if name in features]:
        raise UserError(f"{folder} uses {' and '.join(found)}, which is not read here: rewrite it without.")
    # deltalake 1.6 numbers the history of an older version wrongly; that of the latest is right.
    history = (_open(folder) if version is not None else table).history()
    text = next((entry.get(_MANIFEST) for entry in history if entry["version"] == table.version()), None)
    manifest = Manifest.from_json(text, f"the Delta log of {folder}") if text else None
    return Log(table.version(), table.table_uri, tuple(table.file_uris()), manifest)


def commit_delta(folder: Path, manifest: Manifest) -> int:
    """Make the manifest's files, which lie in ``folder``, the table's content in one commit; returns its version.

    A table that is there gets a new version, which replaces all its files. Raises :class:`UserError` when another
    writer committed meanwhile.
    """
    deltalake = _deltalake()
    from deltalake.exceptions import CommitFailedError
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
    properties = deltalake.CommitProperties(custom_metadata={_MANIFEST: manifest.to_json()}, max_commit_retries=0)
    delta_schema = deltalake.Schema.from_arrow(schema)
    try:
        if is_delta(folder):
            table = _open(folder)
            table.create_write_transaction(actions, "overwrite", delta_schema, commit_properties=properties)
        else:
            create_table_with_add_actions(str(folder), delta_schema, actions, commit_properties=properties)
    except CommitFailedError as error:
        raise UserError(f"{folder}: another writer committed while this job ran ({error}): run it again.") from error
    return _open(folder).version()


def _open(folder: Path | str, version: int | None = None) -> object:
    deltalake = _deltalake()
    from deltalake.exceptions import DeltaError, TableNotFoundError

    try:
        return deltalake.DeltaTable(str(folder), version=version)
    except TableNotFoundError as error:
        raise UserError(f"{folder} is no Delta table: leave out @v{version}, or give one.") from error
    except (DeltaError, OSError) as error:
        said = re.sub(r"\x1b\[\d+m", "", one_line(error))  # colours
        raise UserError(f"{folder}{'' if version is None else f'@v{version}'} cannot be opened: {said}.") from error


def _deltalake() -> object:
    try:
        import deltalake
    except ModuleNotFoundError as error:
        raise UserError("Delta tables need deltalake: pip install 'flash-fine-tuning[delta]'.") from error
    return deltalake


def _local(uri: str, folder: Path) -> Path:
    url = urlsplit(uri)
    if url.scheme not in ("", "file"):
        raise UserError(f"{folder} has the file {uri}, which is not on a mounted file system.")
    return Path(unquote(url.path) if url.scheme else uri)
