"""What tasks count while an engine's own writer writes their rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.utils import is_remote

from fft.console import say
from fft.data.row_tallies import row_tally_names, tally_rows

#: The column of numbers, which only the last row of a task has, whose other columns are null.
TALLIES = "fft_tallies"
_NUMBERS = pa.list_(pa.int64())


class Counting(Protocol):
    """Work for ``mapInArrow`` that also counts."""

    def rows(self, batches: Iterator[pa.RecordBatch], tallies: Counter[str]) -> Iterator[pa.RecordBatch]:
        """Token rows; what is counted of them, beside what they are, is added to the ``tallies``."""


def tally_names(own: Sequence[str], images: bool, datasets: Sequence[str] = ()) -> list[str]:
    """All that is counted of token rows, which may have images, of ``datasets``, and the work's ``own``."""
    return ["rows", "tokens", *row_tally_names(images, datasets), *own]


@dataclass(frozen=True)
class Tallied:
    """``work`` with the column :data:`TALLIES`: the sums of a task under these ``names``; others are dropped."""

    work: Counting
    names: Sequence[str]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        tallies: Counter[str] = Counter()
        schema = None
        for batch in self.work.rows(batches, tallies):
            table = pa.Table.from_batches([batch])
            tallies.update({"rows": batch.num_rows, "tokens": len(batch.column("input_ids").flatten())})
            tallies.update(tally_rows(table))
            schema = batch.schema
            yield pa.RecordBatch.from_arrays(
                [*batch.columns, pa.nulls(batch.num_rows, _NUMBERS)], [*batch.schema.names, TALLIES]
            )
        if schema is not None:
            sums = pa.array([[tallies[name] for name in self.names]], _NUMBERS)
            yield pa.RecordBatch.from_arrays([*(pa.nulls(1, f.type) for f in schema), sums], [*schema.names, TALLIES])


@contextmanager
def counting(rows: DataFrame, names: Sequence[str]) -> Iterator[tuple[DataFrame, Mapping[str, int]]]:
    """Rows that :class:`Tallied` made, without what it counted, and the sums of that, which are there after the block,
    in which the rows are used once.

    An engine that cannot observe what passes makes the rows twice, which is said.
    """
    sums = [F.sum(F.get(F.col(TALLIES), F.lit(i))).alias(f"n{i}") for i in range(len(names))]
    tallies: dict[str, int] = {}
    if _observes(rows.sparkSession):
        observation = Observation()
        yield rows.observe(observation, *sums).where(f"{TALLIES} is null").drop(TALLIES), tallies
        found = observation.get
    else:
        _tell_twice()
        yield rows.where(f"{TALLIES} is null").drop(TALLIES), tallies
        found = rows.where(f"{TALLIES} is not null").agg(*sums).collect()[0].asDict()
    tallies.update({name: found[f"n{i}"] or 0 for i, name in enumerate(names)})


@lru_cache
def _tell_twice() -> None:
    say("note: this engine cannot count rows while it writes them: they are made twice")


@lru_cache(maxsize=1)
def _observes(spark: SparkSession) -> bool:
    """Whether an engine sums up what passes: classic Spark and its Connect servers do, Sail does not."""
    if not is_remote():
        return True
    try:
        spark.range(1).observe(Observation(), F.count(F.lit(1)).alias("n")).collect()
    except PySparkException:
        return False
    return True
