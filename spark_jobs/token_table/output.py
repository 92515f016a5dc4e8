"""Write token tables: claim a folder, let tasks write its parts, publish the manifest."""

import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import DataFrame

from fft.console import progress
from fft.data.delta import commit_delta, is_delta, split_version
from fft.data.manifest import (
    MANIFEST_NAME,
    WRITING_NAME,
    FileInfo,
    Manifest,
    begin_writing,
    commit,
)
from fft.data.part_files import QUARANTINE, Part, PartFolder, files_of, publish_parts, sum_tallies
from fft.data.worker_notes import WRITING, Stoppable, Work, WorkerNotes
from fft.errors import UserError
from spark_jobs.runtime.session import places_rows_by_number, user_errors
from spark_jobs.runtime.tasks import PART_SCHEMA, SortedFirst

SPLITS = ("train", "validation")
INFO_NAME = "_data.info"

#: What may be cleared from an output folder: nothing that Spark or these jobs did not put there.
_TABLE_FILES = re.compile(
    rf".*\.parquet|\..*\.crc|_SUCCESS|_temporary|{QUARANTINE}|\.part-.*{re.escape(WRITING)}|"
    + "|".join(rf"\.?{re.escape(name)}(\.\d+)?(\.writing)?" for name in (MANIFEST_NAME, WRITING_NAME, INFO_NAME))
)


def local_path(path: str | Path, parameter: str) -> Path:
    """A path as the driver sees it. Raises :class:`UserError` for a URL of another file system."""
    text = str(path)
    text = text.removeprefix("file://") if text.startswith("file:///") else text.removeprefix("file:")
    if "://" in text:
        raise UserError(
            f"`{parameter}` {path} is not a path of a mounted file system: mount it (for example /Volumes/...)."
        )
    return Path(text)


def local_paths(paths: str | Path | Sequence[str | Path], parameter: str) -> list[Path]:
    """One path or several, each as :func:`local_path` gives it."""
    return [local_path(path, parameter) for path in ([paths] if isinstance(paths, str | Path) else paths)]


@dataclass(frozen=True)
class Output:
    """Where a job writes its tables ``names``: below ``folder``, which is itself the table "".

    ``inputs`` are what must not be touched. ``table_format`` is "parquet" or "delta".
    """

    folder: Path
    names: Sequence[str]
    inputs: Sequence[Path]
    overwrite: bool
    table_format: str

    def check(self) -> None:
        """Raise :class:`UserError` when a finished table is there and ``overwrite`` is not set, or when clearing the
        folder would hit an input or files that are no part of a table."""
        target = self.folder.resolve()
        for path in self.inputs:
            source = split_version(path)[0].resolve()
            if source == target or source.is_relative_to(target) or target.is_relative_to(source):
                raise UserError(f"`output` {self.folder} and the input {path} overlap: write to a folder beside it.")
        if self.folder.is_file():
            raise UserError(f"`output` {self.folder} is a file: give a folder.")
        tables = _tables_at(self.folder)
        deltas = [folder for folder in tables if is_delta(folder)]
        if self.table_format == "delta":
            self._check_versions(tables, deltas)
            return
        if deltas:
            raise UserError(f'`output` {deltas[0]} is a Delta table: give `table_format="delta"`, or another folder.')
        unfinished = any((folder / WRITING_NAME).exists() for folder in tables)
        if not unfinished and tables and any(self.folder.iterdir()) and not self.overwrite:
            raise UserError(f"`output` {self.folder} exists: give `overwrite=True` to replace it, or another folder.")
        for folder in tables:
            for path in folder.iterdir():
                if path not in tables and not _TABLE_FILES.fullmatch(path.name):
                    raise UserError(
                        f"`output` {self.folder} holds {path}, which is no part of a table: give another folder."
                    )

    def _check_versions(self, tables: Sequence[Path], deltas: Sequence[Path]) -> None:
        for folder in (self.folder / name for name in self.names):
            if folder in deltas:
                if not self.overwrite:
                    raise UserError(
                        f"`output` {folder} exists: give `overwrite=True` to add a version, or another folder."
                    )
            elif folder in tables and any(not path.name.startswith(".part-") for path in folder.iterdir()):
                raise UserError(f"`output` {folder} exists and is no Delta table: give another folder.")

    @contextmanager
    def claim(self, lineage: dict) -> Iterator[dict[str, "TableWriter"]]:
        """Make the folders; yields a :class:`TableWriter` for each name. Raises :class:`UserError` as :meth:`check`.

        Parquet folders are marked as being written, and cleared of what an interrupted job left or may be overwritten.
        A Delta table keeps its files: new ones join them under other names, and are nothing until the commit. A
        :class:`UserError` inside removes what was begun.
        """
        self.check()
        if self.table_format == "delta":
            begun = [self.folder / name for name in self.names if not is_delta(self.folder / name)]
            writers = self._writers(f"-{uuid.uuid4().hex[:12]}")
            for writer in writers.values():
                writer.target.folder.mkdir(parents=True, exist_ok=True)
        else:
            begun, writers = [self.folder], self._writers()
            self._clear(lineage)
        try:
            with user_errors():
                yield writers
        except UserError:
            for folder in begun:
                shutil.rmtree(folder)
            raise

    def _writers(self, tag: str = "") -> dict[str, "TableWriter"]:
        folders = {name: (self.folder / name).absolute() for name in self.names}
        notes = WorkerNotes(str(folders[self.names[0]]), tag)
        return {name: TableWriter(PartFolder(folder, notes)) for name, folder in folders.items()}

    def _clear(self, lineage: dict) -> None:
        tables = _tables_at(self.folder)
        folders = [self.folder / name for name in self.names]
        # All marks before the first deletion: whenever this stops, what is left is marked as unfinished.
        if tables:
            begin_writing(self.folder, lineage)
        for folder in folders:
            begin_writing(folder, lineage)
        for folder in reversed(tables):
            for path in folder.iterdir():
                if path not in folders and path.name != WRITING_NAME:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if self.folder not in folders:
            (self.folder / WRITING_NAME).unlink(missing_ok=True)


def _tables_at(output: Path) -> list[Path]:
    return [folder for folder in (output, *(output / split for split in SPLITS)) if folder.is_dir()]


class TableWriter:
    """Writes one table: its parts by tasks, in one go or several, then the manifest. See :meth:`Output.claim`.

    ``target`` is what the tasks need to know of it; ``parts`` are those that are written.
    """

    def __init__(self, target: PartFolder) -> None:
        self.target = target
        self.parts: list[Part] = []

    def write(
        self, df: DataFrame, work: Work, order: Sequence[str], parts: int, title: str, tokens: int | None = None
    ) -> None:
        """Run ``work`` on the tasks of ``df``, each in the order of some columns: it writes files into the target,
        and yields a row of :data:`PART_SCHEMA` for each. They get their names here.

        How many ``parts`` there are, and how many ``tokens`` if that is known, is for the progress line, which begins
        with the ``title``. A task that failed and ran again, or ran twice, leaves files of which nobody knows: they are
        removed. (Sail drops a sort whose result goes to a Python function, so there the function sorts.) Raises the
        :class:`UserError` of a task.
        """
        notes = self.target.notes
        with user_errors(), progress(title, notes, parts, tokens):
            work = Stoppable(work, notes)
            if places_rows_by_number(df.sparkSession):
                df = df.sortWithinPartitions(*order)
            else:
                work = SortedFirst(tuple(order), work)
            rows = df.mapInArrow(work, PART_SCHEMA).collect()
        notes.check()
        self.parts += publish_parts(self.target, [Part(**row.asDict()) for row in rows])

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """The files written, those of parts without rows left out."""
        return files_of(self.parts)

    @property
    def tallies(self) -> Counter[str]:
        """Sums over all parts."""
        return sum_tallies(self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of all files."""
        return sum(file.tokens for file in self.files)

    def commit(self, manifest: Manifest) -> None:
        """Publish the files that the manifest names: from now on they are the table."""
        if self.target.tag:
            commit_delta(self.target.folder, manifest)
        else:
            commit(self.target.folder, manifest)
