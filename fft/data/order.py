"""The order of samples: a pure function of (table, seed, epoch), found by arithmetic, never by scanning.

Row groups are permuted and laid end to end, the rows inside each in an order of their own. That stretch is cut into
*lanes* of equal length, which are read side by side: sample ``i`` of an epoch is the next one of lane ``i % lanes``. So
neighbouring samples come from row groups far apart, as many as there are lanes; and replicas whose number divides the
lanes share them out: each reads its own row groups and no others, in an order that does not depend on their number.
"""

import numpy as np

#: Lanes of a large table: so many row groups are open at once, over all replicas together.
LANES = 32
#: Fewest row groups of a lane. Two lanes share the row group in which one ends and the other begins: it is read twice.
_GROUPS_PER_LANE = 8


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of ``range(n)`` drawn from ``key``.

    Sorts raw Philox output (Salmon et al., SC 2011), which numpy promises never to change, unlike
    ``Generator.permutation``.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


def lanes_for(groups: int, samples: int, most: int = LANES) -> int:
    """Lanes of a table: ``most``, halved until it is large enough."""
    while most > max(1, min(groups // _GROUPS_PER_LANE, samples)):
        most //= 2
    return most


class EpochOrder:
    """One epoch of a table whose row group ``g`` has ``sizes[g]`` units (rows or tokens), ``step`` of them a sample.

    Not shuffled, and with one lane, it is the table's own order.
    """

    def __init__(
        self, sizes: np.ndarray, seed: int, epoch: int, step: int = 1, lanes: int = LANES, shuffle: bool = True
    ):
        self._groups = permutation(len(sizes), seed, epoch) if shuffle else np.arange(len(sizes))
        self._ends = np.cumsum(sizes[self._groups])
        self._begins = self._ends - sizes[self._groups]
        self._key = (seed, epoch) if shuffle else None
        self._step = step
        self.samples = -(-self.units // step)
        self.lanes = lanes

    @property
    def units(self) -> int:
        """Units of the epoch."""
        return int(self._ends[-1])

    def position(self, index: np.ndarray) -> np.ndarray:
        """Where samples of the epoch lie in the stretch that the lanes are cut from."""
        within, lane = np.divmod(index, self.lanes)
        each, longer = divmod(self.samples, self.lanes)
        return lane * each + np.minimum(lane, longer) + within

    def index(self, position: int) -> int:
        """The sample at a position: the inverse of :meth:`position`."""
        each, longer = divmod(self.samples, self.lanes)
        lane = position // (each + 1) if position < longer * (each + 1) else (position - longer) // each
        return (position - lane * each - min(lane, longer)) * self.lanes + lane

    def spans(self, indices: np.ndarray) -> list[list[tuple[int, int, int]]]:
        """Row groups that hold each sample: triples (row group, first unit, last unit + 1) within them."""
        starts = self.position(indices) * self._step
        stops = np.minimum(starts + self._step, self.units)
        first, last = self._ends.searchsorted(starts, "right"), self._ends.searchsorted(stops, "left")
        begins = self._begins[first]
        whole = zip(
            self._groups[first].tolist(),
            (starts - begins).tolist(),
            (stops - begins).tolist(),
            (last - first).tolist(),
            first.tolist(),
            strict=True,
        )
        return [[(g, a, b)] if not more else self._seam(a, b, at) for g, a, b, more, at in whole]

    def _seam(self, start: int, stop: int, at: int) -> list[tuple[int, int, int]]:
        """The spans of a sample that goes on in the next row groups."""
        spans = []
        while stop > 0:
            size = int(self._ends[at] - self._begins[at])
            spans.append((int(self._groups[at]), start, min(stop, size)))
            start, stop, at = 0, stop - size, at + 1
        return spans

    def first_unit(self, group: int) -> int:
        """The unit of the epoch with which a row group begins."""
        return int(self._begins[self._groups == group][0])

    def row_order(self, group: int, rows: int) -> np.ndarray:
        """Order of the rows inside a row group."""
        return permutation(rows, *self._key, group) if self._key else np.arange(rows)
