"""Texts of the documents of a token table's rows, such as their ids, whoever wrote them: a list a row, or one a row."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fft.data.known import DOC_IDS
from fft.errors import UserError

_KNOWN = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
#: What else becomes text where it is no id.
_VALUES = (pa.types.is_floating, pa.types.is_boolean)


def id_lists(column: pa.Array, where: str, name: str = DOC_IDS) -> pa.ListArray:
    """A column of ids, or of other texts of documents, as list<string>: a row's one becomes a list of it, a null stays
    null.

    Raises :class:`UserError` naming ``where`` for a column that cannot hold them, and for what is no UTF-8.
    """
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type.value_type if is_list else column.type
    if not any(is_kind(kind) for is_kind in (_KNOWN if name == DOC_IDS else (*_KNOWN, *_VALUES))):
        raise UserError(
            f"{where}: column {name} is {column.type}, it must be a list of strings, one for each document of "
            "the row: drop or rename it."
        )
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: column {name} holds what is no UTF-8: write the table again.") from error
    if is_list:
        return column.cast(pa.list_(pa.string()))
    return pa.ListArray.from_arrays(np.arange(len(column) + 1, dtype=np.int32), column.cast(pa.string()))


def names_of(lists: pa.ListArray) -> list[list[str | None]]:
    """The ids of each row; a null list is an empty one."""
    return [names or [] for names in lists.to_pylist()]


def of_rows(texts: pa.StringArray, ids: pa.ListArray) -> pa.ListArray:
    """The text of each row for each of its documents, of which the ids say how many they are."""
    counts = ids.value_lengths().to_numpy()
    ends = pa.array(np.append(0, np.cumsum(counts)), pa.int32())
    return pa.ListArray.from_arrays(ends, texts.take(pa.array(np.repeat(np.arange(len(counts)), counts))))


def as_many(lists: pa.ListArray, counts: np.ndarray, instead: pa.StringArray) -> pa.ListArray:
    """Texts for as many documents as ``counts`` says of each row: those of a row that has so many, else the row's first
    for all of them. Where one is null, it is the row's of ``instead``."""
    own = lists.value_lengths().fill_null(0).to_numpy()
    rows = np.repeat(np.arange(len(lists)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = (np.cumsum(own) - own)[rows] + np.where((own == counts)[rows], within, 0)
    found = lists.flatten().take(pa.array(at, pa.int64(), mask=(own == 0)[rows]))
    texts = pc.coalesce(found, instead.take(pa.array(rows)))
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(counts)), pa.int32()), texts)
