"""Write one token table: its parts by tasks, under hidden names, until the job publishes all of its tables."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import pyarrow as pa
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame

from fft.console import say
from fft.data.manifest import FileInfo, Manifest
from fft.data.part_files import (
    QUARANTINE,
    Part,
    PartFolder,
    files_of,
    name_parts,
    own_files,
    publish_files,
    sum_tallies,
)
from fft.data.worker_notes import Stoppable, Work
from spark_jobs.runtime.session import user_errors
from spark_jobs.runtime.tasks import PART_SCHEMA, map_in_order
from spark_jobs.runtime.watching import watched
from spark_jobs.token_table.kept import begin_publishing, drop_parts, take_back


class TableWriter:
    """Writes one table: its parts by tasks, in one go or several; then it is told the manifest. See ``Output.claim``.

    ``target`` is what the tasks need to know of it; ``parts`` are those that are written, under their final names.
    ``waiting`` are those that a job before this one had finished.
    """

    def __init__(self, target: PartFolder) -> None:
        self.target = target
        self.parts: list[Part] = []
        self.waiting: Mapping[int, Part] = {}
        self.info = ""
        self._manifest: Manifest | None = None
        self._renames: dict[str, str] = {}

    def write(
        self,
        df: DataFrame,
        work: Work,
        order: Sequence[str],
        title: str,
        profile: ResourceProfile | None = None,
    ) -> None:
        """Run ``work`` on the tasks of ``df``, each in the order of some columns: it writes files into the target,
        and yields a row of :data:`PART_SCHEMA` for each. They get their names with the manifest.

        The progress line begins with the ``title``; a ``profile`` says what each task takes of a machine. A task that
        failed and ran again, or ran twice, leaves files of which nobody knows: they are removed then, too. Raises the
        :class:`UserError` of a task, and one when the driver does not see a file.
        """
        notes = self.target.notes
        with user_errors(), watched(df.sparkSession, title):
            rows = map_in_order(df, Stoppable(work, notes), order, PART_SCHEMA, profile).collect()
        notes.check()
        self.add([Part(**row.asDict()) for row in rows])

    def go_on(self, parts: int, of: str = "") -> frozenset[int]:
        """Take those of so many parts that wait, and say how many they are; their numbers."""
        if self.waiting:
            say(f"going on: {len(self.waiting)} of {parts} parts{of} are finished already")
            self.add(list(self.waiting.values()))
        return frozenset(self.waiting)

    def add(self, parts: Sequence[Part]) -> None:
        """Take parts as tasks have left them. Raises :class:`UserError` when the driver does not see a file."""
        named, renames = name_parts(self.target, parts)
        self.parts = sorted([*self.parts, *named], key=lambda part: part.part)
        self._renames |= renames

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

    @property
    def manifest(self) -> Manifest:
        """What :meth:`finish` was told."""
        if self._manifest is None:
            raise RuntimeError(f"the table at {self.target.folder} was not finished")
        return self._manifest

    def finish(self, manifest: Manifest, info: str = "") -> None:
        """Say what the table is, and in ``info`` for a human reader: it is published at the end of the claim."""
        self._manifest, self.info = manifest, info

    def publish(self) -> None:
        """Give all files their names; they are no table yet. Raises :class:`OSError`."""
        if self.target.kept and self._renames:
            begin_publishing(self.target)
        publish_files(self.target, self._renames, self.parts)

    def own_files(self) -> set[str]:
        """The files of the table, published or not, and what it has set aside, relative to its folder."""
        listed = self._manifest.beside if self._manifest is not None else None
        return own_files(self.parts) | ({listed[0]} if listed else set())

    def discard(self, kept: set[str], known_by_name: bool, useless: bool) -> bool:
        """Remove this job's files but for those that are ``kept`` by name, as far as that goes; and finished parts that
        outlive it if they are ``useless``. Whether the folder has files of such parts, which no reader may take.

        Published ones without the job's id in their names are removed only if they can be ``known_by_name`` alone. If
        not, another job may go on from those that outlive this one.
        """
        target, storage = self.target, self.target.storage
        stay = kept | {f"{QUARANTINE}/{PurePosixPath(name).stem}.json" for name in kept}
        waiting: set[str] = set()
        with contextlib.suppress(OSError, pa.ArrowException):
            if target.kept:
                if not known_by_name:
                    return True
                if useless:
                    drop_parts(target)
                else:
                    waiting = take_back(target, self._renames, kept)
            storage.delete([name for name in target.own() if name not in stay | waiting])
            if not target.kept and (target.suffix or known_by_name):
                storage.delete([name for name in self.own_files() if name not in stay])
            storage.below(QUARANTINE).delete_empty()
        return target.direct and bool(waiting)
