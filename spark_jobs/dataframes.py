"""Inputs that only the engine can read: DataFrames, catalog tables, tables of Iceberg and the like, and URLs of file
systems that nothing else reaches.

Their rows have no order of their own, so a hash of its content gives each one a sort key: any engine, and any number of
its tasks, makes the same parts.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type
from pyspark.sql.types import DataType, StructType

from fft.console import say
from fft.corpus.files import kind_of
from fft.corpus.splits import chunk_size
from fft.data.footer import check_names
from fft.data.known import KINDS, file_class
from fft.data.lakes import EngineOnly
from fft.data.storage import check_names_utf8, is_url
from fft.errors import UserError
from fft.text.records import RecordEncoder
from spark_jobs.parameters import is_table_name, quoted_column
from spark_jobs.runtime.hashing import row_hash
from spark_jobs.runtime.session import lacking_connector, user_errors
from spark_jobs.runtime.tasks import to_tasks, without_parts

#: Columns by whose order a part's rows are written.
ORDER = ("part", "sort_key", "tie")
_SAFE_NAME = re.compile(r"\w+")
#: Folders in which the engine looks for the log of a Delta table, where only it can.
_FOLDERS = 50
#: Column of a record that is read as text: a JSON line, or a document.
_RECORD = "value"


@dataclass(frozen=True)
class Frame:
    """Rows to tokenize; ``kind`` is "parquet" for columns that are the document's, else that of a text in ``value``."""

    name: str
    kind: str
    rows: DataFrame
    schema: StructType


def by_reader(inputs: Sequence[str | Path | DataFrame]) -> tuple[list[object], list[str]]:
    """DataFrames and names of catalog tables, which the engine reads; and paths and URLs, whose files tasks read.

    Raises :class:`UserError` for a name that is no UTF-8.
    """
    frames = [path for path in inputs if isinstance(path, DataFrame) or is_table_name(path)]
    files = [str(path) for path in inputs if not isinstance(path, DataFrame) and not is_table_name(path)]
    check_names_utf8(files, "`inputs`: ")
    return [*frames], [re.sub("^file:(//(?=/))?", "", path) for path in files]


def open_frames(spark: SparkSession, inputs: Sequence[object]) -> list[Frame]:
    """The rows behind what :func:`by_reader` leaves to the engine, and behind what ``find_sources`` does.

    Raises :class:`UserError` when the engine cannot find or read one, and for one that is given twice.
    """
    named = [str(path) for path in inputs if isinstance(path, str | Path)]
    repeated = next((name for name in named if named.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"`inputs` gives {repeated} twice: give it once.")
    frames = []
    for path in inputs:
        if isinstance(path, DataFrame):
            frames.append(Frame("DataFrame", "parquet", path, path.schema))
        elif isinstance(path, EngineOnly) and path.format:
            frames.append(_read_lake(spark, path))
        elif isinstance(path, EngineOnly):
            frames += _read_unreached(spark, path.table)
        else:
            frames.append(_opened(str(path), "parquet", lambda name=str(path): spark.table(name)))
    return frames


def _opened(name: str, kind: str, read: Callable[[], DataFrame]) -> Frame:
    """Rows of an input. Raises :class:`UserError` where the engine does not find it."""
    try:
        rows = read()
        return Frame(name, kind, rows, rows.schema)  # what cannot be read is met here
    except Exception as error:  # classic Spark raises py4j's own errors, Connect has others
        raise UserError(
            f"`inputs` {name} is no existing path, and no table or URL that Spark can read: {_reason(error)}"
        ) from error


def _read_lake(spark: SparkSession, table: EngineOnly) -> Frame:
    """A table of a format that the engine may have. Raises the refusal itself where it does not."""
    reader, name = spark.read.format(table.format.lower()), table.table
    if table.version is not None:
        reader, name = reader.option("versionAsOf", table.version), f"{name}@v{table.version}"
    try:
        rows = reader.load(table.table if is_url(table.table) else f"file://{Path(table.table).absolute()}")
        frame = Frame(name, "parquet", rows, rows.schema)
    except Exception as error:
        raise table from error
    say(f"note: {name} is read by the engine, as a table of {table.format}")
    return frame


def _read_unreached(spark: SparkSession, url: str) -> list[Frame]:
    """A file, folder or wild card of a file system that nothing but the engine reaches: files by their kinds."""
    files = _files_seen(spark, url)
    tables = [
        folder for folder in sorted({posixpath.dirname(file) for file in files} | {url}) if _has_log(spark, folder)
    ]
    if tables:
        raise UserError(
            f"`inputs` {tables[0]} is a Delta table whose log is not readable here: have Spark read it (the table's "
            "name in a catalog, or a DataFrame)."
        )
    by_kind: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_kind[kind_of(PurePosixPath(file)) or file_class(PurePosixPath(file))].append(file)
    frames = []
    for kind, urls in by_kind.items():
        if kind not in KINDS.values():
            say(f"not read of {url}: {len(urls):,} {kind}")
        elif kind == "parquet":  # a column that only some of the files have is read where it is
            frames.append(_opened(url, kind, lambda urls=urls: spark.read.option("mergeSchema", True).parquet(*urls)))
        else:
            end = "\n\n" if kind == "text" else None
            frames.append(_opened(url, kind, lambda urls=urls, end=end: spark.read.text(urls, lineSep=end)))
    if not frames:
        raise UserError(f"`inputs` {url} holds no documents that are read here.")
    return frames


def _files_seen(spark: SparkSession, url: str) -> list[str]:
    """The files that the engine finds there. Raises :class:`UserError` where it finds no such place."""
    listing = spark.read.format("binaryFile").option("recursiveFileLookup", True)
    found = _opened(url, "parquet", lambda: listing.load(url).select("path"))
    with user_errors():
        return sorted(row["path"] for row in found.rows.collect())


def _has_log(spark: SparkSession, folder: str) -> bool:
    try:
        return bool(spark.read.text(f"{folder.rstrip('/')}/_delta_log").limit(1).collect())
    except Exception:
        return False


def _reason(error: Exception) -> str:
    lines = [line.lstrip(": ") for line in str(error).splitlines() if not line.startswith("An error occurred")]
    reason = lines[0] if lines else type(error).__name__
    return lacking_connector(error) or reason


def columns_read(frame: Frame, record_encoder: RecordEncoder[Any]) -> tuple[DataFrame, tuple[str, ...]]:
    """The rows, of the columns that are read, and the names of these in the frame.

    Names that Spark's Python functions cannot take (``a.b``), and our own, are others while the rows travel. Raises
    :class:`UserError` when those that are needed are not there, or cannot be told apart.
    """
    names = [_RECORD]
    if frame.kind == "parquet":
        check_names(frame.schema.names, f"`inputs` {frame.name}")
        fields = [(field.name, _arrow_type(field.dataType)) for field in frame.schema.fields]
        names = record_encoder.columns(pa.schema(fields), frame.name)
        _check_cases(frame, names)
    safe = [name if _SAFE_NAME.fullmatch(name) and name not in ORDER else f"_{i}" for i, name in enumerate(names)]
    columns = [_column(name).alias(other) for name, other in zip(names, safe, strict=True)]
    return frame.rows.select(*columns), tuple(names)


def _check_cases(frame: Frame, names: Sequence[str]) -> None:
    """Raise :class:`UserError` when a column is not the only one of its name to an engine that ignores its cases."""
    if frame.rows.sparkSession.conf.get("spark.sql.caseSensitive", "false") == "true":
        return
    for name in names:
        alike = [other for other in frame.schema.names if other.lower() == name.lower()]
        if len(alike) > 1:
            raise UserError(
                f"`inputs` {frame.name} has the columns {' and '.join(alike)}, one to Spark: rename all but one."
            )


def _arrow_type(kind: DataType) -> pa.DataType:
    """A type that Arrow does not have is none that is read."""
    try:
        return to_arrow_type(kind)
    except (PySparkException, TypeError):
        return pa.null()


def _column(name: str) -> Column:
    return F.col(quoted_column(name))


def records_of(
    batch: pa.RecordBatch, kind: str, columns: Sequence[str], record_encoder: RecordEncoder[Any]
) -> list[tuple[bytes | None, str | None]]:
    """Record and id of each row of a frame's ``columns``, which come first in the batch."""
    batch = batch.select(range(len(columns))).rename_columns([*columns])
    if kind == "parquet":
        return list(record_encoder.rows(batch))
    texts = batch.column(_RECORD).cast(pa.large_binary()).to_pylist()
    return [(text, None) for text in texts if text.strip()]  # blank lines between records are none


@dataclass(frozen=True)
class Measured:
    """Of rows: how many ``parts`` they go into, as many as files of that size would; how many they are; and a sum of
    hashes of their content."""

    parts: int
    rows: int
    fingerprint: str

    @classmethod
    def of(cls, rows: DataFrame) -> "Measured":
        """Look at all of them once."""
        content = _content(rows.columns)
        hashes = F.sum(row_hash("frame", 0, content).cast("decimal(38,0)"))
        count, size, sums = rows.select(F.count("*"), F.sum(F.length(content)), hashes).collect()[0]
        return cls(-(-(size or 0) // chunk_size(size or 0)) or 1, count, str(sums))


def in_parts(rows: DataFrame, parts: int, first: int, done: Collection[int] = ()) -> DataFrame:
    """Rows with their ``part``, counted from ``first``, and ``sort_key`` and ``tie`` that order them in it; those of
    parts that are ``done`` are left out."""
    content = _content(rows.columns)
    sort_key, tie = row_hash("frame", 0, content), row_hash("tie", 1, content)
    placed = rows.withColumns({"part": F.pmod(sort_key, F.lit(parts)).cast("int"), "sort_key": sort_key, "tie": tie})
    left = placed.transform(without_parts, [part - first for part in done])
    return left.transform(to_tasks, parts).withColumn("part", F.col("part") + F.lit(first))


def _content(columns: Sequence[str]) -> Column:
    return F.to_json(F.struct(*map(_column, columns)))
