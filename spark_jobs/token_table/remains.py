"""What lies in the folders of an output: tables that stay until newer ones are whole, and what is left of jobs."""

import contextlib
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from fft.data.delta import is_delta, read_snapshot
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, begin_writing, read_manifest, replacing
from fft.data.owner import OWNER_NAME
from fft.data.part_files import QUARANTINE
from fft.data.storage import Storage
from fft.data.worker_notes import WRITING
from spark_jobs.token_table.kept import FINISHED, settle_parts

SPLITS = ("train", "validation")
INFO_NAME = "_data.info"

_OURS = "|".join(rf"\.?{re.escape(name)}(\.\w+)*" for name in (MANIFEST_NAME, WRITING_NAME, INFO_NAME, OWNER_NAME))
#: What may be removed from an output folder: nothing that Spark or these jobs did not put there.
_TABLE_FILES = re.compile(
    rf".*\.parquet|\..*\.crc|_SUCCESS|_temporary|{QUARANTINE}|\.part-.*{re.escape(WRITING)}|{_OURS}"
)
#: What of it is no sign of a table: what a job has beside its parts, and parts that nobody has published.
_NO_TABLE = re.compile(
    rf"\.part-.*{re.escape(WRITING)}|{QUARANTINE}|{FINISHED}|"
    + "|".join(rf"\.?{re.escape(name)}(\.\w+)*" for name in (WRITING_NAME, OWNER_NAME))
)


def tables_at(output: Path) -> list[Path]:
    """The folders in which an output has, or may have, its tables: itself, and those of a split."""
    return [folder for folder in (output, *(output / split for split in SPLITS)) if folder.is_dir()]


def strangers(folder: Path) -> list[Path]:
    """What is no part of a table, nor a table of the split."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not _TABLE_FILES.fullmatch(path.name) and not (path.name in (*SPLITS, FINISHED) and path.is_dir())
    ]


def holds_table(folder: Path) -> bool:
    """Whether a folder that is there holds what has to stay until a newer table is whole: a table, whoever wrote it.

    What an interrupted job has left of a first try is none.
    """
    if is_delta(folder) or (folder / MANIFEST_NAME).is_file():
        return True
    mark = folder / WRITING_NAME
    if mark.is_file() and replacing(mark.read_bytes()) is None:
        return False
    return any(
        not _NO_TABLE.fullmatch(path.name) and not (path.name in SPLITS and path.is_dir()) for path in folder.iterdir()
    )


def files_now(folder: Path) -> set[str]:
    """The names of a table's files according to its manifest or log, if it has one.

    Raises :class:`UserError` for a manifest or a log that is none.
    """
    if is_delta(folder):
        return set(read_snapshot(Storage.at(str(folder))).names)
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    return {file.path for file in manifest.files} if manifest else set()


def settle(folder: Path, work: str = "") -> None:
    """Remove what interrupted jobs have left: of a table that was never finished, all; else what is no part of it.

    Finished parts of the same ``work`` stay, see :mod:`spark_jobs.token_table.kept`. Only for who owns the output:
    other jobs' files are those of dead ones.
    """
    if (folder / FINISHED).is_dir():
        settle_parts(folder, work, files_now(folder))
    mark = folder / WRITING_NAME
    ending = replacing(mark.read_bytes()) if mark.is_file() else None
    if not holds_table(folder):
        _remove(folder, ".*", {OWNER_NAME, WRITING_NAME})
    elif mark.is_file() and not is_delta(folder):
        manifest = read_manifest(folder)
        if manifest is not None:
            _remove(folder, r".*\.parquet", {file.path for file in manifest.files})
        elif ending:
            _remove(folder, f".*{re.escape(ending)}")
    for where in (folder, folder / QUARANTINE):
        for path in where.glob(f".*{WRITING}"):
            if _TABLE_FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)
    mark.unlink(missing_ok=True)


def remove_older(folder: Path, own: Collection[Path]) -> None:
    """Remove all of a table that a newer one, with its ``own`` files, has just replaced; of a Delta table, nothing."""
    shutil.rmtree(folder / FINISHED, ignore_errors=True)
    if not is_delta(folder):
        _remove(folder, ".*", {MANIFEST_NAME, OWNER_NAME, WRITING_NAME, QUARANTINE, *(path.name for path in own)})
    for path in (folder / QUARANTINE).glob("*"):
        if path not in own:
            path.unlink()
    with contextlib.suppress(OSError):
        (folder / QUARANTINE).rmdir()


def remove_table(folder: Path) -> None:
    """Remove a whole table, which until then is marked as unfinished; its folder, too, if that is empty then."""
    begin_writing(folder, {})
    _remove(folder, ".*", {OWNER_NAME, WRITING_NAME})
    (folder / WRITING_NAME).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove(folder: Path, names: str, kept: Collection[str] = ()) -> None:
    for path in folder.iterdir():
        if path.name not in kept and _TABLE_FILES.fullmatch(path.name) and re.fullmatch(names, path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
