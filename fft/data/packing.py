"""Pack documents into rows of a fixed length. Pure numpy: lengths in, an assignment of pieces to rows out."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents in the order in which they are written.

    ``document[i]``, ``start[i]`` and ``length[i]`` say what piece ``i`` is; ``row_ends[r]`` is one past the last piece
    of row ``r``.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_ends: np.ndarray

    def rows(self, first: int, stop: int) -> "Pieces":
        """The pieces of rows ``first`` to ``stop`` (not included)."""
        stop = min(stop, len(self.row_ends))
        begin = self.row_ends[first - 1] if first else 0
        end = self.row_ends[stop - 1] if stop else 0
        part = slice(begin, max(begin, end))
        ends = self.row_ends[first:stop] - begin
        return Pieces(self.document[part], self.start[part], self.length[part], ends)


def cut_documents(lengths: Sequence[int] | np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut only documents longer than ``max_len``: full pieces, then the rest.

    Returns (document, start, length) of all pieces.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // max_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first[document]) * max_len
    return document, start, np.minimum(max_len, lengths[document] - start)


def best_fit(lengths: Sequence[int] | np.ndarray, max_len: int) -> Pieces:
    """Best-fit decreasing: each piece goes to the fullest row that still holds it (arXiv:2404.10830).

    No document is cut unless longer than ``max_len``. The row is found by binary search over the distinct free
    lengths, of which there are at most ``max_len``.
    """
    document, start, length = cut_documents(lengths, max_len)
    rows: list[list[int]] = []
    free: list[int] = []  # sorted distinct free lengths
    with_free: dict[int, list[int]] = {}
    for piece in np.argsort(-length, kind="stable").tolist():
        size = int(length[piece])
        at = bisect_left(free, size)
        if at == len(free):
            row, left = len(rows), max_len - size
            rows.append([piece])
        else:
            space = free[at]
            row = with_free[space].pop()
            if not with_free[space]:
                del with_free[space], free[at]
            rows[row].append(piece)
            left = space - size
        if left:
            if left not in with_free:
                insort(free, left)
                with_free[left] = []
            with_free[left].append(row)
    order = np.array([piece for row in rows for piece in row], dtype=np.int64)
    return Pieces(document[order], start[order], length[order], np.cumsum([len(row) for row in rows], dtype=np.int64))


def concat(lengths: Sequence[int] | np.ndarray, max_len: int) -> Pieces:
    """Lay documents end to end and cut every ``max_len`` tokens: only the last row can be short."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    return _lay(ends, np.arange(max_len, total + max_len, max_len).clip(max=total))


def cut_rows(lengths: Sequence[int] | np.ndarray, row_ends: np.ndarray, max_len: int) -> Pieces:
    """Leave rows (``row_ends`` in documents) as they are, cut the longer ones every ``max_len`` tokens."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    ends_of_rows = np.concatenate(([0], ends))[row_ends]
    _, _, size = cut_documents(np.diff(ends_of_rows, prepend=0), max_len)
    return _lay(ends, np.cumsum(size))


def _lay(ends: np.ndarray, row_cuts: np.ndarray) -> Pieces:
    """Documents end to end, cut into rows at the token positions ``row_cuts`` (rising, the last at the end)."""
    cuts = np.union1d(ends, row_cuts)
    cuts = cuts[cuts > 0]
    begins = np.concatenate(([0], cuts)).astype(np.int64)[:-1]
    document = np.searchsorted(ends, begins, side="right")
    start = begins - np.concatenate(([0], ends))[document]
    return Pieces(document, start, cuts - begins, np.searchsorted(cuts, row_cuts, side="right"))


def permute_rows(pieces: Pieces, order: np.ndarray) -> Pieces:
    """The same rows in another order."""
    begins = np.concatenate(([0], pieces.row_ends[:-1]))
    sizes = pieces.row_ends - begins
    ends = np.cumsum(sizes[order])
    source = np.repeat(begins[order] - (ends - sizes[order]), sizes[order]) + np.arange(len(pieces.length))
    return Pieces(pieces.document[source], pieces.start[source], pieces.length[source], ends)


def gather(values: np.ndarray, offsets: np.ndarray, pieces: Pieces) -> np.ndarray:
    """Tokens of all pieces, in order, from documents ``values[offsets[d]:offsets[d + 1]]``."""
    ends = np.cumsum(pieces.length)
    begins = offsets[pieces.document] + pieces.start
    return values[np.repeat(begins - (ends - pieces.length), pieces.length) + np.arange(ends[-1] if len(ends) else 0)]
