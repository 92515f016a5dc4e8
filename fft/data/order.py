"""The order of samples: a pure function of (table, seed, epoch), found by arithmetic, never by scanning.

Row groups are permuted, then the rows inside each; so reads are sequential and the shuffle is seeded. Every row group
occupies a known number of units, rows or tokens, hence the place of sample ``i`` is a binary search away.
"""

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of ``range(n)`` drawn from ``key``.

    Sorts raw Philox output (Salmon et al., SC 2011), which numpy promises never to change, unlike
    ``Generator.permutation``.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


class EpochOrder:
    """Units of one epoch laid end to end: permuted row groups, each with its number of units."""

    def __init__(self, sizes: np.ndarray, seed: int, epoch: int, shuffle: bool = True) -> None:
        self._groups = permutation(len(sizes), seed, epoch) if shuffle else np.arange(len(sizes))
        self._ends = np.cumsum(sizes[self._groups])
        self._key = (seed, epoch) if shuffle else None

    @property
    def units(self) -> int:
        """Units of the epoch."""
        return int(self._ends[-1])

    def spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Row groups that hold units [start, stop): triples (row group, first unit, last unit + 1) within them."""
        spans = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < min(stop, self.units):
            begin = int(self._ends[place - 1]) if place else 0
            end = min(stop, int(self._ends[place]))
            spans.append((int(self._groups[place]), start - begin, end - begin))
            start, place = end, place + 1
        return spans

    def row_order(self, group: int, rows: int) -> np.ndarray:
        """Order of the rows inside a row group."""
        return permutation(rows, *self._key, group) if self._key else np.arange(rows)
