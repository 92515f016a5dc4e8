"""Rows of token tables, whoever wrote them, in one form: lists of int32 without padding, and ids of documents."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fft.data.arrow_lists import INTS, int_lists
from fft.data.document_ids import id_lists, names_of
from fft.data.known import DOC_IDS, LISTS, MASK
from fft.data.lengths import bound_steps
from fft.errors import UserError, one_line


def token_lists(rows: pa.RecordBatch, where: str) -> dict[str, pa.ListArray]:
    """The lists of :data:`LISTS` that rows have. A null list is an empty one; what a mask calls padding is left out.

    Raises :class:`UserError` naming ``where`` for numbers beyond 32 bits, nulls, labels of another length than the ids,
    boundaries that are none, and a mask that is none.
    """
    lists = {name: _ints(rows.column(name), name, where) for name in LISTS if name in rows.schema.names}
    lengths = lists["input_ids"].value_lengths()
    if "labels" in lists and not lists["labels"].value_lengths().equals(lengths):
        raise UserError(f"{where}: labels and input_ids differ in length: write the table again.")
    if "cu_seqlens" in lists:
        _check_bounds(lists["cu_seqlens"], lengths.to_numpy(), where)
    if MASK not in rows.schema.names:
        return lists
    mask = _ints(rows.column(MASK), MASK, where)
    if not mask.value_lengths().equals(lengths):
        raise UserError(f"{where}: {MASK} and input_ids differ in length: write the table again.")
    kept = mask.flatten().to_numpy()
    if len(kept) and not 0 <= kept.min() <= kept.max() <= 1:
        raise UserError(
            f"{where}: {MASK} holds other numbers than 0 and 1, the documents' perhaps: make cu_seqlens of it, their "
            "boundaries, and drop it."
        )
    if kept.all():
        return lists
    if "cu_seqlens" in lists:
        raise UserError(f"{where}: {MASK} says that packed rows have padding: leave it out of ids and cu_seqlens.")
    ends = np.concatenate(([0], np.cumsum(lengths.to_numpy())))
    offsets = np.concatenate(([0], np.cumsum(kept)))[ends]
    return {name: int_lists(column.flatten().to_numpy()[kept == 1], offsets) for name, column in lists.items()}


def _check_bounds(bounds: pa.ListArray, lengths: np.ndarray, where: str) -> None:
    """Rows without tokens need no boundaries, as they are left out."""
    offsets = np.concatenate(([0], np.cumsum(bounds.value_lengths().to_numpy())))
    _, wrong = bound_steps(bounds.flatten().to_numpy(), offsets, lengths)
    if (wrong & (lengths > 0)).any():
        raise UserError(f"{where}: cu_seqlens must rise from 0 to the row's length: write the table again.")


def _ints(column: pa.Array, name: str, where: str) -> pa.ListArray:
    try:
        lists = pc.fill_null(column.cast(INTS), pa.scalar([], INTS))
    except pa.ArrowException as error:
        raise UserError(
            f"{where}: column {name} holds what is no list of 32-bit integers ({one_line(error)}): write it again."
        ) from error
    if lists.flatten().null_count:
        raise UserError(f"{where}: column {name} holds nulls inside of lists: write the table again without them.")
    return lists


def doc_ids(rows: pa.RecordBatch, contents: pa.BinaryArray, where: str) -> pa.ListArray:
    """Ids of the documents of rows that have them, of others a hash of the content; a row may also have its one id.

    Raises :class:`UserError` naming ``where`` for a column that cannot hold ids.
    """
    named: Sequence[list[str | None]] = [[]] * rows.num_rows
    if DOC_IDS in rows.schema.names:
        column = id_lists(rows.column(DOC_IDS), where)
        if _is_full(column):
            return column
        named = names_of(column)
    hashed = (hashlib.blake2b(content.as_buffer(), digest_size=8).hexdigest() for content in contents)
    filled = [
        [other if name is None else name for name in own or [None]] for own, other in zip(named, hashed, strict=True)
    ]
    return pa.array(filled, pa.list_(pa.string()))


def _is_full(lists: pa.ListArray) -> bool:
    shortest = pc.min(lists.value_lengths()).as_py()  # None of no rows
    return not lists.null_count and not lists.flatten().null_count and bool(shortest)
