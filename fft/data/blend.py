"""Several tables as one, each with a weight: which table a sample comes from is arithmetic, too.

Weights split a sequence in two, and each half again, until every table has its own: of the first ``n`` samples of a
split ``a : b``, ``n * a // (a + b)`` go to the left. So a table's share is exact in the long run and never off by more
samples than there are splits above it, and how many samples of each table come before a given one is known at once.

The split is made lane by lane (:mod:`fft.data.order`), each lane beginning at another point of the sequence: lane ``l``
draws samples ``l``, ``l + lanes``, ``l + 2 * lanes``, ... of every table, so that replicas share out all row groups.
So a table's samples come in its own order, but for lanes being a few samples ahead of others; a table that ends
begins again, in its next epoch's order.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from pathlib import Path

import numpy as np

from fft.data.loader import Piece, SampleReader
from fft.data.table import Rows, Table
from fft.errors import UserError

#: Where lane ``l`` begins in the sequence of tables: ``l`` times this, a prime.
_STRIDE = 10_007
#: Weights count in millionths.
_FINEST = 1_000_000


class Mixture:
    """The sequence of tables that weights make. Indices may be arrays."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [round(weight * _FINEST) for weight in weights]
        self._weights = [share // gcd(*shares) for share in shares]

    def choose(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places of the sequence: the table, and how many of its samples come before."""
        table, before = np.zeros_like(index), np.array(index)
        self._split(np.arange(len(index)), 0, len(self._weights), table, before)
        return table, before

    def count(self, table: int, length: int) -> int:
        """How many of the first ``length`` places are a table's."""
        first, last = 0, len(self._weights)
        while last - first > 1:
            middle = (first + last) // 2
            left = length * sum(self._weights[first:middle]) // sum(self._weights[first:last])
            if table < middle:
                last, length = middle, left
            else:
                first, length = middle, length - left
        return length

    def _split(self, places: np.ndarray, first: int, last: int, table: np.ndarray, before: np.ndarray) -> None:
        if last - first == 1 or not len(places):
            table[places] = first
            return
        middle = (first + last) // 2
        left, whole = sum(self._weights[first:middle]), sum(self._weights[first:last])
        index = before[places]
        on_left = index * left // whole
        goes_left = (index + 1) * left // whole > on_left
        before[places] = np.where(goes_left, on_left, index - on_left)
        self._split(places[goes_left], first, middle, table, before)
        self._split(places[~goes_left], middle, last, table, before)


class Blend:
    """Reads like a :class:`fft.data.loader.SampleReader`; an epoch has as many samples as all tables together."""

    def __init__(self, parts: Sequence[SampleReader], weights: Sequence[float]) -> None:
        lanes = min(part.lanes for part in parts)
        aligned = any(part.has_labels for part in parts)
        self.parts = [part.as_part(lanes, aligned) for part in parts]
        self.weights = list(weights)
        self._mixture = Mixture(weights)
        #: Samples of each table [tables, lanes] that come before the place where each lane begins.
        self._earlier = np.array(
            [[self._mixture.count(part, lane * _STRIDE) for lane in range(lanes)] for part in range(len(parts))]
        )
        self.lanes, self.aligned, self.seq_len = lanes, aligned, parts[0].seq_len
        self.samples_per_epoch = sum(part.samples_per_epoch for part in parts)
        self.lookahead = min(part.lookahead for part in self.parts)

    @property
    def tables(self) -> list[Table]:
        """The tables, in the order in which they were given."""
        return [part.table for part in self.parts]

    @property
    def identity(self) -> dict[str, object]:
        """All that the order depends on."""
        parts = [part.identity for part in self.parts]
        return {name: [part[name] for part in parts] for name in parts[0]} | {"weights": self.weights}

    def for_stage(self, ids: bool, labels: bool) -> "Blend":
        """The same order, for who needs only ids, or only labels."""
        return Blend([part.for_stage(ids, labels) for part in self.parts], self.weights)

    def part(self, index: int) -> tuple[SampleReader, int]:
        """The table a sample comes from, and its index there."""
        tables, own = self._place([index])
        return self.parts[tables[0]], own[0]

    def samples(self, indices: Sequence[int]) -> Iterator[list[tuple[Piece, Rows]]]:
        """What samples are made of."""
        tables, own = self._place(indices)
        streams = [part.samples(theirs) for part, theirs in self._dealt(tables, own)]
        return (next(streams[table]) for table in tables)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to decode what samples will need."""
        for part, theirs in self._dealt(*self._place(indices)):
            part.prefetch(theirs)

    def _dealt(self, tables: list[int], own: list[int]) -> Iterator[tuple[SampleReader, list[int]]]:
        for number, part in enumerate(self.parts):
            yield part, [index for table, index in zip(tables, own, strict=True) if table == number]

    def _place(self, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        within, lane = np.divmod(np.asarray(indices, dtype=np.int64), self.lanes)
        tables, before = self._mixture.choose(lane * _STRIDE + within)
        return tables.tolist(), ((before - self._earlier[tables, lane]) * self.lanes + lane).tolist()


def parse_tables(text: str, flag: str) -> list[tuple[str, float]]:
    """Tables and weights of ``"web:0.7 books:0.3"``; a weight is 1 where none is given.

    A path that exists is one table, whatever blanks are in it.
    Raises :class:`UserError` for weights that are none, or of no use.
    """
    if Path(text).exists():
        return [(text, 1.0)]
    tables = []
    for part in text.split():
        path, colon, weight = part.rpartition(":")
        if not colon or weight.startswith("//"):
            tables.append((part, 1.0))
            continue
        try:
            tables.append((path, float(weight)))
        except ValueError:
            raise UserError(f"--{flag} {part}: {weight!r} is no weight; write TABLE:NUMBER, as in web:0.7.") from None
    for path, weight in tables:
        if not _FINEST**-1 <= weight <= _FINEST:
            raise UserError(f"--{flag} {path}:{weight:g}: a weight lies between {_FINEST**-1:g} and {_FINEST:,}.")
    return tables
