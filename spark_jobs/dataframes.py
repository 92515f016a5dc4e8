"""Inputs that only the engine can read: DataFrames, catalog tables, and paths of file systems that are not mounted.

Their rows have no order of their own, so a hash of its content gives each one a sort key: any engine, and any number of
its tasks, makes the same parts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructType

from fft.corpus.files import kind_of
from fft.corpus.splits import chunk_size
from fft.errors import UserError
from fft.text.records import RecordEncoder
from spark_jobs.runtime.hashing import row_hash
from spark_jobs.runtime.tasks import to_tasks

#: Columns by whose order a part's rows are written.
ORDER = ("part", "sort_key", "tie")
_TABLE_NAME = re.compile(r"\w+(\.\w+){1,2}")
#: Column of a record that is read as text: a JSON line, or a document.
_RECORD = "value"


@dataclass(frozen=True)
class Frame:
    """Rows to tokenize; ``kind`` is "parquet" for columns that are the document's, else that of a text in ``value``."""

    name: str
    kind: str
    rows: DataFrame
    schema: StructType


def is_frame(path: object) -> bool:
    """Whether an input is a DataFrame, a URL, or what looks like the name of a catalog table and is no path."""
    if isinstance(path, DataFrame):
        return True
    text = str(path)
    if text.startswith("file:"):
        return False
    unknown = not Path(text).exists() and kind_of(Path(text)) is None
    return "://" in text or (unknown and _TABLE_NAME.fullmatch(text) is not None)


def open_frame(spark: SparkSession, path: object) -> Frame:
    """The rows behind an input. Raises :class:`UserError` when the engine cannot find or read it."""
    if isinstance(path, DataFrame):
        return Frame("DataFrame", "parquet", path, path.schema)
    name = str(path)
    kind = kind_of(Path(name)) if "://" in name else None
    try:
        if "://" not in name:
            rows = spark.table(name)
        elif kind == "json":
            rows = spark.read.text(name)
        elif kind == "text":
            rows = spark.read.text(name, lineSep="\n\n")
        else:
            rows = spark.read.load(name, format="parquet")
        schema = rows.schema  # what cannot be read is met here
    except Exception as error:  # classic Spark raises py4j's own errors, Connect has others
        lines = [line.lstrip(": ") for line in str(error).splitlines() if not line.startswith("An error occurred")]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"`inputs` {name} is no existing path, and no table or URL that Spark can read: {reason}"
        ) from error
    return Frame(name, kind or "parquet", rows, schema)


def columns_of(frame: Frame, record_encoder: RecordEncoder[Any]) -> list[str]:
    """Columns to read. Raises :class:`UserError` when those that it needs are not there."""
    if frame.kind != "parquet":
        return [_RECORD]
    return record_encoder.columns(to_arrow_schema(frame.schema), frame.name)


def records_of(
    batch: pa.RecordBatch, kind: str, record_encoder: RecordEncoder[Any]
) -> list[tuple[bytes | None, str | None]]:
    """Record and id of each row of a frame's columns."""
    if kind == "parquet":
        return list(record_encoder.rows(batch))
    texts = batch.column(_RECORD).cast(pa.large_binary()).to_pylist()
    return [(text, None) for text in texts if text.strip()]  # blank lines between records are none


def count_parts(rows: DataFrame) -> int:
    """Into how many parts the rows go: as many as files of that size would."""
    size = rows.select(F.sum(F.length(_content(rows.columns)))).collect()[0][0] or 0
    return -(-size // chunk_size(size)) or 1


def in_parts(rows: DataFrame, parts: int, first: int) -> DataFrame:
    """Rows with their ``part``, counted from ``first``, and ``sort_key`` and ``tie`` that order them in it."""
    content = _content(rows.columns)
    sort_key, tie = row_hash("frame", 0, content), row_hash("tie", 1, content)
    placed = rows.withColumns({"part": F.pmod(sort_key, F.lit(parts)).cast("int"), "sort_key": sort_key, "tie": tie})
    return placed.transform(to_tasks, parts).withColumn("part", F.col("part") + F.lit(first))


def _content(columns: Sequence[str]) -> Column:
    return F.to_json(F.struct(*columns))
