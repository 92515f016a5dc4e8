"""Where a job writes its tables: claim the folder, let tasks write parts, publish all tables at once.

What is promised, whatever interrupts a job and whichever other job runs beside it, on a disk and in a store:

- One job at a time writes to an output; see :mod:`fft.data.owner` and :mod:`fft.data.store_owner`.
- A table that is there stays readable until the newer one has taken its place: the manifest, or the Delta commit, is
  the last thing written and appears whole or not at all. Only then do older files go.
- A job removes its own files alone, and what dead jobs have left unfinished.
"""

import contextlib
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from fft.console import say
from fft.corpus.urls import whole
from fft.data.commits import begin_replacing, begin_writing, commit_all
from fft.data.delta import check_version, commit_delta, latest_version
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME
from fft.data.owner import Owner
from fft.data.part_files import PartFolder, writing_to
from fft.data.replaceable import stranger_in
from fft.data.storage import Storage, check_names_utf8, is_url
from fft.data.store_owner import StoreOwner, check_place_unowned, owning
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from spark_jobs.runtime.session import user_errors
from spark_jobs.token_table.kept import Settled, place_of, waiting, was_interrupted
from spark_jobs.token_table.remains import (
    INFO_NAME,
    SPLITS,
    TABLE,
    check_apart,
    check_no_links,
    files_now,
    holds_table,
    is_delta_at,
    is_folder,
    remove_older,
    remove_table,
    settle,
    tables_at,
)
from spark_jobs.token_table.writer import TableWriter


def place_at(path: str | Path, parameter: str) -> str:
    """A path, or a URL of a store. Raises :class:`UserError` for no UTF-8."""
    text = str(path)
    check_names_utf8([text], f"`{parameter}`: ")
    text = text.removeprefix("file://") if text.startswith("file:///") else text.removeprefix("file:")
    return whole(text) if is_url(text) else text


def places_at(paths: str | Path | Sequence[str | Path], parameter: str) -> list[str]:
    """One path or URL or several, each as :func:`place_at` gives it."""
    return [place_at(path, parameter) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def local_path(path: str | Path, parameter: str) -> Path:
    """A path as the driver sees it. Raises :class:`UserError` for a URL of another file system, and for no UTF-8."""
    text = place_at(path, parameter)
    if is_url(text):
        raise UserError(
            f"`{parameter}` {path} is not a path of a mounted file system: mount it (for example /Volumes/...)."
        )
    return Path(text)


@dataclass(frozen=True)
class Output:
    """Where a job writes its tables ``names``: below ``folder``, a path or a URL, which is itself the table "".

    ``inputs`` are what must not be touched. ``table_format`` is "parquet" or "delta". ``versions_read`` are those of
    Delta tables that are read and then replaced, by name.
    """

    folder: str | Path
    names: Sequence[str]
    inputs: Sequence[str | Path]
    overwrite: bool
    table_format: str
    versions_read: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def place(self) -> Storage:
        """The folder."""
        return Storage.at(self.folder)

    @cached_property
    def places(self) -> dict[str, Storage]:
        """The tables' folders by name."""
        return {name: self.place.below(name) for name in self.names}

    @cached_property
    def versions(self) -> dict[str, int | None]:
        """The latest versions of Delta tables that are there at the job's start, which new ones will replace."""
        return {n: self.versions_read.get(n, latest_version(place)) for n, place in self.places.items()}

    def check(self) -> None:
        """Raise :class:`UserError` when another job writes there, when a finished table is there and ``overwrite`` is
        not set, or when clearing the folder would hit an input or files that are no part of a table."""
        check_apart(str(self.folder), self.inputs)
        self._check_place()
        self._check_content()

    def _check_place(self) -> None:
        if not self.place.is_local:
            is_folder(self.place)  # which says so where nobody answers
            bucket = self.place.root.partition("/")[0]
            with contextlib.suppress(OSError):  # who may not look may still write
                if bucket and self.place.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
                    raise UserError(f"`output` {self.folder}: there is no {bucket}: make it first, or give another.")
        else:
            target = Path(os.path.realpath(self.place.root))
            above = next(path for path in (target, *target.parents) if os.path.lexists(path))
            if not above.is_dir():
                where = "is" if above == target else "lies below"
                raise UserError(f"`output` {self.folder} {where} the file {above}: give a folder.")
            if not os.access(above, os.W_OK | os.X_OK):
                raise UserError(
                    f"`output` {self.folder} cannot be written to: {above} does not permit it to this user."
                )
        check_place_unowned(self.place, f"`output` {self.folder}")

    def _check_content(self) -> None:
        check_no_links(self.place)
        if self.place.is_local:
            above = [Storage.at(path) for path in Path(os.path.realpath(self.place.root)).parents]
        else:  # a table of another job's split
            name, root = (posixpath.dirname(path) for path in (self.place.name, self.place.root))
            above = [Storage(name, root, self.place.filesystem)] if root.strip("/") else []
        for folder in (*above, *(self.place.below(split) for split in SPLITS)):
            check_place_unowned(folder, f"{folder.name}, which `output` {self.folder} overlaps,")
        tables = tables_at(self.place)
        deltas = [folder.name for folder in tables if is_delta_at(folder)]
        if self.table_format == "delta":
            self._check_versions(tables, deltas)
            return
        if deltas:
            raise UserError(f'`output` {deltas[0]} is a Delta table: give `format="delta"`, or another folder.')
        if not self.overwrite and any(map(holds_table, tables)):
            raise UserError(f"`output` {self.folder} exists: give `overwrite=True` to replace it, or another folder.")
        self._check_strangers(tables)

    def _check_strangers(self, tables: Sequence[Storage]) -> None:
        for folder in tables:
            if (found := stranger_in(folder, TABLE)) is not None:
                raise UserError(
                    f"`output` {self.folder} holds {folder.shown(found)}, which is no part of a table: give another "
                    "folder."
                )

    def _check_versions(self, tables: Sequence[Storage], deltas: Sequence[str]) -> None:
        there = [folder.name for folder in tables]
        for folder in self.places.values():
            if folder.name in deltas:
                if not self.overwrite:
                    raise UserError(
                        f"`output` {folder.name} exists: give `overwrite=True` to add a version, or another folder."
                    )
            elif folder.name in there:
                if holds_table(folder):
                    raise UserError(f"`output` {folder.name} exists and is no Delta table: give another folder.")
                self._check_strangers([folder])
        for name, version in self.versions.items():  # seen for the first time now, before the work
            check_version(self.places[name], version)

    @contextmanager
    def claim(self, lineage: dict, work: str = "", dear: bool = False) -> Iterator[dict[str, TableWriter]]:
        """Be the one job that writes there; yields a :class:`TableWriter` for each name.

        At the end of the ``with`` block all tables are published, and what they replace is removed. When it raises,
        this job's files are removed, and what was there is as it was. But finished parts of ``work``, which names all
        that decides what is in them (see :mod:`spark_jobs.token_table.kept`), stay for the next job that does the same,
        unless the content of the inputs was at fault; ``dear`` ones stay then, too. Raises :class:`UserError` as
        :meth:`check`, and when there is no room, when another job has taken over, or a Delta table has a version that
        was not there.
        """
        self.check()
        made = self.place.is_local and not Path(self.place.root).exists()
        try:
            with contextlib.ExitStack() as held:
                with writing_to(self.folder):
                    owner = held.enter_context(owning(self.place, f"`output` {self.folder}"))
                self._check_content()  # as another job has left it meanwhile
                with self._publishing(owner, lineage, work, dear) as writers, user_errors():
                    yield writers
        finally:
            if made or not self.place.is_local:  # stores keep a folder whose last file goes
                with contextlib.suppress(OSError, pa.ArrowException):
                    self.place.delete_empty()

    @contextmanager
    def _publishing(
        self, owner: Owner | StoreOwner, lineage: dict, work: str, dear: bool
    ) -> Iterator[dict[str, TableWriter]]:
        writers: dict[str, TableWriter] = {}
        useless = False
        try:
            with writing_to(self.folder):
                left = {folder.root: settle(folder, work) for folder in tables_at(self.place)}
                self._begin(owner, lineage, writers, place_of(work))
            for name, writer in writers.items():
                writer.waiting = left.get(self.places[name].root, Settled()).parts
            if dropped := sum(settled.dropped for settled in left.values()):
                say(f"note: {dropped} finished parts that an interrupted job has left are dropped: this is other work")
            try:
                yield writers
            except UserError as error:
                useless = not dear and not was_interrupted(error)
                raise
            with writing_to(self.folder):
                owner.check()
                self._publish(writers)
        except BaseException:
            self._abandon(owner, writers, useless)
            raise
        try:
            self._tidy(writers)
        except (OSError, UserError) as error:
            say(f"note: {self.folder} is written, but what it replaces could not be removed ({error}).")

    def _begin(self, owner: Owner | StoreOwner, lineage: dict, writers: dict[str, TableWriter], waits: str) -> None:
        """Make the ``writers``, and mark their folders: as unfinished, or as being replaced if a table is there."""
        tag = f"-{owner.id}"
        notes = WorkerNotes(self.place.location, tag, owner.mark)
        in_store = isinstance(owner, StoreOwner)
        for name, folder in self.places.items():
            folder.make()
            kept = holds_table(folder)
            suffix = tag if kept or in_store or self.table_format == "delta" else ""
            # Parts that outlive their job have their places only where readers and later jobs pass over them.
            by_manifest = self.table_format == "parquet" and (not kept or folder.exists(MANIFEST_NAME))
            target = PartFolder(folder.location, notes, suffix, waits, in_store and (by_manifest or not waits))
            writers[name] = TableWriter(target)
            target.storage.below(target.kept).make()
            if not kept:
                begin_writing(folder, lineage)
            elif not is_delta_at(folder):
                begin_replacing(folder, lineage, f"{tag}.parquet")
        if "" not in self.names and is_folder(self.place) and holds_table(self.place) and not is_delta_at(self.place):
            begin_replacing(self.place, lineage, f"{tag}.parquet")  # so that its readers pass over what comes below

    def _publish(self, writers: Mapping[str, TableWriter]) -> None:
        if self.table_format == "delta":
            for name, place in self.places.items():
                check_version(place, self.versions[name])
        for writer in writers.values():
            writer.publish()
        if self.table_format == "delta":
            for name, place in self.places.items():
                commit_delta(place, writers[name].manifest, self.versions[name])
        else:
            commit_all([(folder, writers[name].manifest) for name, folder in self.places.items()])

    def _tidy(self, writers: Mapping[str, TableWriter]) -> None:
        for name, writer in writers.items():
            place = self.places[name]
            remove_older(place, writer.own_files())
            if writer.info:
                place.write(INFO_NAME, writer.info)
            place.delete([WRITING_NAME])
        if self.table_format == "parquet":
            replaced = [name for name in ("", *SPLITS) if name not in self.names]
            for folder in map(self.place.below, replaced):
                if is_folder(folder) and holds_table(folder):
                    remove_table(folder)

    def _abandon(self, owner: Owner | StoreOwner, writers: Mapping[str, TableWriter], useless: bool) -> None:
        """Remove what the job began, but for tables that it has published already, and for finished parts that outlive
        it, unless they are ``useless``."""
        with contextlib.suppress(OSError, pa.ArrowException, UserError):
            mine, left = owner.holds(), 0
            for name, writer in writers.items():
                folder = self.places[name]
                try:
                    kept = files_now(folder)
                except (OSError, UserError):
                    continue  # who cannot tell what the table is removes nothing of it
                stay = writer.discard(kept, mine, useless)
                left += sum(waiting(folder.location).values()) if mine and writer.target.kept else 0
                if mine and kept.isdisjoint(writer.own_files()) and not stay:
                    folder.delete([WRITING_NAME])
                    if name:
                        folder.delete_empty()
            if mine and "" not in self.names:
                self.place.delete([WRITING_NAME])
            if left:
                say(f"note: {left} finished parts wait in {self.folder}: the same command goes on from them")
