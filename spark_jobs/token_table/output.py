"""Write token tables: claim a folder, let tasks write its parts, publish the manifest."""

import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyspark.sql import DataFrame

from fft.console import progress
from fft.data.delta import is_delta, split_version
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, begin_writing
from fft.data.part_files import QUARANTINE, Part, publish
from fft.data.place import Place
from fft.data.worker_notes import WRITING, Channel, Stoppable, Work
from fft.errors import UserError
from spark_jobs.runtime.session import places_rows_by_number, user_errors
from spark_jobs.runtime.tasks import REPORT, SortedFirst

SPLITS = ("train", "validation")
INFO_NAME = "_data.info"

#: What may be cleared from an output folder: nothing that Spark or these jobs did not put there.
_TABLE_FILES = re.compile(
    rf".*\.parquet|\..*\.crc|_SUCCESS|_temporary|{QUARANTINE}|\.part-.*{re.escape(WRITING)}|"
    + "|".join(rf"\.?{re.escape(name)}(\.\d+)?(\.writing)?" for name in (MANIFEST_NAME, WRITING_NAME, INFO_NAME))
)


def local_path(path: str | Path, flag: str) -> Path:
    """A path as the driver sees it. Raises :class:`UserError` for a URL of another file system."""
    text = str(path)
    text = text.removeprefix("file://") if text.startswith("file:///") else text.removeprefix("file:")
    if "://" in text:
        raise UserError(f"{flag} {path} is not a path of a mounted file system: mount it (for example /Volumes/...).")
    return Path(text)


def local_paths(paths: str | Path | Sequence[str | Path], flag: str) -> list[Path]:
    """One path or several, each as :func:`local_path` gives it."""
    return [local_path(path, flag) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def check_output(
    output: Path, inputs: Sequence[Path], overwrite: bool, table_format: str = "parquet", names: Sequence[str] = ("",)
) -> None:
    """Raise :class:`UserError` when a finished table is at ``output`` and ``overwrite`` is not set, or when clearing
    the folder would hit an input or files that are no part of a table."""
    place = output.resolve()
    for path in inputs:
        source = split_version(path)[0].resolve()
        if source == place or source.is_relative_to(place) or place.is_relative_to(source):
            raise UserError(f"-o {output} and the input {path} overlap: write to a folder beside it.")
    if output.is_file():
        raise UserError(f"-o {output} is a file: give a folder.")
    tables = _tables_at(output)
    deltas = [folder for folder in tables if is_delta(folder)]
    if table_format == "delta":
        for folder in (output / name for name in names):
            if folder in deltas and not overwrite:
                raise UserError(f"-o {folder} exists: give --overwrite to add a version, or another folder.")
            if (
                folder in tables
                and folder not in deltas
                and any(not p.name.startswith(".part-") for p in folder.iterdir())
            ):
                raise UserError(f"-o {folder} exists and is no Delta table: give another folder.")
        return
    if deltas:
        raise UserError(f"-o {deltas[0]} is a Delta table: give --format delta, or another folder.")
    unfinished = any((folder / WRITING_NAME).exists() for folder in tables)
    if not unfinished and tables and any(output.iterdir()) and not overwrite:
        raise UserError(f"-o {output} exists: give --overwrite to replace it, or another folder.")
    for folder in tables:
        for path in folder.iterdir():
            if path not in tables and not _TABLE_FILES.fullmatch(path.name):
                raise UserError(f"-o {output} holds {path}, which is no part of a table: give another folder.")


def _tables_at(output: Path) -> list[Path]:
    return [folder for folder in (output, *(output / split for split in SPLITS)) if folder.is_dir()]


@contextmanager
def claim(
    output: Path, names: Sequence[str], inputs: Sequence[Path], lineage: dict, overwrite: bool, table_format: str
) -> Iterator[dict[str, Place]]:
    """Make the folders of tables ``names`` below ``output`` ("" is ``output`` itself); yields name -> :class:`Place`.

    Parquet folders are marked as being written, and cleared of what an interrupted job left or may be overwritten; see
    :func:`check_output` for what is not. A Delta table keeps its files: new ones join them under other names, and are
    nothing until the commit. A :class:`UserError` inside removes what was begun.
    """
    check_output(output, inputs, overwrite, table_format, names)
    if table_format == "delta":
        new = [output / name for name in names if not is_delta(output / name)]
        tag = f"-{uuid.uuid4().hex[:12]}"
        places = _places(output, names, tag)
        for place in places.values():
            place.folder.mkdir(parents=True, exist_ok=True)
        try:
            with user_errors():
                yield places
        except UserError:
            for folder in new:
                shutil.rmtree(folder)
            raise
        return
    tables = _tables_at(output)
    folders = {name: output / name for name in names}
    # All marks before the first deletion: whenever this stops, what is left is marked as unfinished.
    if tables:
        begin_writing(output, lineage)
    for folder in folders.values():
        begin_writing(folder, lineage)
    for folder in reversed(tables):
        for path in folder.iterdir():
            if path not in folders.values() and path.name != WRITING_NAME:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if output not in folders.values():
        (output / WRITING_NAME).unlink(missing_ok=True)
    try:
        with user_errors():
            yield _places(output, names)
    except UserError:
        shutil.rmtree(output)
        raise


def _places(output: Path, names: Sequence[str], tag: str = "") -> dict[str, Place]:
    channel = Channel(str((output / names[0]).absolute()), tag)
    return {name: Place((output / name).absolute(), channel) for name in names}


def write_parts(
    df: DataFrame,
    work: Work,
    order: Sequence[str],
    place: Place,
    name: str,
    parts: int,
    tokens: int | None = None,
) -> list[Part]:
    """Run ``work`` on the tasks of ``df``, each in the order of some columns; it writes a file a part into ``place``.

    Publishes the files. How many ``parts`` there are, and how many ``tokens`` if that is known, is for the progress
    line. A task that failed and ran again, or ran twice, leaves files that nobody reported: they are
    removed. (Sail drops a sort whose result goes to a Python function, so there the function sorts.)
    """
    channel = place.channel
    with user_errors(), progress(name, channel, parts, tokens):
        work = Stoppable(work, channel)
        if places_rows_by_number(df.sparkSession):
            df = df.sortWithinPartitions(*order)
        else:
            work = SortedFirst(tuple(order), work)
        reports = df.mapInArrow(work, REPORT).collect()
    channel.check()
    return publish(place, [Part(**row.asDict()) for row in reports])
