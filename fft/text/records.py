"""One record of a raw file - a JSON line, a parquet row, a stretch of text - as a document, or why it is none."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import pyarrow as pa

from fft.errors import UserError
from fft.json_text import json_value
from fft.text.encoder import Encoder
from fft.text.engines import Recipe

#: What a kind of record holds: a text, or a conversation.
Document = TypeVar("Document")

#: Characters of a reason that is told, and of a key.
_LONGEST_REASON, _LONGEST_KEY = 500, 60
#: Names of unused keys that are counted each for itself, in one part; the rest is counted together.
_MOST_KEYS, _OTHER_KEYS = 50, "other keys"


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

    @property
    def vision(self) -> dict[str, Any] | None:
        """What it makes of images, as a manifest says it; None where it reads none."""

    @property
    def pairs(self) -> bool:
        """Whether its rows are preferences, see :mod:`fft.data.pairs`."""

    @property
    def bytes_beside(self) -> int:
        """About how many bytes each byte of input brings along from elsewhere, as names of images do."""

    def held(self, document: Document) -> int:
        """Bytes that a document holds beside its text."""

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """Columns of a parquet file to read. Raises :class:`UserError` when those that it needs are not there."""

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Record and id of each row of these columns."""

    def parse(
        self, kind: str, record: bytes | None, doc_id: str | None, unused: Counter[str] | None = None
    ) -> tuple[Document, str]:
        """Document and id of a record of this kind. Keys that it does not use are counted in ``unused``.

        Raises :class:`Malformed`.
        """

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

    bytes_beside: ClassVar[int] = 0

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The text's column, and the id's if there is one. Raises :class:`UserError` when there is no text."""
        if self.text not in schema.names:
            raise UserError(
                f"`inputs` {where} has no column {self.text} (it has {', '.join(schema.names)}): "
                "name it with `text_key`."
            )
        kind = column_type(schema, where, self.text)
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"`inputs` {where}: column {self.text} is {kind}, it must be a string.")
        return [self.text, *id_column(schema, where, self.id)]

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Texts as bytes, and ids."""
        return zip(batch.column(self.text).cast(pa.large_binary()).to_pylist(), row_ids(batch, self.id), strict=True)

    def parse(
        self, kind: str, record: bytes | None, doc_id: str | None, unused: Counter[str] | None = None
    ) -> tuple[str, str]:
        """Text and id of a record. Raises :class:`Malformed`."""
        return parse_record(kind, record, doc_id, self, unused)


def column_type(schema: pa.Schema, where: str, name: str) -> pa.DataType:
    """The type of a column that is there. Raises :class:`UserError` when two have that name."""
    if schema.names.count(name) > 1:
        raise UserError(f"`inputs` {where} has more than one column {name}: rename all but one.")
    return schema.field(name).type


def id_column(schema: pa.Schema, where: str, name: str) -> list[str]:
    """``name`` if there is such a column. Raises :class:`UserError` when it cannot be an id."""
    if name not in schema.names:
        return []
    kind = column_type(schema, where, name)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise UserError(
            f"`inputs` {where}: column {name} is {kind}, an id must be a string or an integer: "
            "name another with `id_key`."
        )
    return [name]


def row_ids(batch: pa.RecordBatch, name: str) -> list[str | None]:
    """The ids of a batch as strings, None where there are none.

    Bytes that are no UTF-8 become lone surrogates, at which :func:`check_id` stumbles.
    """
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    ids = batch.column(name).cast(pa.string())
    try:
        return ids.to_pylist()
    except UnicodeDecodeError:
        return [i if i is None else i.decode(errors="surrogateescape") for i in ids.cast(pa.binary()).to_pylist()]


class Malformed(ValueError):
    """A record that holds no document; the message says why, in a line that can be printed."""

    def __init__(self, reason: str) -> None:
        reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
        super().__init__(reason.encode("utf-8", "backslashreplace").decode())


def parse_record(
    kind: str, record: bytes | None, doc_id: str | None, keys: Keys, unused: Counter[str] | None = None
) -> tuple[str, str]:
    """Text and id of one record; without an id, it is a hash of the text. Raises :class:`Malformed`."""
    if record is None:
        raise Malformed(f"{keys.text} is null")
    text = decode_record(record)
    if kind == "text":
        text = text.strip("\r\n")
    elif kind == "json":
        text, doc_id = _parse_json(text, keys, unused)
    return text, content_id(text) if doc_id is None else check_id(doc_id)


def count_unused(row: Mapping[str, object], known: Collection[str], unused: Counter[str] | None, of: str = "") -> None:
    """Count the keys of a row that are not ``known`` and hold something, under their names (with ``of`` behind)."""
    if unused is None:
        return
    for key in row:
        if key not in known and row[key] is not None:
            name = f"{key[:_LONGEST_KEY]} {of}".rstrip().encode("utf-8", "backslashreplace").decode()
            unused[name if name in unused or len(unused) < _MOST_KEYS else _OTHER_KEYS] += 1


def decode_record(record: bytes | None) -> str:
    """Text of a record's bytes."""
    try:
        return (record or b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not valid UTF-8 at byte {error.start}") from error


def load_json(line: str) -> object:
    """The JSON value of one line."""
    try:
        return json_value(line)
    except ValueError as error:
        raise Malformed(f"not valid JSON: {error}") from error


def id_of(row: dict, key: str) -> str | None:
    """A row's own id as a string."""
    doc_id = row.get(key)
    return doc_id if doc_id is None or isinstance(doc_id, str) else dump_json(doc_id, ensure_ascii=True)


def dump_json(value: object, ensure_ascii: bool = False) -> str:
    """A value that :func:`load_json` gave as one text, always the same. Raises :class:`Malformed` for one too deep."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=True)
    except RecursionError as error:
        raise Malformed("nested too deeply") from error


def check_id(doc_id: str) -> str:
    """An id that can be written. Raises :class:`Malformed` for one that is no text."""
    try:
        doc_id.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"its id is not valid UTF-8 at character {error.start}") from error
    return doc_id


def content_id(text: str) -> str:
    """The id of a document that brings none: a hash of its text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _parse_json(line: str, keys: Keys, unused: Counter[str] | None) -> tuple[str, str | None]:
    row = load_json(line)
    if not isinstance(row, dict):
        raise Malformed(f"not a JSON object but {type(row).__name__}")
    text = row.get(keys.text)
    if not isinstance(text, str):
        found = f"is {type(text).__name__}, not a string" if keys.text in row else "is missing"
        raise Malformed(f"key {keys.text} {found}")
    doc_id = id_of(row, keys.id)
    count_unused(row, (keys.text, keys.id), unused)
    try:
        f"{text}{doc_id}".encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"a lone surrogate at character {error.start}, which is no Unicode text") from error
    return text, doc_id
