"""Other keys or columns of records that documents keep: as texts, one a document, beside its id."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import pyarrow as pa

from fft.data.known import DATASET, DOC_IDS, GRIDS, IMAGES, LISTS, MASK, REFUSED
from fft.errors import UserError
from fft.text.encoder import Encoder
from fft.text.engines import Recipe
from fft.text.records import Document, Malformed, RecordEncoder, column_type, decode_record, id_of, load_json

_OWN = (*LISTS, DOC_IDS, IMAGES, GRIDS, MASK, *REFUSED)
_KINDS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)


class _Row(bytes):
    """The record of a row, with what it keeps."""

    kept: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Keeping(Generic[Document]):
    """As the ``encoder``, whose rows get a column of texts for each of the ``names``: see
    :class:`fft.text.records.RecordEncoder`. What is no string in JSON becomes its JSON text."""

    encoder: RecordEncoder[Document]
    names: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        """How texts become ids."""
        return self.encoder.recipe

    @property
    def columns_out(self) -> tuple[str, ...]:
        """Columns of its rows: the kept ones last."""
        return (*self.encoder.columns_out, *self.names)

    @property
    def tallies(self) -> tuple[str, ...]:
        """Also how many documents have nothing of a name."""
        return (*self.encoder.tallies, *map(_without, self.names))

    @property
    def vision(self) -> dict[str, Any] | None:
        """What is made of images."""
        return self.encoder.vision

    @property
    def pairs(self) -> bool:
        """Whether rows are preferences."""
        return self.encoder.pairs

    @property
    def bytes_beside(self) -> int:
        """What comes from elsewhere."""
        return self.encoder.bytes_beside

    def held(self, document: tuple[Document, tuple[str | None, ...]]) -> int:
        """Bytes of a document beside its text."""
        return self.encoder.held(document[0])

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The encoder's, and the kept ones. Raises :class:`UserError` for one that is missing or no text or number."""
        for name in self.names:
            if name not in schema.names:
                there = ", ".join(schema.names)
                raise UserError(f"`inputs` {where} has no column {name} to `keep` (it has {there}): leave it out.")
            kind = column_type(schema, where, name)
            if not any(is_kind(kind) for is_kind in _KINDS):
                raise UserError(
                    f"`inputs` {where}: column {name} is {kind}, which `keep` does not carry: strings, numbers and "
                    "booleans alone; make one of it, to_json(..) in Spark, or leave it out."
                )
        return list(dict.fromkeys([*self.encoder.columns(schema, where), *self.names]))

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """As the encoder's, of the same columns."""
        columns = [batch.column(name).cast(pa.string()).to_pylist() for name in self.names]
        own = self.encoder.rows(batch.select(self.encoder.columns(batch.schema, "")))
        for (record, doc_id), kept in zip(own, zip(*columns, strict=True), strict=True):
            if record is not None:
                record = _Row(record)
                record.kept = kept
            yield record, doc_id

    def parse(
        self, kind: str, record: bytes | None, doc_id: str | None, unused: Counter[str] | None = None
    ) -> tuple[tuple[Document, tuple[str | None, ...]], str]:
        """The document and what it keeps, and its id. Raises :class:`Malformed`."""
        before = {name: unused[name] for name in self.names} if unused is not None else {}
        document, name = self.encoder.parse(kind, record, doc_id, unused)
        if unused is not None:
            for key, count in before.items():
                unused[key] = count
                if not count:
                    del unused[key]
        return (document, self._kept(kind, record)), name

    def _kept(self, kind: str, record: bytes | None) -> tuple[str | None, ...]:
        if isinstance(record, _Row):
            return record.kept
        row = load_json(decode_record(record)) if kind == "json" else None
        kept = tuple(id_of(row, name) if isinstance(row, dict) else None for name in self.names)
        for name, text in zip(self.names, kept, strict=True):
            try:
                (text or "").encode()
            except UnicodeEncodeError as error:
                raise Malformed(f"its {name} is not valid UTF-8 at character {error.start}") from error
        return kept

    def token_rows(
        self, documents: Sequence[tuple[tuple[Document, tuple[str | None, ...]], str]], encoder: Encoder
    ) -> tuple[pa.RecordBatch, Counter[str]]:
        """The encoder's rows, each with what the document keeps that it is made of."""
        numbered = [(document, str(number)) for number, ((document, _), _) in enumerate(documents)]
        rows, counts = self.encoder.token_rows(numbered, encoder)
        numbers = rows.column(DOC_IDS)
        ends, made_of = numbers.offsets, numbers.flatten().cast(pa.int64())
        texts: dict[str, list[str | None]] = {DOC_IDS: [name for _, name in documents]}
        for at, name in enumerate(self.names):
            texts[name] = [kept[at] for (_, kept), _ in documents]
            counts[_without(name)] = sum(text is None for text in texts[name])
        arrays = {name: pa.array(own, pa.string()).take(made_of) for name, own in texts.items()}
        lists = {name: pa.ListArray.from_arrays(ends, own) for name, own in arrays.items()}
        columns = dict(zip(rows.schema.names, rows.columns, strict=True)) | lists
        return pa.RecordBatch.from_arrays(list(columns.values()), list(columns)), counts

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """The encoder's, and how many documents keep nothing."""
        lacking = [f"{counts[_without(name)]} have no {name}" for name in self.names if counts.get(_without(name))]
        told = [f"note: of {counts['documents_in']} documents, {', '.join(lacking)} to keep."] if lacking else []
        return [*self.encoder.notes(counts), *told]


def _without(name: str) -> str:
    return f"without_{name}"


def kept_in(names: Sequence[str] | None) -> dict[str, Any]:
    """What a lineage says of what is kept; a column of datasets is one of every table's, and always is."""
    kept = [name for name in names or () if name != DATASET]
    return {"kept": kept} if kept else {}


def keeping(encoder: RecordEncoder[Document], names: Sequence[str] | None) -> RecordEncoder[Any]:
    """The encoder, or one that keeps columns. Raises :class:`UserError` for a name that tables use themselves."""
    own = next((name for name in names or () if name in _OWN or name in encoder.columns_out), None)
    if own is not None:
        raise UserError(f"`keep` names {own}, a column that token tables use themselves: rename it first.")
    return Keeping(encoder, tuple(names)) if names else encoder
