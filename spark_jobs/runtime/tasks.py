"""How rows, and what became of parts, travel between Spark and the functions that its tasks run."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from fft.data.part_files import Part
from fft.data.worker_notes import Work
from spark_jobs.runtime.session import places_rows_by_number

#: Rows of a batch that was sorted in a worker.
_SORTED_BATCH = 1024


#: What a task yields for each file that it wrote: the fields of :class:`Part`.
PART_SCHEMA = (
    "part int, name string, rows bigint, tokens bigint, bytes bigint, tallies map<string,bigint>, rejects string"
)


def by_part(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
    """Batches whose ``part`` rises, as one stream a part. Each stream must be used up before the next is asked for."""
    slices = (cut for batch in batches for cut in _cut_at_parts(batch))
    ahead = next(slices, None)

    def of(part: int) -> Iterator[pa.RecordBatch]:
        nonlocal ahead
        while ahead is not None and ahead.column("part")[0].as_py() == part:
            yield ahead
            ahead = next(slices, None)

    while ahead is not None:
        part = ahead.column("part")[0].as_py()
        yield part, of(part)


def _cut_at_parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    if not batch.num_rows:
        return
    parts = batch.column("part").to_numpy(zero_copy_only=False)
    cuts = [0, *((parts[1:] != parts[:-1]).nonzero()[0] + 1).tolist(), batch.num_rows]
    for first, last in itertools.pairwise(cuts):
        yield batch.slice(first, last - first)


def part_to_row(part: Part) -> pa.RecordBatch:
    """A finished part as a row of :data:`PART_SCHEMA`."""
    columns = {
        "part": pa.array([part.part], pa.int32()),
        "name": pa.array([part.name], pa.string()),
        "rows": pa.array([part.rows], pa.int64()),
        "tokens": pa.array([part.tokens], pa.int64()),
        "bytes": pa.array([part.bytes], pa.int64()),
        "tallies": pa.array([list(part.tallies.items())], pa.map_(pa.string(), pa.int64())),
        "rejects": pa.array([part.rejects], pa.string()),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def to_tasks(df: DataFrame, tasks: int) -> DataFrame:
    """Bring all rows of a ``part`` to one of so many tasks: by its number modulo theirs, or as the engine can."""
    if places_rows_by_number(df.sparkSession):
        return df.repartitionById(tasks, F.col("part"))
    return df.repartition(tasks, F.col("part"))


def without_parts(df: DataFrame, parts: Collection[int]) -> DataFrame:
    """The rows of all other parts."""
    if not parts:
        return df
    gone = df.sparkSession.createDataFrame([(part,) for part in sorted(parts)], "part int")
    return df.join(F.broadcast(gone), "part", "left_anti")


@dataclass(frozen=True)
class SortedFirst:
    """``work`` on the rows of a task in the order of ``keys``, which are sorted here, in memory."""

    keys: tuple[str, ...]
    work: Work

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        held = [batch for batch in batches if batch.num_rows]
        if held:
            rows = pa.Table.from_batches(held)
            order = pc.sort_indices(rows, [(key, "ascending") for key in self.keys])
            yield from self.work(iter(rows.take(order).to_batches(max_chunksize=_SORTED_BATCH)))


def map_in_order(
    df: DataFrame, work: Work, order: Sequence[str], schema: str, profile: ResourceProfile | None = None
) -> DataFrame:
    """``work`` by ``mapInArrow`` on the rows of each task in the order of some columns.

    (Sail drops a sort whose result goes to a Python function, so there the function sorts.)
    """
    if places_rows_by_number(df.sparkSession):
        df = df.sortWithinPartitions(*order)
    else:
        work = SortedFirst(tuple(order), work)
    return df.mapInArrow(work, schema, profile=profile)


def create_tasks(spark: SparkSession, rows: Sequence[tuple], schema: str, tasks: int) -> DataFrame:
    """A small DataFrame of what each part has to do (its first column is ``part``), for so many tasks."""
    return to_tasks(spark.createDataFrame(list(rows), f"part int, {schema}"), tasks)
