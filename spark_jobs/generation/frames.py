"""Prompts that the engine reads, and answers as a DataFrame."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructType

from fft.errors import UserError, one_line
from spark_jobs.dataframes import Frame, in_parts
from spark_jobs.generation.answers import Answered, Asking, answer_chunks
from spark_jobs.generation.engine import worker_engine
from spark_jobs.generation.fields import Fields
from spark_jobs.generation.parts import GenerateParts
from spark_jobs.generation.prompts import Chunk, Place, PromptKeys, rows_of

#: Rows of a DataFrame that are asked at once.
_BATCH = 256


def frame_schema(rows: DataFrame, name: str) -> pa.Schema:
    """Its columns for Arrow. Raises :class:`UserError` for a type that Arrow does not have."""
    try:
        return to_arrow_schema(rows.schema)
    except Exception as error:  # classic Spark and Connect raise their own
        raise UserError(f"`inputs` {name} has a column that cannot go to Python: {one_line(error)}.") from error


def numbered(frame: Frame, parts: int, first: int) -> DataFrame:
    """The rows of a frame with their parts, under names that any column may have on the way."""
    return in_parts(frame.rows.toDF(*[f"_{i}" for i in range(len(frame.schema.names))]), parts, first)


def spark_schema(fields: pa.Schema) -> StructType:
    """The same columns for Spark."""
    return from_arrow_schema(fields)


def frame_chunks(
    batches: Iterator[pa.RecordBatch], names: Sequence[str], fields: Fields, keys: PromptKeys, where: tuple[str, int]
) -> Iterator[Chunk]:
    """Rows of a DataFrame with columns of these ``names``, which come first in the batches. ``where`` is what the
    DataFrame is called, and the part; -1 if it is none."""
    (name, part), first = where, 0
    for batch in batches:
        batch = batch.select(range(len(names))).rename_columns([*names])
        for start in range(0, batch.num_rows, _BATCH):
            some = batch.slice(start, _BATCH)
            rows, lines = rows_of(some, keys)
            places = [Place(f"{name}, row {line.decode(errors='backslashreplace')[:200]}", line) for line in lines]
            yield Chunk(part, first, fields.fit(some), rows, places)
            first += len(rows)


@dataclass(frozen=True)
class GenerateFrameParts(GenerateParts):
    """As :class:`GenerateParts`, but the batches hold the prompts themselves: the columns ``names`` of one input."""

    name: str
    names: Sequence[str]

    def _chunks(self, part: int, rows: Iterator[pa.RecordBatch]) -> Iterator[Chunk]:
        return frame_chunks(rows, self.names, self.fields, self.asking.keys, (self.name, part))


@dataclass(frozen=True)
class GenerateRows:
    """A function for ``mapInArrow``: rows of prompts in, rows of answers out, in their order.

    With ``fail``, a malformed row ends the job; else it stays, and the column ``error`` says why.
    """

    asking: Asking
    fields: Fields
    names: Sequence[str]
    fail: bool

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        chunks = frame_chunks(batches, self.names, self.fields, self.asking.keys, ("DataFrame", -1))
        logprobs = self.asking.sampling.logprobs is not None
        for first in chunks:
            with worker_engine(self.asking.wanted) as loaded:
                answered: Answered
                for answered in answer_chunks(loaded, self.asking, itertools.chain([first], chunks)):
                    if self.fail:
                        answered.check()
                    yield answered.table(self.fields, logprobs, not self.fail)
