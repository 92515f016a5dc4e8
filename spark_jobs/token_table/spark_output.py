"""Tables that Spark's own writer makes: those of a catalog, or parquet files by path or URL.

Part files are faster, and the same everywhere; where a job cannot write files itself, as into a catalog's managed
tables, Spark does it. Rows are the same. The manifest comes last: beside the data, where these are parquet files that
this machine can reach; else it is the property :data:`PROPERTY` of the table. What was there stays readable until then.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from fft.data.manifest import FileInfo, Manifest
from fft.data.part_files import Part, files_of, writing_to
from fft.data.row_tallies import TRAINED
from fft.data.storage import Storage, is_url
from fft.data.store_owner import owning
from fft.errors import UserError
from spark_jobs.parameters import is_table_name
from spark_jobs.runtime.counting import counting
from spark_jobs.runtime.session import user_errors
from spark_jobs.runtime.watching import watched
from spark_jobs.token_table.catalog import Catalogued, catalog_errors
from spark_jobs.token_table.remains import check_apart
from spark_jobs.token_table.spark_folder import Folder


def by_spark(writer: str | None, output: object) -> bool:
    """Whether Spark's own writer is to write: as the parameter says, by default where the output is a table's name.

    Raises :class:`UserError` for such a name where part files are asked for.
    """
    named = is_table_name(output)
    if writer == "parts" and named:
        raise UserError(
            f"`output` {output} names a table of a catalog, which Spark's own writer makes: leave out `writer`, or "
            f"give a folder, as ./{output} is one."
        )
    return named if writer is None else writer == "spark"


class SparkTable:
    """One table: its rows go to Spark's writer in one go, then it is told the manifest. See ``SparkOutput.claim``."""

    def __init__(self, place: Folder | Catalogued) -> None:
        self.place, self.tallies = place, Counter[str]()
        self.parts: list[Part] = []
        self.manifest: Manifest | None = None

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """The files written, or the table as one."""
        return files_of(self.parts)

    @property
    def tokens(self) -> int:
        """Tokens of all files."""
        return sum(file.tokens for file in self.files)

    def save(self, rows: DataFrame, names: Sequence[str], title: str) -> None:
        """Write rows with what tasks count of them, see :mod:`spark_jobs.runtime.counting`.

        Raises the :class:`UserError` of a task, and one where the catalog or its tables are not what they should be.
        """
        spark = rows.sparkSession
        shown = self.place.shown
        with counting(rows, names) as (counted, tallies), catalog_errors(shown), user_errors(), watched(spark, title):
            self.place.write(counted)
        self.tallies = Counter({name: count for name, count in tallies.items() if count or name == TRAINED})
        self.parts = self.place.parts(tallies["rows"], tallies["tokens"])
        written = sum(part.rows for part in self.parts)
        if written != tallies["rows"]:
            raise UserError(
                f"{self.place.shown} has {written} rows, the job made {tallies['rows']}: another writer was there; "
                "run it again."
            )
        if self.parts:
            self.parts[0].tallies.update(self.tallies)

    def finish(self, manifest: Manifest, info: str = "") -> None:
        """Say what the table is: it is published at the end of the claim. The facts for a human reader are nowhere."""
        self.manifest = manifest

    def publish(self) -> None:
        """Write the manifest. Raises :class:`UserError` where the catalog has no place for it."""
        if self.manifest is None:
            raise RuntimeError(f"{self.place.shown} was not finished")
        with catalog_errors(self.place.shown), writing_to(self.place.shown):
            self.place.commit(self.manifest)


@dataclass(frozen=True)
class SparkOutput:
    """Where Spark writes the tables ``names`` of a job, as :class:`spark_jobs.token_table.output.Output` is where the
    job does: below the folder or URL ``place``; or tables of a catalog, ``place_name`` for each name.

    ``inputs`` are what must not be touched.
    """

    session: Callable[[], SparkSession]
    place: str
    names: Sequence[str]
    inputs: Sequence[str | Path]
    overwrite: bool
    table_format: str | None

    @property
    def folder(self) -> str:
        """What to call it when talking to the user."""
        return self.place

    def check(self) -> None:
        """Raise :class:`UserError` when a table is there and ``overwrite`` is not set, or cannot be replaced."""
        for place in self._places({}).values():
            place.check()

    @contextmanager
    def claim(self, lineage: dict, work: str = "") -> Iterator[dict[str, SparkTable]]:
        """Yields a :class:`SparkTable` for each name; at the end of the ``with`` block manifests are written. When it
        raises, what Spark wrote is removed, and what was there is as it was. ``work`` says nothing here, where no part
        outlives its job. Raises :class:`UserError` as :meth:`check`, and where a table cannot be written."""
        places, root = self._places(lineage), None if is_table_name(self.place) else self._root()
        with ExitStack() as held:
            if root is not None:
                held.callback(root.delete_empty)
                with writing_to(root.name):
                    root.make()
                    held.enter_context(owning(root, f"`output` {self.place}"))
            try:
                for place in places.values():
                    place.check()
                yield (tables := {name: SparkTable(place) for name, place in places.items()})
                for table in tables.values():
                    table.publish()
            except BaseException:
                for place in places.values():
                    with suppress(Exception):  # what has gone wrong before is what the user has to hear
                        place.abandon()
                raise

    def _root(self) -> Storage:
        return Storage.at(self.place if is_url(self.place) else re.sub("^file:", "", self.place))

    def _places(self, lineage: dict) -> dict[str, Folder | Catalogued]:
        if is_table_name(self.place):
            if self.place in map(str, self.inputs):
                raise UserError(f"`output` {self.place} is an input, too: write to another table.")
            named = {name: f"{self.place}_{name}" if name else self.place for name in self.names}
            return {n: Catalogued(self.session, table, self.table_format, self.overwrite) for n, table in named.items()}
        if self.table_format not in (None, "parquet"):
            raise UserError(
                f'`writer="spark"` makes {self.table_format} of a catalog\'s table: give its name as `output`, '
                "`catalog.schema.table`, or leave out `writer`."
            )
        root = self._root()
        check_apart(self.place, [path for path in self.inputs if not is_table_name(str(path))])
        return {name: Folder(root.below(name) if name else root, self.overwrite, lineage) for name in self.names}
