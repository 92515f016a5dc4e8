"""Functions for ``mapInArrow`` whose rows are those of token tables: what transforms are, and jobs on Spark's writer.

The same functions that write part files make them, see :mod:`fft.corpus.tokenize_parts`, :mod:`spark_jobs.placing` and
:mod:`spark_jobs.token_table.pack_rows`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType

from fft.corpus.accounts import UNUSED
from fft.corpus.records import read_records
from fft.corpus.splits import Split
from fft.corpus.tokenize_parts import RecordTokenizer
from fft.data.known import DATASET, DOC_IDS, GRIDS, IMAGES, LISTS
from fft.errors import UserError
from fft.text.encoder import Encoder
from fft.text.records import RecordEncoder
from spark_jobs.dataframes import records_of
from spark_jobs.parameters import quoted_column
from spark_jobs.placing import RowChoice, as_token_rows
from spark_jobs.runtime.counting import TALLIES, Tallied
from spark_jobs.runtime.hashing import balance
from spark_jobs.runtime.tasks import by_part, map_in_order
from spark_jobs.token_table.pack_rows import Packer
from spark_jobs.token_table.read import CARRIED, ByteRows, placed_as, refuse_own, row_schema

#: Columns of malformed records that stay: why, and what they are.
ERROR, RECORD = "error", "record"
#: The tally of keys or columns of records that nothing uses.
ALL_UNUSED = f"{UNUSED}all together"
_TYPES = dict.fromkeys((*LISTS, GRIDS), "array<int>") | {IMAGES: "array<binary>"}
#: That of columns of texts, one a document.
_TEXTS = "array<string>"
_TYPES |= {DOC_IDS: _TEXTS, ERROR: "string", RECORD: "string"}
_ARROW = {"array<int>": pa.list_(pa.int32()), _TEXTS: pa.list_(pa.string()), "string": pa.string()}
_ARROW["array<binary>"] = pa.list_(pa.binary())


def token_schema(columns: Sequence[str]) -> str:
    """Spark's schema of columns of a token table; those that it does not know are texts, one a document."""
    return ", ".join(f"{quoted_column(name)} {_TYPES.get(name, _TEXTS)}" for name in columns)


def token_columns(df: DataFrame, packed: bool = False, beside: Sequence[str] = ()) -> list[str]:
    """The columns that rows of a token table have, in order, ``packed`` or not, with those ``beside`` the ids.

    Raises :class:`UserError` for no ``input_ids``, and for malformed records that
    :func:`spark_jobs.transforms.tokenize` has left there.
    """
    if "input_ids" not in df.columns:
        raise UserError(f"the DataFrame has no column input_ids (it has {', '.join(df.columns)}): tokenize it first.")
    if {ERROR, RECORD} <= {*df.columns}:
        raise UserError(
            f"the DataFrame has the columns {ERROR} and {RECORD} of malformed records: take the others, "
            f'`.where("{ERROR} is null").drop("{ERROR}", "{RECORD}")`.'
        )
    there = [name for name in CARRIED if name in df.columns or (packed and name == "cu_seqlens")]
    lists = [name for name in there if name in LISTS]
    return [*lists, DOC_IDS, *beside, *(name for name in there if name not in lists)]


def own_beside(df: DataFrame, keep: Sequence[str] | None = None) -> tuple[str, ...]:
    """The columns of texts that a DataFrame has beside ids and that are read, those to ``keep`` last.

    Raises :class:`UserError` for one to keep that is not there, or is always kept.
    """
    refuse_own(keep or ())
    missing = [name for name in keep or () if name not in df.columns]
    if missing:
        raise UserError(f"`keep` names {missing[0]}, which the DataFrame has not: it has {', '.join(df.columns)}.")
    return (*((DATASET,) if DATASET in df.columns else ()), *(keep or ()))


def token_bytes(df: DataFrame, keep: Sequence[str] | None = None) -> DataFrame:
    """Rows of a DataFrame as :func:`spark_jobs.token_table.read.read_tokens` has those of tables; they are placed under
    what its column ``dataset`` says, else all under the same. Raises as :func:`token_columns`, :func:`own_beside`."""
    lists, beside = tuple(name for name in token_columns(df) if name != DOC_IDS), own_beside(df, keep)
    return own_columns(df, keep).mapInArrow(ByteRows(lists, beside), row_schema(lists, beside))


def own_columns(df: DataFrame, keep: Sequence[str] | None = None) -> DataFrame:
    """What :class:`ByteRows` reads of a DataFrame; a packed row is placed under the dataset of its first document."""
    dataset = F.lit("")
    if DATASET in df.columns:
        listed = isinstance(df.schema[DATASET].dataType, ArrayType)
        dataset = F.coalesce((F.get(DATASET, F.lit(0)) if listed else F.col(DATASET)).cast("string"), dataset)
    return placed_as(df, dataset, own_beside(df, keep))


@dataclass
class _Collected:
    """Rows of a batch's documents, and its malformed records."""

    columns: tuple[str, ...]
    fail: bool
    rows: list[pa.RecordBatch] = field(default_factory=list)
    rejects: list[tuple[str, str | None]] = field(default_factory=list)

    def write(self, rows: pa.RecordBatch) -> None:
        self.rows.append(rows)  # whichever list that is: each take leaves a new one

    def reject(self, source: str, reason: str, record: bytes | None) -> None:
        text = None if record is None else record.decode("utf-8", "backslashreplace")
        self.rejects.append((reason, text))

    def take(self) -> Iterator[pa.RecordBatch]:
        rows, rejects, self.rows, self.rejects = self.rows, self.rejects, [], []
        if self.fail:
            yield from rows
            return
        for batch in rows:
            none = pa.nulls(batch.num_rows, pa.string())
            yield pa.RecordBatch.from_arrays([*batch.columns, none, none], [*self.columns, ERROR, RECORD])
        if rejects:
            empty = [pa.nulls(len(rejects), _ARROW[_TYPES.get(name, _TEXTS)]) for name in self.columns]
            reasons, records = (pa.array(list(texts), pa.string()) for texts in zip(*rejects, strict=True))
            yield pa.RecordBatch.from_arrays([*empty, reasons, records], [*self.columns, ERROR, RECORD])


class TokenWork(ABC):
    """A function for ``mapInArrow``; what else it counts is for :class:`spark_jobs.runtime.counting.Tallied`."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Token rows."""
        return self.rows(batches, Counter())

    @abstractmethod
    def rows(self, batches: Iterator[pa.RecordBatch], tallies: Counter[str]) -> Iterator[pa.RecordBatch]:
        """The same; what is counted is added to the ``tallies`` as it comes."""


@dataclass(frozen=True)
class EncodeRows(TokenWork):
    """Records of an input of this ``name`` and ``kind``, its ``columns``, as token rows.

    With ``fail``, a malformed record ends the work; else it stays, with nulls but for :data:`ERROR` and :data:`RECORD`.
    """

    record_encoder: RecordEncoder[Any]
    fail: bool
    name: str
    kind: str
    columns: Sequence[str]

    def rows(self, batches: Iterator[pa.RecordBatch], tallies: Counter[str]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        made = _Collected(self.record_encoder.columns_out, self.fail)
        reject = None if self.fail else made.reject
        encoder = Encoder(self.record_encoder.recipe)
        for batch in batches:
            # A tokenizer a batch: what it counts would grow where a stream does not end.
            tokenizer = RecordTokenizer(self.record_encoder, encoder, made.write, reject)
            records = records_of(batch, self.kind, self.columns, self.record_encoder)
            tokenizer.add(records, self.kind, self.name, self.name, numbered=False)
            tallies.update(_unused_as_one(tokenizer.close()))
            yield from made.take()


@dataclass(frozen=True)
class EncodeSplits(TokenWork):
    """Splits of files, which are read here, as token rows; the first malformed record ends the work."""

    record_encoder: RecordEncoder[Any]

    def rows(self, batches: Iterator[pa.RecordBatch], tallies: Counter[str]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        made = _Collected(self.record_encoder.columns_out, True)
        encoder = Encoder(self.record_encoder.recipe)
        for split in (Split(**row) for batch in batches for row in batch.to_pylist()):
            tokenizer = RecordTokenizer(self.record_encoder, encoder, made.write, None)
            for records in read_records(split, self.record_encoder, tokenizer.unused):
                tokenizer.add(records, split.kind, split.dataset, split.path)
                yield from made.take()
            tallies.update(_unused_as_one(tokenizer.close()))


def _unused_as_one(tallies: Counter[str]) -> Counter[str]:
    """Keys that nothing uses, whose names nobody knows before, are counted together."""
    unused = [name for name in tallies if name.startswith(UNUSED)]
    return Counter({n: c for n, c in tallies.items() if n not in unused}) + Counter(
        {ALL_UNUSED: sum(tallies[name] for name in unused)}
    )


@dataclass(frozen=True)
class ChosenRows(TokenWork):
    """Rows in the order of a shuffle as token rows, those that stay by ``choice``."""

    choice: RowChoice
    columns: Sequence[str]

    def rows(self, batches: Iterator[pa.RecordBatch], tallies: Counter[str]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        before = None
        for batch in batches:
            if batch.num_rows:
                chosen, counts = self.choice.of(batch, before)
                before = batch.slice(batch.num_rows - 1)
                tallies.update(counts)
                yield as_token_rows(chosen).select(self.columns)


@dataclass(frozen=True)
class PackedRows(TokenWork):
    """Rows of parts, in order, as packed token rows, each part by itself."""

    packer: Packer
    columns: Sequence[str]

    def rows(self, batches: Iterator[pa.RecordBatch], tallies: Counter[str]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        for _, rows in by_part(batches):
            yield from (packed.select(self.columns) for packed in self.packer(rows))


@dataclass(frozen=True)
class PackedInPlace:
    """Token rows as packed ones, in the order in which they come."""

    packer: Packer
    lists: tuple[str, ...]
    beside: tuple[str, ...]
    columns: Sequence[str]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        return (packed.select(self.columns) for packed in self.packer(self._bytes(batches)))

    def _bytes(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in ByteRows(self.lists, self.beside)(batches):
            full = batch.filter(pc.greater(pc.binary_length(batch.column("input_ids")), 0))
            if full.num_rows:
                part = pa.array([0] * full.num_rows, pa.int32())
                yield full.append_column("part", part)


@dataclass(frozen=True)
class Balanced:
    """One row with a list of all buckets and their tokens, as rows of ``bucket`` and ``part``."""

    parts: int

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        for batch in batches:
            for row in batch.column("weights").to_pylist():
                assigned = balance({one["bucket"]: one["tokens"] for one in row}, self.parts)
                buckets, parts = list(assigned), list(assigned.values())
                yield pa.record_batch({"bucket": pa.array(buckets, pa.int32()), "part": pa.array(parts, pa.int32())})


def counted_rows(
    df: DataFrame, work: TokenWork, columns: Sequence[str], names: Sequence[str], order: Sequence[str] = ()
) -> DataFrame:
    """Token rows of these ``columns``, and what is counted of them under ``names``, see
    :mod:`spark_jobs.runtime.counting`; with an ``order``, that of a task's rows."""
    schema, tallied = f"{token_schema(columns)}, {TALLIES} array<bigint>", Tallied(work, names)
    return map_in_order(df, tallied, order, schema) if order else df.mapInArrow(tallied, schema)
