"""One record of a raw file - a JSON line, a parquet row, a stretch of text - as a document, or why it is none."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa

from fft.errors import UserError
from fft.text.encoder import Encoder, Recipe

#: What a kind of record holds: a text, or a conversation.
Document = TypeVar("Document")


class RecordEncoder(Protocol[Document]):
    """From records to token rows, as ``--task`` says; it travels to the workers."""

    @property
    def recipe(self) -> Recipe:
        """How texts become ids."""

    @property
    def columns_out(self) -> tuple[str, ...]:
        """Columns of its rows."""

    @property
    def tallies(self) -> tuple[str, ...]:
        """Names in the manifest of what it counts beside ``documents_out``, ``empty`` and ``checked``."""

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """Columns of a parquet file to read. Raises :class:`UserError` when those that it needs are not there."""

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Record and id of each row of these columns."""

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[Document, str]:
        """Document and id of a record of this kind. Raises :class:`Malformed`."""

    def token_rows(
        self, documents: Sequence[tuple[Document, str]], encoder: Encoder
    ) -> tuple[pa.RecordBatch, Counter[str]]:
        """Rows (:attr:`columns_out`) of documents with their ids, and counts under the manifest's names."""

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """What the user should know about the sums of these counts, a line each."""


@dataclass(frozen=True)
class Keys:
    """Names of the fields that hold a document's text and its id."""

    text: str = "text"
    id: str = "id"

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The text's column, and the id's if there is one. Raises :class:`UserError` when there is no text."""
        if self.text not in schema.names:
            raise UserError(
                f"`inputs` {where} has no column {self.text} (it has {', '.join(schema.names)}): "
                "name it with `text_key`."
            )
        kind = schema.field(self.text).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"`inputs` {where}: column {self.text} is {kind}, it must be a string.")
        return [self.text, *id_column(schema, where, self.id)]

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Texts as bytes, and ids."""
        return zip(batch.column(self.text).cast(pa.large_binary()).to_pylist(), row_ids(batch, self.id), strict=True)

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[str, str]:
        """Text and id of a record. Raises :class:`Malformed`."""
        return parse_record(kind, record, doc_id, self)


def id_column(schema: pa.Schema, where: str, name: str) -> list[str]:
    """``name`` if there is such a column. Raises :class:`UserError` when it cannot be an id."""
    if name not in schema.names:
        return []
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise UserError(
            f"`inputs` {where}: column {name} is {kind}, an id must be a string or an integer: "
            "name another with `id_key`."
        )
    return [name]


def row_ids(batch: pa.RecordBatch, name: str) -> list[str | None]:
    """The ids of a batch as strings, None where there are none."""
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    return batch.column(name).cast(pa.string()).to_pylist()


class Malformed(ValueError):
    """A record that holds no document; the message says why."""


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
