"""Raw inputs: which files there are, how Spark reads them, and how one record becomes a document or is malformed."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from fft.data.delta import is_delta, read_snapshot, split_version
from fft.data.manifest import is_hidden
from fft.errors import UserError
from spark_jobs.readers import COMPRESSIONS, READERS, read_row_groups, row_group_sizes, schema_of
from spark_jobs.splits import Span, Split, cut_text, piece_size

KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
#: Bytes of text in a byte of its compressed form, roughly: to deal files to parts.
_EXPANSION = 4
_BATCH_RECORDS, _BATCH_BYTES = 4096, 8 << 20


class Task(Protocol):
    """What a task takes from the inputs; it travels to the workers."""

    def columns(self, schema: pa.Schema, source: "Source") -> list[str]:
        """Columns of a parquet file to read. Raises :class:`UserError` when those of the task are not there."""

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Record and id of each row of these columns."""

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[object, str]:
        """Document and id of a record of this kind. Raises :class:`Malformed`."""


@dataclass(frozen=True)
class Keys:
    """Names of the fields that hold a document's text and its id."""

    text: str = "text"
    id: str = "id"

    def columns(self, schema: pa.Schema, source: "Source") -> list[str]:
        """The text's column, and the id's if there is one. Raises :class:`UserError` when there is no text."""
        if self.text not in schema.names:
            raise UserError(
                f"-i {source.path} has no column {self.text} (it has {', '.join(schema.names)}): "
                "name it with --text_key."
            )
        kind = schema.field(self.text).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"-i {source.path}: column {self.text} is {kind}, it must be a string.")
        return [self.text, *id_column(schema, source, self.id)]

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Texts as bytes, and ids."""
        return zip(batch.column(self.text).cast(pa.large_binary()).to_pylist(), row_ids(batch, self.id), strict=True)

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[str, str]:
        """Text and id of a record. Raises :class:`Malformed`."""
        return parse_record(kind, record, doc_id, self)


def id_column(schema: pa.Schema, source: "Source", name: str) -> list[str]:
    """``name`` if there is such a column. Raises :class:`UserError` when it cannot be an id."""
    if name not in schema.names:
        return []
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise UserError(
            f"-i {source.path}: column {name} is {kind}, an id must be a string or an integer: "
            "name another with --id_key."
        )
    return [name]


def row_ids(batch: pa.RecordBatch, name: str) -> list[str | None]:
    """The ids of a batch as strings, None where there are none."""
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    return batch.column(name).cast(pa.string()).to_pylist()


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
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return KINDS.get(os.path.splitext(name)[1])


def find_sources(inputs: Sequence[Path]) -> list[Source]:
    """List the files below the inputs. Raises :class:`UserError` for what is missing, empty or of no known kind."""
    sources = []
    for path in inputs:
        folder, version = split_version(path)
        if version is not None or is_delta(folder):
            snapshot = read_snapshot(folder, version)
            sources.append(Source(Path(f"{folder}@v{snapshot.version}"), "parquet", snapshot.files))
            continue
        if not path.exists():
            raise UserError(f"-i {path} does not exist: give a file or a folder of JSON lines, parquet or text.")
        if path.is_file():
            files = [path]
            if kind_of(path) is None:
                raise UserError(f"-i {path} is of no known kind: its name must end in {_known()}.")
        else:
            files = sorted(
                p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path)) and kind_of(p)
            )
            if not files:
                raise UserError(f"-i {path} holds no documents: no file there ends in {_known()}.")
        for kind in dict.fromkeys(kind_of(file) for file in files):
            sources.append(Source(path, kind, tuple(file for file in files if kind_of(file) == kind)))
    return sources


def _known() -> str:
    return f"{', '.join(KINDS)} (and {', '.join(COMPRESSIONS)} of the text kinds)"


def spans_of(sources: Sequence[Source], task: Task) -> list[Span]:
    """The inputs cut into pieces that can be read on their own. Raises :class:`UserError` for unreadable parquet."""
    pieces_of = piece_size(sum(source.bytes for source in sources))
    spans = []
    for source in sources:
        name = str(source.path)
        for file in source.files:
            path, size = str(file.absolute()), file.stat().st_size
            if source.kind == "parquet":
                task.columns(schema_of(path), source)
                spans += [Span(name, "parquet", path, i, i + 1, s) for i, s in enumerate(row_group_sizes(path))]
            elif file.suffix.lower() in COMPRESSIONS:
                spans.append(Span(name, source.kind, path, 0, 0, size * _EXPANSION))
            else:
                spans += cut_text(name, source.kind, path, size, pieces_of)
    return spans


def read_records(split: Split, task: Task) -> Iterator[list[tuple[bytes | None, str | None]]]:
    """Records (a JSON line or a text as bytes; an id if it stands beside) of a split, a few megabytes at a time."""
    if split.kind == "parquet":
        columns = task.columns(schema_of(split.path), Source(Path(split.path), "parquet", ()))
        for batch in read_row_groups(split.path, split.start, split.stop, columns):
            yield list(task.rows(batch))
        return
    waiting, size = [], 0
    for record in READERS[split.kind](split.path, split.start, split.stop):
        if split.kind == "json" and not record.strip():
            continue  # blank lines between records are none
        waiting.append((record, None))
        size += len(record)
        if len(waiting) == _BATCH_RECORDS or size >= _BATCH_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


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


def first_malformed(path: str, task: Task) -> str:
    """Name a file's first malformed record by line or row."""
    kind = kind_of(Path(path))
    if kind == "text":
        return path
    what = "row" if kind == "parquet" else "line"
    for number, (record, doc_id) in enumerate(_numbered(path, kind, task), 1):
        if kind == "json" and not record.strip():
            continue
        try:
            task.parse(kind, record, doc_id)
        except Malformed:
            return f"{path}, {what} {number}"
    return path


def _numbered(path: str, kind: str, task: Task) -> Iterator[tuple[bytes | None, str | None]]:
    if kind == "json":
        yield from ((line, None) for line in READERS["json"](path, 0, 0))
        return
    columns = task.columns(schema_of(path), Source(Path(path), "parquet", ()))
    for batch in read_row_groups(path, 0, len(row_group_sizes(path)), columns):
        yield from task.rows(batch)
