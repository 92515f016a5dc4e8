"""Pack documents into rows of a fixed length. Pure numpy: lengths in, an assignment of spans to rows out."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DocumentSpans:
    """Stretches of documents in the order in which they are written.

    ``document[i]``, ``start[i]`` and ``length[i]`` say what span ``i`` is; ``row_ends[r]`` is one past the last span
    of row ``r``.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_ends: np.ndarray

    def rows(self, first: int, stop: int) -> "DocumentSpans":
        """The spans of rows ``first`` to ``stop`` (not included)."""
        stop = min(stop, len(self.row_ends))
        begin = self.row_ends[first - 1] if first else 0
        end = self.row_ends[stop - 1] if stop else 0
        own = slice(begin, max(begin, end))
        ends = self.row_ends[first:stop] - begin
        return DocumentSpans(self.document[own], self.start[own], self.length[own], ends)


def cut_documents(lengths: Sequence[int] | np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut only documents longer than ``max_len``: full spans, then the rest.

    Returns (document, start, length) of all spans.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // max_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first[document]) * max_len
    return document, start, np.minimum(max_len, lengths[document] - start)


def best_fit(lengths: Sequence[int] | np.ndarray, max_len: int) -> DocumentSpans:
    """Best-fit decreasing: each span goes to the fullest row that still holds it (arXiv:2404.10830).

    No document is cut unless longer than ``max_len``. The row is found by binary search over the distinct free
    lengths, of which there are at most ``max_len``.
    """
    document, start, length = cut_documents(lengths, max_len)
    rows: list[list[int]] = []
    free: list[int] = []  # sorted distinct free lengths
    with_free: dict[int, list[int]] = {}
    for span in np.argsort(-length, kind="stable").tolist():
        size = int(length[span])
        at = bisect_left(free, size)
        if at == len(free):
            row, left = len(rows), max_len - size
            rows.append([span])
        else:
            space = free[at]
            row = with_free[space].pop()
            if not with_free[space]:
                del with_free[space], free[at]
            rows[row].append(span)
            left = space - size
        if left:
            if left not in with_free:
                insort(free, left)
                with_free[left] = []
            with_free[left].append(row)
    order = np.array([span for row in rows for span in row], dtype=np.int64)
    return DocumentSpans(
        document[order], start[order], length[order], np.cumsum([len(row) for row in rows], dtype=np.int64)
    )


def concat(lengths: Sequence[int] | np.ndarray, max_len: int) -> DocumentSpans:
    """Lay documents end to end and cut every ``max_len`` tokens: only the last row can be short."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    return _lay(ends, np.arange(max_len, total + max_len, max_len).clip(max=total))


def cut_rows(lengths: Sequence[int] | np.ndarray, row_ends: np.ndarray, max_len: int) -> DocumentSpans:
    """Leave rows (``row_ends`` in documents) as they are, cut the longer ones every ``max_len`` tokens."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    ends_of_rows = np.concatenate(([0], ends))[row_ends]
    _, _, size = cut_documents(np.diff(ends_of_rows, prepend=0), max_len)
    return _lay(ends, np.cumsum(size))


def _lay(ends: np.ndarray, row_cuts: np.ndarray) -> DocumentSpans:
    """Documents end to end, cut into rows at the token positions ``row_cuts`` (rising, the last at the end)."""
    cuts = np.union1d(ends, row_cuts)
    cuts = cuts[cuts > 0]
    begins = np.concatenate(([0], cuts)).astype(np.int64)[:-1]
    document = np.searchsorted(ends, begins, side="right")
    start = begins - np.concatenate(([0], ends))[document]
    return DocumentSpans(document, start, cuts - begins, np.searchsorted(cuts, row_cuts, side="right"))


def permute_rows(spans: DocumentSpans, order: np.ndarray) -> DocumentSpans:
    """The same rows in another order."""
    begins = np.concatenate(([0], spans.row_ends[:-1]))
    sizes = spans.row_ends - begins
    ends = np.cumsum(sizes[order])
    source = np.repeat(begins[order] - (ends - sizes[order]), sizes[order]) + np.arange(len(spans.length))
    return DocumentSpans(spans.document[source], spans.start[source], spans.length[source], ends)


def gather_tokens(values: np.ndarray, offsets: np.ndarray, spans: DocumentSpans) -> np.ndarray:
    """Tokens of all spans, in order, from documents ``values[offsets[d]:offsets[d + 1]]``."""
    ends = np.cumsum(spans.length)
    begins = offsets[spans.document] + spans.start
    return values[np.repeat(begins - (ends - spans.length), spans.length) + np.arange(ends[-1] if len(ends) else 0)]
