"""Preferences: two documents of a row are a pair, what was chosen and what was rejected; what a reference model says of
each is kept in a file beside the table's.

A row of such a table holds pairs, one after the other, and is never cut.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fft.data.storage import Storage, reaching
from fft.errors import UserError, one_line

#: How names of files begin that hold a reference; Spark passes over them.
REFERENCE_PREFIX = "_fft_reference-"
#: Their columns, and what no log-probability is above, rounded as it may be.
_COLUMNS = pa.schema([("row", pa.int64()), ("log_probability", pa.float32())])
_HIGHEST = 1.0
#: Bytes of such a file, beside so many for each document, at most.
_LARGEST, _EACH = 1 << 20, 64


@dataclass(frozen=True)
class PairBatch:
    """The pairs of a micro-batch, by its documents: number 2k was chosen, number 2k + 1 rejected.

    int32 ``documents`` [tokens] says in which of them a token is (what is blank may have any number); float32
    ``reference`` [documents] is the reference model's log-probability of what is trained on of each, 0 where it is not
    known yet.
    """

    documents: np.ndarray
    reference: np.ndarray

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return len(self.reference) // 2


@dataclass(frozen=True)
class Reference:
    """What a reference model says of a table's documents, in the table's order: float32 log-probabilities, and of each
    the int64 :func:`row_key` of its row, which rise.
    """

    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, values: np.ndarray) -> "Reference":
        """Of documents in any order, but those of a row in theirs."""
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], values[order])

    def in_group(self, group: int, documents: np.ndarray, where: str) -> np.ndarray:
        """The log-probabilities of a row group's documents, so many a row [rows].

        Raises :class:`UserError`, naming ``where``, when they are of other documents.
        """
        rows = np.repeat(np.arange(len(documents)), documents)
        first, last = self.keys.searchsorted((row_key(group, 0), row_key(group + 1, 0)))
        if not np.array_equal(self.keys[first:last], row_key(group, rows)):
            raise UserError(
                f"{where}: its reference log-probabilities are of other documents: remove the files "
                f"{REFERENCE_PREFIX}* beside the table and begin a new run, which computes them again."
            )
        return self.values[first:last]

    def to_bytes(self) -> bytes:
        """As a parquet file."""
        sink = io.BytesIO()
        pq.write_table(pa.table([self.keys, self.values], schema=_COLUMNS), sink)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str, most: int) -> "Reference":
        """The inverse, of at most so many documents. Raises :class:`UserError`, naming ``where``, for another file, and
        for numbers that are no log-probabilities."""
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            if not file.schema_arrow.equals(_COLUMNS) or file.metadata.num_rows > most:
                raise ValueError(f"{file.metadata.num_rows:,} rows of {', '.join(file.schema_arrow.names)}")
            keys, values = (file.read().column(name).to_numpy() for name in _COLUMNS.names)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{where} holds no reference log-probabilities ({one_line(error)}): remove it and begin a new run."
            ) from error
        if (
            keys.dtype != np.int64
            or not (np.isfinite(values) & (values <= _HIGHEST)).all()
            or (np.diff(keys) < 0).any()
        ):
            raise UserError(f"{where} holds numbers that are no log-probabilities: remove it and begin a new run.")
        return cls(keys, values.astype(np.float32))


def row_key(group: int, row: np.ndarray | int) -> np.ndarray:
    """A number for a row of a row group, int64, which rises as these do."""
    return (np.int64(group) << 32) + np.asarray(row, np.int64)


def reference_name(model: str, table: str) -> str:
    """The name of the file of what a model says of a table; both are hashes, see :func:`fft.planning.objective`."""
    return f"{REFERENCE_PREFIX}{hashlib.sha256(f'{model} {table}'.encode()).hexdigest()[:16]}.parquet"


def read_reference(place: Storage, name: str, most: int) -> Reference | None:
    """What a file of this name beside a table of at most so many documents holds; None where there is none.

    Raises :class:`UserError` when it cannot be read, or is another.
    """
    if not place.exists(name):
        return None
    with reaching(place.name):
        size = place.info(name).size or 0
    if size > _LARGEST + _EACH * most:
        raise UserError(f"{place.shown(name)} is too large for this table's: remove it and begin a new run.")
    return Reference.from_bytes(place.read(name), place.shown(name), most)


def keep_reference(place: Storage, name: str, reference: Reference) -> None:
    """Write it beside a table. Raises :class:`UserError` where that is not permitted."""
    try:
        with reaching(place.name):
            place.write(name, reference.to_bytes())
    except UserError as error:
        raise UserError(
            f"{place.shown(name)} cannot be written ({error}): reference log-probabilities are kept beside the table; "
            "permit it, or give a copy of the table."
        ) from error
