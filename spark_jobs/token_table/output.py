"""Where a job writes its tables: claim the folder, let tasks write parts, publish all tables at once.

What is promised, whatever interrupts a job and whichever other job runs beside it:

- One job at a time writes to an output; see :mod:`fft.data.owner`.
- A table that is there stays readable until the newer one has taken its place: the manifest, or the Delta commit, is
  the last thing written and appears whole or not at all. Only then do older files go.
- A job removes its own files alone, and what dead jobs have left unfinished.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fft.console import say
from fft.data.delta import check_version, commit_delta, is_delta, latest_version, split_version
from fft.data.manifest import WRITING_NAME, begin_replacing, begin_writing, commit_all
from fft.data.owner import OWNER_NAME, Owner, check_unowned, owned
from fft.data.part_files import PartFolder, writing_to
from fft.data.storage import Storage, check_names_utf8
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from fft.files import write_atomically
from spark_jobs.runtime.session import user_errors
from spark_jobs.token_table.kept import place_of
from spark_jobs.token_table.remains import (
    INFO_NAME,
    SPLITS,
    files_now,
    holds_table,
    remove_older,
    remove_table,
    settle,
    strangers,
    tables_at,
)
from spark_jobs.token_table.writer import TableWriter


def local_path(path: str | Path, parameter: str) -> Path:
    """A path as the driver sees it. Raises :class:`UserError` for a URL of another file system, and for no UTF-8."""
    text = str(path)
    check_names_utf8([text], f"`{parameter}`: ")
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

    ``inputs`` are what must not be touched. ``table_format`` is "parquet" or "delta". ``versions_read`` are those of
    Delta tables that are read and then replaced, by name. ``work`` names what a job does whose finished parts outlive
    it, see :mod:`spark_jobs.token_table.kept`: a job of one table.
    """

    folder: Path
    names: Sequence[str]
    inputs: Sequence[Path]
    overwrite: bool
    table_format: str
    versions_read: Mapping[str, int] = field(default_factory=dict)
    work: str = ""

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The tables' folders by name."""
        return {name: self.folder / name for name in self.names}

    @cached_property
    def versions(self) -> dict[str, int | None]:
        """The latest versions of Delta tables that are there at the job's start, which new ones will replace."""
        return {n: self.versions_read.get(n, latest_version(Storage.at(folder))) for n, folder in self.folders.items()}

    def check(self) -> None:
        """Raise :class:`UserError` when another job writes there, when a finished table is there and ``overwrite`` is
        not set, or when clearing the folder would hit an input or files that are no part of a table."""
        target = self.folder.resolve()
        for path in self.inputs:
            source = split_version(path)[0].resolve()
            if source == target or source.is_relative_to(target) or target.is_relative_to(source):
                raise UserError(f"`output` {self.folder} and the input {path} overlap: write to a folder beside it.")
        self._check_place(target)
        self._check_content()

    def _check_place(self, target: Path) -> None:
        above = next(path for path in (target, *target.parents) if os.path.lexists(path))
        if not above.is_dir():
            where = "is" if above == target else "lies below"
            raise UserError(f"`output` {self.folder} {where} the file {above}: give a folder.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"`output` {self.folder} cannot be written to: {above} does not permit it to this user.")
        check_unowned(target / OWNER_NAME, f"`output` {self.folder}")

    def _check_content(self) -> None:
        target = self.folder.resolve()
        for folder in (*target.parents, *(target / split for split in SPLITS)):
            check_unowned(folder / OWNER_NAME, f"{folder}, which `output` {self.folder} overlaps,")
        tables = tables_at(self.folder)
        deltas = [folder for folder in tables if is_delta(folder)]
        if self.table_format == "delta":
            self._check_versions(tables, deltas)
            return
        if deltas:
            raise UserError(f'`output` {deltas[0]} is a Delta table: give `table_format="delta"`, or another folder.')
        if not self.overwrite and any(map(holds_table, tables)):
            raise UserError(f"`output` {self.folder} exists: give `overwrite=True` to replace it, or another folder.")
        self._check_strangers(tables)

    def _check_strangers(self, tables: Sequence[Path]) -> None:
        if found := [path for folder in tables for path in strangers(folder)]:
            raise UserError(
                f"`output` {self.folder} holds {found[0]}, which is no part of a table: give another folder."
            )

    def _check_versions(self, tables: Sequence[Path], deltas: Sequence[Path]) -> None:
        for folder in self.folders.values():
            if folder in deltas:
                if not self.overwrite:
                    raise UserError(
                        f"`output` {folder} exists: give `overwrite=True` to add a version, or another folder."
                    )
            elif folder in tables:
                if holds_table(folder):
                    raise UserError(f"`output` {folder} exists and is no Delta table: give another folder.")
                self._check_strangers([folder])
        for name, version in self.versions.items():  # seen for the first time now, before the work
            check_version(Storage.at(self.folders[name]), version)

    @contextmanager
    def claim(self, lineage: dict) -> Iterator[dict[str, TableWriter]]:
        """Be the one job that writes there; yields a :class:`TableWriter` for each name.

        At the end of the ``with`` block all tables are published, and what they replace is removed. When it raises,
        this job's files are removed, and what was there is as it was. Raises :class:`UserError` as :meth:`check`, and
        when there is no room, when another job has taken over, or a Delta table has a version that was not there.
        """
        self.check()
        made = not self.folder.exists()
        try:
            with contextlib.ExitStack() as held:
                with writing_to(self.folder):
                    owner = held.enter_context(owned(self.folder / OWNER_NAME, f"`output` {self.folder}"))
                self._check_content()  # as another job has left it meanwhile
                with self._publishing(owner, lineage) as writers, user_errors():
                    yield writers
        finally:
            if made:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()

    @contextmanager
    def _publishing(self, owner: Owner, lineage: dict) -> Iterator[dict[str, TableWriter]]:
        writers: dict[str, TableWriter] = {}
        try:
            with writing_to(self.folder):
                for folder in tables_at(self.folder):
                    settle(folder, self.work)
                self._begin(owner, lineage, writers)
            yield writers
            owner.check()
            with writing_to(self.folder):
                self._publish(writers)
        except BaseException:
            self._abandon(owner, writers)
            raise
        try:
            self._tidy(writers)
        except OSError as error:
            say(f"note: {self.folder} is written, but what it replaces could not be removed ({error}).")

    def _begin(self, owner: Owner, lineage: dict, writers: dict[str, TableWriter]) -> None:
        """Make the ``writers``, and mark their folders: as unfinished, or as being replaced if a table is there."""
        tag = f"-{owner.id}"
        notes = WorkerNotes(str(self.folders[self.names[0]].absolute()), tag)
        for name, folder in self.folders.items():
            folder.mkdir(exist_ok=True)
            kept = holds_table(folder)
            suffix = tag if kept or self.table_format == "delta" else ""
            writers[name] = TableWriter(PartFolder(folder.absolute(), notes, suffix, place_of(self.work)))
            writers[name].target.parts.mkdir(parents=True, exist_ok=True)
            if not kept:
                begin_writing(folder, lineage)
            elif not is_delta(folder):
                begin_replacing(folder, lineage, f"{tag}.parquet")
        if self.folder not in self.folders.values() and holds_table(self.folder) and not is_delta(self.folder):
            begin_replacing(self.folder, lineage, f"{tag}.parquet")  # so that its readers pass over what comes below

    def _publish(self, writers: Mapping[str, TableWriter]) -> None:
        if self.table_format == "delta":
            for name, folder in self.folders.items():
                check_version(Storage.at(folder), self.versions[name])
        for writer in writers.values():
            writer.publish()
        if self.table_format == "delta":
            for name, folder in self.folders.items():
                commit_delta(Storage.at(folder), writers[name].manifest, self.versions[name])
        else:
            commit_all({folder: writers[name].manifest for name, folder in self.folders.items()})

    def _tidy(self, writers: Mapping[str, TableWriter]) -> None:
        for name, writer in writers.items():
            remove_older(self.folders[name], writer.own_files())
            if writer.info:
                write_atomically(self.folders[name] / INFO_NAME, writer.info)
            (self.folders[name] / WRITING_NAME).unlink(missing_ok=True)
        if self.table_format == "parquet":
            for folder in tables_at(self.folder):
                if folder not in self.folders.values() and holds_table(folder):
                    remove_table(folder)

    def _abandon(self, owner: Owner, writers: Mapping[str, TableWriter]) -> None:
        """Remove what the job began, but for tables that it has published already."""
        mine = owner.holds()
        for name, writer in writers.items():
            folder = self.folders[name]
            try:
                kept = files_now(folder)
            except (OSError, UserError):
                continue  # who cannot tell what the table is removes nothing of it
            writer.discard(kept, mine)
            if mine and kept.isdisjoint(path.name for path in writer.own_files()):
                with contextlib.suppress(OSError):
                    (folder / WRITING_NAME).unlink(missing_ok=True)
                    if folder != self.folder:
                        folder.rmdir()
        if mine and self.folder not in self.folders.values():
            with contextlib.suppress(OSError):
                (self.folder / WRITING_NAME).unlink(missing_ok=True)
