"""Ids of the documents of a token table's rows, whoever wrote them: a list a row, or one id a row."""

import numpy as np
import pyarrow as pa

from fft.data.known import DOC_IDS
from fft.errors import UserError


def id_lists(column: pa.Array, where: str) -> pa.ListArray:
    """A column of ids as list<string>: a row's one id becomes a list of it, a null stays null.

    Raises :class:`UserError` naming ``where`` for a column that cannot hold ids, and for ids that are no UTF-8.
    """
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    kind = column.type.value_type if is_list else column.type
    known = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in known):
        raise UserError(
            f"{where}: column {DOC_IDS} is {column.type}, it must be a list of strings, an id for each document of "
            "the row: drop or rename it."
        )
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: column {DOC_IDS} holds what is no UTF-8: write the table again.") from error
    if is_list:
        return column.cast(pa.list_(pa.string()))
    return pa.ListArray.from_arrays(np.arange(len(column) + 1, dtype=np.int32), column.cast(pa.string()))


def names_of(lists: pa.ListArray) -> list[list[str | None]]:
    """The ids of each row; a null list is an empty one."""
    return [names or [] for names in lists.to_pylist()]
