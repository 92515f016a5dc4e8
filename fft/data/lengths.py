"""Where documents end, and how long they are: a histogram that tasks count and the manifest keeps."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import INTS
from fft.errors import UserError

_PREFIX = "length "


def document_lengths(rows: pa.Table) -> np.ndarray:
    """Tokens of every document of token rows: from ``cu_seqlens`` where rows are packed, else one document a row."""
    if "cu_seqlens" not in rows.column_names:
        return rows.column("input_ids").combine_chunks().value_lengths().to_numpy()
    bounds = rows.column("cu_seqlens").combine_chunks().cast(INTS)
    values = bounds.flatten().to_numpy()
    last = np.cumsum(bounds.value_lengths().to_numpy()) - 1
    return np.delete(np.diff(values), last[:-1])  # differences across two rows are no documents


def documents_by_row(rows: pa.Table) -> np.ndarray:
    """How many of these documents each row has."""
    if "cu_seqlens" not in rows.column_names:
        return np.ones(len(rows), np.int64)
    return rows.column("cu_seqlens").combine_chunks().value_lengths().to_numpy() - 1


def bound_steps(bounds: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The step to each of the rows' ``cu_seqlens`` from the one before, and which rows' are none.

    ``bounds`` are those of all rows, row i's from ``offsets[i]`` to ``offsets[i + 1]``; ``lengths`` are the rows'
    tokens, to which they must rise from 0. The step to a row's first is 0.
    """
    bounds = bounds.astype(np.int64)  # differences of unsigned numbers would never be negative
    counts = np.diff(offsets)
    steps = np.diff(bounds, prepend=0)
    first = offsets[:-1][counts > 0]
    steps[first] = 0
    wrong = counts < 2
    if len(bounds):
        filled = counts > 0
        wrong[filled] |= (bounds[first] != 0) | (bounds[offsets[1:][filled] - 1] != lengths[filled])
        wrong[np.repeat(np.arange(len(lengths)), counts)[steps < 0]] = True
    return steps, wrong


def tally_lengths(lengths: np.ndarray) -> Counter[str]:
    """Documents by the power of two that their length reaches: a part's tallies."""
    # frexp(n) = (m, e) with 2^(e-1) <= n < 2^e, exactly.
    floors, counts = np.unique(np.frexp(lengths[lengths > 0])[1] - 1, return_counts=True)
    return Counter({f"{_PREFIX}{1 << int(e)}": int(n) for e, n in zip(floors, counts, strict=True)})


def histogram_of(tallies: Mapping[str, int]) -> dict[str, int]:
    """From tallies to what the manifest keeps: fewest tokens of a bin -> documents, in order."""
    bins = ((int(name.removeprefix(_PREFIX)), n) for name, n in tallies.items() if name.startswith(_PREFIX))
    return {str(least): n for least, n in sorted(bins)}


def ends_of_documents(
    bounds: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """``cu_seqlens`` without the 0 that begins each row and without empty documents: (ends, their offsets).

    Raises :class:`UserError`, naming a row group, for boundaries that are none.
    """
    steps, wrong = bound_steps(bounds, offsets, lengths)
    if wrong.any():
        raise UserError(
            f"{name}, row {wrong.argmax()}: cu_seqlens must rise from 0 to the row's length: write the table again."
        )
    kept, rows = steps > 0, np.repeat(np.arange(len(lengths)), np.diff(offsets))
    return bounds[kept], np.concatenate(([0], np.cumsum(np.bincount(rows[kept], minlength=len(lengths)))))
