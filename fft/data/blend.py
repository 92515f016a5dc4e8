"""Several tables as one, each with a weight: which table a sample comes from is arithmetic, too.

Weights split a sequence in two, and each half again, until every table has its own: of the first ``n`` samples of a
split ``a : b``, ``n * a // (a + b)`` go to the left. So a table's share is exact in the long run and never off by more
samples than there are splits above it, and how many samples of each table come before a given one is known at once.

The split is made lane by lane (:mod:`fft.data.order`), each lane beginning at another point of the sequence: lane ``l``
draws samples ``l``, ``l + lanes``, ``l + 2 * lanes``, ... of every table, so that replicas share out all row groups.
So a table's samples come in its own order, but for lanes being a few samples ahead of others.

A table that ends begins again, in its next epoch's order (``end="repeat"``), or leaves the others, whose weights then
split what is left (``"drop"``), until all have ended and the blend begins again. How far a lane's samples of a table
reach is known, so the ends cut a lane into as many *stages* as there are tables, each with a sequence of its own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from pathlib import Path

import numpy as np

from fft.data.pairs import Reference
from fft.data.samples import SampleSpan, TableSamples
from fft.data.table import Rows, Table
from fft.errors import UserError
from fft.images.rules import ImageRules

#: Where lane ``l`` begins in the sequence of tables: ``l`` times this, a prime.
_STRIDE = 10_007
#: Weights count in millionths, but no finer than in billionths of their sum: places times that fit into 64 bits.
_FINEST, _LARGEST = 1_000_000, 1_000_000_000
#: A table to evaluate on, with its name.
_NAMED = re.compile(r"([\w.-]+)=(.+)")


class Mixture:
    """The sequence of tables that weights make; a weight may be 0. Indices may be arrays."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [round(weight * _FINEST) for weight in weights]
        self._weights = [share // gcd(*shares) for share in shares]
        if sum(self._weights) > _LARGEST:
            whole = sum(self._weights)
            self._weights = [max(share * _LARGEST // whole, min(share, 1)) for share in self._weights]

    def choose(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places of the sequence: the table, and how many of its samples come before."""
        table, before = np.zeros_like(index), np.array(index)
        self._split(np.arange(len(index)), 0, len(self._weights), table, before)
        return table, before

    def count(self, table: int, length: int) -> int:
        """How many of the first ``length`` places are a table's."""
        for left, whole, goes_left in self._splits(table):
            on_left = length * left // whole
            length = on_left if goes_left else length - on_left
        return length

    def position(self, table: int, number: int) -> int:
        """The place of a table's sample ``number``: the inverse of :meth:`choose`."""
        for left, whole, goes_left in reversed(self._splits(table)):
            number = ((number + 1) * whole - 1) // left if goes_left else number * whole // (whole - left)
        return number

    def _splits(self, table: int) -> list[tuple[int, int, bool]]:
        """Weights of the left half and of both, and whether a table is on the left, from the first split down."""
        splits, first, last = [], 0, len(self._weights)
        while last - first > 1:
            middle = (first + last) // 2
            splits.append((sum(self._weights[first:middle]), sum(self._weights[first:last]), table < middle))
            first, last = (first, middle) if table < middle else (middle, last)
        return splits

    def _split(self, positions: np.ndarray, first: int, last: int, table: np.ndarray, before: np.ndarray) -> None:
        if last - first == 1 or not len(positions):
            table[positions] = first
            return
        middle = (first + last) // 2
        left, whole = sum(self._weights[first:middle]), sum(self._weights[first:last])
        index = before[positions]
        on_left = index * left // whole
        goes_left = (index + 1) * left // whole > on_left
        before[positions] = np.where(goes_left, on_left, index - on_left)
        self._split(positions[goes_left], first, middle, table, before)
        self._split(positions[~goes_left], middle, last, table, before)


class Blend:
    """The :class:`fft.data.samples.Samples` of several tables; an epoch has as many as all of them together."""

    def __init__(self, members: Sequence[TableSamples], weights: Sequence[float], end: str = "repeat") -> None:
        lanes = min(member.lanes for member in members)
        aligned = any(member.has_labels for member in members)
        self.members = [member.as_member(lanes, aligned) for member in members]
        self.weights, self.end = list(weights), end
        self.lanes, self.aligned, self.seq_len = lanes, aligned, members[0].seq_len
        self._samples = np.array([member.samples_per_epoch for member in members])
        self.samples_per_epoch = int(self._samples.sum())
        self.lookahead = min(member.lookahead for member in self.members)
        #: By how many lanes those of each table are turned, so that the longer ones follow each other and all lanes
        #: of the blend are equally long, but for one sample.
        self._turns = (np.cumsum(self._samples) - self._samples) % lanes * (end == "drop")
        self._mixtures: list[Mixture] = []
        # Of each lane's stages: the first sample, the number of the mixture, and how many samples of each table come
        # before the stage's begin in the mixture, less those that the lane has drawn.
        self._starts = np.full((lanes, len(members)), np.iinfo(np.int64).max)
        self._mixture = np.zeros((lanes, len(members)), np.int64)
        self._earlier = np.zeros((lanes, len(members), len(members)), np.int64)
        known: dict[tuple[int, ...], int] = {}
        for lane in range(lanes):
            self._plan(lane, known)

    def _plan(self, lane: int, known: dict[tuple[int, ...], int]) -> None:
        """Cut a lane into stages. ``known`` has the number of the mixture of some tables."""
        left = -(-(self._samples - (lane - self._turns) % self.lanes) // self.lanes)
        drawn = np.zeros_like(left)
        begin = position = lane * _STRIDE
        for stage in range(len(self.members)):
            active = tuple(np.flatnonzero(left > drawn).tolist())
            if not active:
                return
            if active not in known:
                known[active] = len(self._mixtures)
                self._mixtures.append(Mixture([w * (t in active) for t, w in enumerate(self.weights)]))
            mixture = self._mixtures[known[active]]
            before = {table: mixture.count(table, position) for table in active}
            self._starts[lane, stage], self._mixture[lane, stage] = position - begin, known[active]
            for table in active:
                self._earlier[lane, stage, table] = before[table] - drawn[table]
            if self.end == "repeat":
                return
            position = 1 + min(mixture.position(t, before[t] + int(left[t] - drawn[t]) - 1) for t in active)
            for table in active:
                drawn[table] += mixture.count(table, position) - before[table]

    @property
    def tables(self) -> list[Table]:
        """The tables, in the order in which they were given."""
        return [member.table for member in self.members]

    @property
    def identity(self) -> dict[str, object]:
        """All that the order depends on."""
        members = [member.identity for member in self.members]
        own: dict[str, object] = {"weights": self.weights, "blend_end": self.end}
        return {name: [member[name] for member in members] for name in members[0]} | own

    @property
    def rules(self) -> ImageRules | None:
        """Of the images of all tables."""
        return self.members[0].rules

    def for_stage(self, ids: bool, labels: bool, images: bool = False) -> "Blend":
        """The same order, for who needs only ids, only labels, or pixels."""
        return Blend([member.for_stage(ids, labels, images) for member in self.members], self.weights, self.end)

    def with_images(self, rules: ImageRules) -> "Blend":
        """The same order, in a run that trains on images."""
        return Blend([member.with_images(rules) for member in self.members], self.weights, self.end)

    @property
    def pairs(self) -> bool:
        """Whether a run trains on preferences."""
        return self.members[0].pairs

    @property
    def datasets(self) -> tuple[str, ...]:
        """Of the documents of all tables."""
        return self.members[0].datasets

    def with_pairs(self, known: Mapping[str, Reference] | None = None) -> "Blend":
        """The same order, in a run that trains on preferences."""
        return Blend([member.with_pairs(known) for member in self.members], self.weights, self.end)

    def with_datasets(self, names: Sequence[str], whole: Mapping[str, str] | None = None) -> "Blend":
        """The same order, where documents come with the number of their dataset."""
        return Blend([member.with_datasets(names, whole) for member in self.members], self.weights, self.end)

    def member(self, index: int) -> tuple[TableSamples, int]:
        """The table a sample comes from, and its index there."""
        tables, own = self._locate([index])
        return self.members[tables[0]], own[0]

    def index(self, member: int, own: int) -> int:
        """The sample that a table's sample ``own`` is: the inverse of :meth:`member`."""
        epoch, own = divmod(own, int(self._samples[member])) if self.end == "drop" else (0, own)
        number, lane = divmod(own, self.lanes)
        lane = (lane + int(self._turns[member])) % self.lanes
        stops = [*self._starts[lane, 1:].tolist(), np.iinfo(np.int64).max]
        for stage, stop in enumerate(stops):
            mixture = self._mixtures[self._mixture[lane, stage]]
            within = mixture.position(member, number + int(self._earlier[lane, stage, member])) - lane * _STRIDE
            if within < stop:
                break
        return epoch * self.samples_per_epoch + within * self.lanes + lane

    def samples(self, indices: Sequence[int]) -> Iterator[list[tuple[SampleSpan, Rows]]]:
        """What samples are made of."""
        tables, own = self._locate(indices)
        streams = [member.samples(theirs) for member, theirs in self._dealt(tables, own)]
        return (next(streams[table]) for table in tables)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to decode what samples will need."""
        for member, theirs in self._dealt(*self._locate(indices)):
            member.prefetch(theirs)

    def _dealt(self, tables: list[int], own: list[int]) -> Iterator[tuple[TableSamples, list[int]]]:
        for number, member in enumerate(self.members):
            yield member, [index for table, index in zip(tables, own, strict=True) if table == number]

    def _locate(self, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        index = np.asarray(indices, dtype=np.int64)
        epoch, index = np.divmod(index, self.samples_per_epoch) if self.end == "drop" else (0, index)
        within, lane = np.divmod(index, self.lanes)
        stage = (self._starts[lane] <= within[:, None]).sum(axis=1) - 1
        mixture, positions = self._mixture[lane, stage], lane * _STRIDE + within
        tables, before = np.empty_like(index), np.empty_like(index)
        for number in np.unique(mixture):
            at = mixture == number
            tables[at], before[at] = self._mixtures[number].choose(positions[at])
        drawn = before - self._earlier[lane, stage, tables]
        own = drawn * self.lanes + (lane - self._turns[tables]) % self.lanes + epoch * self._samples[tables]
        return tables.tolist(), own.tolist()


def parse_evaluations(text: str) -> dict[str, str]:
    """Tables by name of ``"web=TABLE code=TABLE"``, in their order; one without a name has an empty one.

    What exists is a path, whatever is in it. Raises :class:`UserError` for several tables of which some have no name of
    their own.
    """
    if Path(text).exists():
        return {"": text}
    named = [None if Path(item).exists() else _NAMED.fullmatch(item) for item in text.split()]
    if not any(named):
        tables = parse_tables(text, "eval_data")
        if len(tables) > 1:
            raise UserError(
                f"--eval_data {text}: an evaluation reads one table; give each a name, as in web=A code=B, or mix them "
                "with spark_jobs/shuffle.py."
            )
        return dict.fromkeys([""], tables[0][0]) if tables else {}
    found: dict[str, str] = {}
    for item, match in zip(text.split(), named, strict=True):
        if match is None or match[1] in found:
            raise UserError(f"--eval_data {item}: give each table a name of its own, as in web=A code=B.")
        ((found[match[1]], _),) = parse_tables(match[2], "eval_data")
    return found


def data_places(text: str, flag: str) -> list[str]:
    """The tables that ``--train_data`` or ``--eval_data`` name. Raises :class:`UserError` as their parsers do."""
    if flag == "eval_data":
        return [*parse_evaluations(text).values()]
    return [path for path, _ in parse_tables(text, flag)]


def parse_tables(text: str, flag: str) -> list[tuple[str, float]]:
    """Tables and weights of ``"web:0.7 books:0.3"``; a weight is 1 where none is given.

    A path that exists is one table, whatever blanks are in it.
    Raises :class:`UserError` for weights that are none, or of no use.
    """
    if Path(text).exists():
        return [(text, 1.0)]
    tables = []
    for item in text.split():
        path, colon, weight = item.rpartition(":")
        if not colon or "/" in weight:  # s3://bucket/table, hdfs://host:8020/table
            tables.append((item, 1.0))
            continue
        try:
            tables.append((path, float(weight)))
        except ValueError:
            raise UserError(f"--{flag} {item}: {weight!r} is no weight; write TABLE:NUMBER, as in web:0.7.") from None
    for path, weight in tables:
        if not _FINEST**-1 <= weight <= _FINEST:
            raise UserError(f"--{flag} {path}:{weight:g}: a weight lies between {_FINEST**-1:g} and {_FINEST:,}.")
    return tables
