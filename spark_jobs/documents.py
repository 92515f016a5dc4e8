"""Raw inputs: which files there are, how Spark reads them, and how one record becomes a document or is malformed."""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import IntegerType, LongType, StringType

from fft.errors import UserError

KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
_COMPRESSIONS = (".gz", ".zst", ".bz2")


class Task(Protocol):
    """What a task takes from the inputs; it travels to the workers."""

    def columns(self, df: DataFrame, source: "Source") -> tuple[Column, Column]:
        """Record and id of a parquet file's row. Raises :class:`UserError` when there are no such columns."""

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[object, str]:
        """Document and id of a record of this kind. Raises :class:`Malformed`."""

    def row_records(self, file: pq.ParquetFile) -> Iterator[bytes | None]:
        """The records of a parquet file, read without Spark, to find one by its number."""


@dataclass(frozen=True)
class Keys:
    """Names of the fields that hold a document's text and its id."""

    text: str = "text"
    id: str = "id"

    def columns(self, df: DataFrame, source: "Source") -> tuple[Column, Column]:
        """Record and id of a parquet file's row. Raises :class:`UserError` when there are no such columns."""
        _check_columns(df, source, self)
        return F.col(self.text), F.col(self.id) if self.id in df.columns else F.lit(None)

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[str, str]:
        """Text and id of a record. Raises :class:`Malformed`."""
        return parse_record(kind, record, doc_id, self)

    def row_records(self, file: pq.ParquetFile) -> Iterator[bytes | None]:
        """The texts of a parquet file as bytes."""
        for batch in file.iter_batches(batch_size=1024, columns=[self.text]):
            yield from batch.column(0).cast(pa.binary()).to_pylist()


@dataclass(frozen=True)
class Source:
    """Files of one kind under one input path."""

    path: Path
    kind: str
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.files)


class Malformed(ValueError):
    """A record that holds no document; the message says why."""


def kind_of(path: Path) -> str | None:
    """Kind by suffix, with a compression's suffix taken off; None when unknown."""
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return KINDS.get(os.path.splitext(name)[1])


def find_sources(inputs: Sequence[Path]) -> list[Source]:
    """List the files below the inputs. Raises :class:`UserError` for what is missing, empty or of no known kind."""
    sources = []
    for path in inputs:
        if not path.exists():
            raise UserError(f"-i {path} does not exist: give a file or a folder of JSON lines, parquet or text.")
        if path.is_file():
            files = [path]
            if kind_of(path) is None:
                raise UserError(f"-i {path} is of no known kind: its name must end in {_known()}.")
        else:
            if (path / "_delta_log").exists():
                raise UserError(f"-i {path} is a Delta table, which this release does not read: export it as parquet.")
            files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path) and kind_of(p))
            if not files:
                raise UserError(f"-i {path} holds no documents: no file there ends in {_known()}.")
        for kind in dict.fromkeys(kind_of(file) for file in files):
            sources.append(Source(path, kind, tuple(file for file in files if kind_of(file) == kind)))
    return sources


def _known() -> str:
    return f"{', '.join(KINDS)} (and {', '.join(_COMPRESSIONS)} of the text kinds)"


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(("_", ".")) for part in path.relative_to(root).parts)


def read_records(spark: SparkSession, source: Source, task: Task) -> DataFrame:
    """Records as they lie in the files: ``kind``, ``file``, ``record`` (bytes: a JSON line or a text), ``id``."""
    paths = [file.absolute().as_uri() for file in source.files]
    if source.kind == "parquet":
        df = spark.read.parquet(*paths)
        record, doc_id = task.columns(df, source)
    else:
        df = spark.read.text(paths, lineSep="\n\n" if source.kind == "text" else "\n")
        record, doc_id = F.col("value"), F.lit(None)
        if source.kind == "json":
            df = df.where(F.trim("value") != "")  # blank lines between records are none
    return df.select(
        F.lit(source.kind).alias("kind"),
        F.col("_metadata.file_path").alias("file"),
        record.cast("binary").alias("record"),
        doc_id.cast("string").alias("id"),
    )


def _check_columns(df: DataFrame, source: Source, keys: Keys) -> None:
    if keys.text not in df.columns:
        raise UserError(
            f"-i {source.path} has no column {keys.text} (it has {', '.join(df.columns)}): name it with --text_key."
        )
    kind = df.schema[keys.text].dataType
    if not isinstance(kind, StringType):
        raise UserError(f"-i {source.path}: column {keys.text} is {kind.simpleString()}, it must be a string.")
    check_id(df, source, keys.id)


def check_id(df: DataFrame, source: Source, name: str) -> None:
    """Raise :class:`UserError` when there is a column ``name`` that cannot be an id."""
    if name in df.columns and not isinstance(df.schema[name].dataType, StringType | LongType | IntegerType):
        raise UserError(
            f"-i {source.path}: column {name} is {df.schema[name].dataType.simpleString()}, "
            "an id must be a string or an integer: name another with --id_key."
        )


def parse_record(kind: str, record: bytes | None, doc_id: str | None, keys: Keys) -> tuple[str, str]:
    """Text and id of one record; without an id, it is a hash of the text. Raises :class:`Malformed`."""
    if record is None:
        raise Malformed(f"{keys.text} is null")
    text = decode_record(record)
    if kind == "text":
        text = text.strip("\r\n")
    elif kind == "json":
        text, doc_id = _parse_json(text, keys)
    return text, doc_id if doc_id is not None else content_id(text)


def decode_record(record: bytes | None) -> str:
    """Text of a record's bytes."""
    try:
        return (record or b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not valid UTF-8 at byte {error.start}") from error


def load_json(line: str) -> object:
    """The JSON value of one line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not valid JSON: {error}") from error


def id_of(row: dict, key: str) -> str | None:
    """A row's own id as a string."""
    doc_id = row.get(key)
    return doc_id if doc_id is None or isinstance(doc_id, str) else json.dumps(doc_id, sort_keys=True)


def content_id(text: str) -> str:
    """The id of a document that brings none: a hash of its text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _parse_json(line: str, keys: Keys) -> tuple[str, str | None]:
    row = load_json(line)
    if not isinstance(row, dict):
        raise Malformed(f"not a JSON object but {type(row).__name__}")
    text = row.get(keys.text)
    if not isinstance(text, str):
        found = f"is {type(text).__name__}, not a string" if keys.text in row else "is missing"
        raise Malformed(f"key {keys.text} {found}")
    doc_id = id_of(row, keys.id)
    try:
        f"{text}{doc_id}".encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"a lone surrogate at character {error.start}, which is no Unicode text") from error
    return text, doc_id


def first_malformed(file: str, task: Task) -> str:
    """Name a file's first malformed record by line or row, as far as the driver can read the file."""
    url = urlsplit(file)
    path = Path(unquote(url.path))
    if url.scheme not in ("", "file") or not path.is_file():
        return file
    if kind_of(path) == "parquet":
        return _first_malformed_row(path, task)
    if kind_of(path) == "json":
        return _first_malformed_line(path, task)
    return str(path)


def _first_malformed_line(path: Path, task: Task) -> str:
    if path.suffix in (".zst", ".bz2"):
        return str(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                task.parse("json", line.rstrip(b"\r\n"), None)
            except Malformed:
                return f"{path}, line {number}"
    return str(path)


def _first_malformed_row(path: Path, task: Task) -> str:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        for number, record in enumerate(task.row_records(file), 1):
            try:
                task.parse("parquet", record, "")
            except Malformed:
                return f"{path}, row {number}"
    return str(path)
