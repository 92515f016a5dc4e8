"""From a token table to micro-batches: packed, no padding, boundaries kept, resumable at any sample.

A sample is ``seq_len`` tokens. From a table packed to that length it is one row (whose unused tail, if any, is filled).
From any other table, samples are cut from the rows laid end to end, or hold whole documents that fit together
(``pack="best-fit"``). Which rows a sample is made of is arithmetic on the footers: see :mod:`fft.data.order`.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fft.data.order import LANES, EpochOrder, lanes_for
from fft.data.packing import Pieces, best_fit
from fft.data.table import IGNORE, Rows, Table
from fft.errors import UserError

if TYPE_CHECKING:
    from fft.data.blend import Blend

#: Threads that decode row groups.
_DECODERS = 2


@dataclass(frozen=True)
class Sample:
    """``seq_len`` tokens: ids, labels aligned with the position that predicts them, boundaries from 0 to seq_len."""

    input_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """Samples laid end to end, T tokens, as the pipeline takes them: samples * seq_len, or, ragged, fewer.

    ``input_ids`` int32 [1, T]; ``labels`` int64 [T]; ``cu_seqlens`` int32 [T + 1], padded by repeating its last entry:
    its shape depends on T alone. That entry is T or, ragged, where documents end and the tokens that round T up begin.
    ``trained`` counts the labels that are trained on.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    trained: int


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a row of a row group (its number in the file's order), at ``at`` of a sample."""

    group: int
    row: int
    start: int
    stop: int
    at: int


class Decoded:
    """A row group and the slots an epoch takes from it, in its order; nothing is moved, rows are looked up.

    A slot is a row, or a bin of rows that were packed together.
    """

    def __init__(self, rows: Rows, order: np.ndarray, bins: Pieces | None) -> None:
        self.rows, self.order, self.bins = rows, order, bins
        #: Where each row, in that order, ends: in tokens.
        self.ends = None if bins is not None else np.cumsum(np.diff(rows.offsets)[order])

    def slot(self, number: int) -> list[tuple[int, int, int]]:
        """Stretches (row, first token, last + 1) of a slot."""
        at = int(self.order[number])
        if self.bins is None:
            return [(at, 0, int(self.rows.offsets[at + 1] - self.rows.offsets[at]))]
        pieces = self.bins.rows(at, at + 1)
        return [
            (row, start, start + length)
            for row, start, length in zip(
                pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True
            )
        ]

    def stretch(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Stretches of tokens [start, stop) of the rows laid end to end."""
        place = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[place - 1]) if place else 0
            end = min(stop, int(self.ends[place]))
            yield int(self.order[place]), start - begin, end - begin
            start, place = end, place + 1


class SampleReader:
    """Random access to the samples of an endless sequence of epochs; for one thread, which others decode for.

    ``pack`` says how samples are made of rows that are not packed to ``seq_len``: "cut" lays them end to end and cuts,
    "best-fit" packs the rows of each row group, cutting only those longer than ``seq_len``; it reads all lengths once,
    when it begins.
    """

    def __init__(
        self,
        table: Table,
        seq_len: int,
        seed: int,
        vocab_size: int | None = None,
        shuffle: bool = True,
        pack: str = "cut",
        lanes: int = LANES,
    ) -> None:
        manifest = table.manifest
        # Without boundaries its rows are documents that were cut to that length, most of them shorter.
        packed = manifest is not None and manifest.seq_len == seq_len and "cu_seqlens" in table.columns
        self.table, self.seq_len, self.seed, self.pack = table, seq_len, seed, "rows" if packed else pack
        self._vocab_size, self._shuffle = vocab_size, shuffle
        #: Which of the two are needed; what is not is neither read nor filled in.
        self._ids = self._labels = True
        self._pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._sizes = self._units()
        self._step = seq_len if self.pack == "cut" else 1
        self.samples_per_epoch = -(-int(self._sizes.sum()) // self._step)
        self.lanes = lanes_for(len(self._sizes), self.samples_per_epoch, lanes) if shuffle else 1
        #: Whether labels are written where their token stands, or, as ids, need not be.
        self.aligned = self.has_labels
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._loaded: OrderedDict[tuple[int, int], Future[pa.Table] | Decoded] = OrderedDict()

    @property
    def tables(self) -> list[Table]:
        """The table, as the only one of a list: a blend has several."""
        return [self.table]

    @property
    def parts(self) -> list["SampleReader"]:
        """This reader itself, which is no blend."""
        return [self]

    def part(self, index: int) -> tuple["SampleReader", int]:
        """Who reads a sample, and its index there."""
        return self, index

    def index(self, part: int, own: int) -> int:
        """The inverse of :meth:`part`."""
        return own

    @property
    def has_labels(self) -> bool:
        """Whether the table says what is trained on; otherwise every token is."""
        return "labels" in self.table.columns

    @property
    def identity(self) -> dict[str, object]:
        """All that the order depends on."""
        order = {"seed": self.seed, "seq_len": self.seq_len, "pack": self.pack, "lanes": self.lanes}
        return {"table": self.table.source, "fingerprint": self.table.fingerprint, **order}

    @property
    def lookahead(self) -> int:
        """By how many samples row groups are asked for before they are needed: half of what the open ones hold."""
        return self.samples_per_epoch * self.lanes // (2 * len(self._sizes))

    def for_stage(self, ids: bool, labels: bool) -> "SampleReader":
        """The same order, for who needs only ids, or only labels."""
        return self._changed(_ids=ids, _labels=labels)

    def as_part(self, lanes: int, aligned: bool) -> "SampleReader":
        """The same table in another number of lanes, in a blend in which some table has labels, or none."""
        return self._changed(lanes=lanes, aligned=aligned)

    def _changed(self, **attributes: object) -> "SampleReader":
        reader = copy(self)
        reader._orders, reader._loaded = OrderedDict(), OrderedDict()
        vars(reader).update(attributes)
        return reader

    def sample(self, index: int) -> Sample:
        """Sample ``index`` counted from the start of epoch 0."""
        batch = micro_batch(self, [index], index + 1)
        return Sample(batch.input_ids[0], batch.labels, np.unique(batch.cu_seqlens))

    def pieces(self, index: int) -> list[Piece]:
        """What sample ``index`` is made of."""
        (pieces,) = self.samples([index])
        return [piece for piece, _ in pieces]

    def samples(self, indices: Sequence[int]) -> Iterator[list[tuple[Piece, Rows]]]:
        """What samples are made of, and the rows in which it lies."""
        for epoch, order, spans in self._spans(indices):
            pieces, at = [], 0
            for group, start, stop in spans:
                decoded = self._decoded(epoch, order, group)
                for row, first, last in decoded.stretch(start, stop) if self.pack == "cut" else decoded.slot(start):
                    pieces.append((Piece(group, row, first, last, at), decoded.rows))
                    at += last - first
            yield pieces

    def samples_with(self, epoch: int, group: int, row: int, start: int, stop: int) -> list[int]:
        """Samples of an epoch that hold some of tokens [start, stop) of a row."""
        order = self.order(epoch)
        decoded = self._decoded(epoch, order, group)
        begin = order.first_unit(group)
        if self.pack == "cut":
            place = int(np.flatnonzero(decoded.order == row)[0])
            begin += int(decoded.ends[place - 1]) if place else 0
            places = range((begin + start) // self._step, (begin + stop - 1) // self._step + 1)
        else:
            slots = [row]
            if decoded.bins is not None:
                bins = decoded.bins
                touched = (bins.document == row) & (bins.start < stop) & (bins.start + bins.length > start)
                slots = np.unique(bins.row_ends.searchsorted(np.flatnonzero(touched), "right")).tolist()
            places = [begin + int(np.flatnonzero(decoded.order == slot)[0]) for slot in slots]
        return sorted(epoch * self.samples_per_epoch + order.index(place) for place in places)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to decode what samples will need."""
        for epoch, _, spans in self._spans(indices):
            for group, _, _ in spans:
                self._request(epoch, group)

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        order = self._orders.get(epoch)
        if order is None:
            order = EpochOrder(self._sizes, self.seed, epoch, self._step, self.lanes, self._shuffle)
            self._orders[epoch] = order
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return order

    def _units(self) -> np.ndarray:
        groups = self.table.row_groups
        if self.pack == "rows":
            return np.array([g.rows for g in groups], dtype=np.int64)
        if self.pack == "cut":
            return np.array([g.tokens for g in groups], dtype=np.int64)
        return np.fromiter(self._pool.map(self._count_bins, range(len(groups))), np.int64, len(groups))

    def _count_bins(self, group: int) -> int:
        return len(self._bins(self.table.read(group, labels=False)).row_ends)

    def _bins(self, rows: Rows) -> Pieces:
        return best_fit(np.diff(rows.offsets), self.seq_len)

    def _spans(self, indices: Sequence[int]) -> Iterator[tuple[int, EpochOrder, list[tuple[int, int, int]]]]:
        if not len(indices):
            return
        epochs, within = np.divmod(np.asarray(indices, dtype=np.int64), self.samples_per_epoch)
        # Where an epoch of a blend's table ends, its lanes go on to the next one by one.
        cuts = [0, *(np.flatnonzero(np.diff(epochs)) + 1).tolist(), len(epochs)]
        for start, stop in itertools.pairwise(cuts):
            epoch = int(epochs[start])
            order = self.order(epoch)
            for spans in order.spans(within[start:stop]):
                yield epoch, order, spans

    def _request(self, epoch: int, group: int) -> "Future[pa.Table] | Decoded":
        key = (epoch, group)
        found = self._loaded.get(key)
        if found is None:
            found = self._loaded[key] = self._pool.submit(self.table.load, group, self._ids, self._labels)
            # Each lane has a row group open and, for a while, the next; small ones may fit several times into a sample.
            while len(self._loaded) > (2 * self.lanes + 2) * (1 + len(self._sizes) // self.samples_per_epoch):
                self._loaded.popitem(last=False)
        else:
            self._loaded.move_to_end(key)
        return found

    def _decoded(self, epoch: int, order: EpochOrder, group: int) -> Decoded:
        found = self._request(epoch, group)
        if isinstance(found, Decoded):
            return found
        rows = self.table.check(group, found.result(), self._vocab_size)
        bins = self._bins(rows) if self.pack == "best-fit" else None
        slots = len(rows.offsets) - 1 if bins is None else len(bins.row_ends)
        decoded = self._loaded[epoch, group] = Decoded(rows, order.row_order(group, slots), bins)
        return decoded


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt: replica ``r`` takes its samples ``i`` with ``i % replicas == r``, in order.

    The samples of a global batch, and so its loss, depend neither on the number of replicas nor on the micro-batch.
    With ``multiple`` micro-batches are ragged, as :func:`micro_batch` says.
    """

    replicas: int
    replica: int
    micro_batches: int
    micro_batch_size: int
    multiple: int | None = None

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.replicas * self.micro_batches * self.micro_batch_size

    def indices(self, first: int) -> list[range]:
        """Sample indices of this replica's micro-batches, in the global batch that begins with sample ``first``."""
        own = first + (self.replica - first) % self.replicas
        size = self.micro_batch_size * self.replicas
        return [range(own + m * size, own + (m + 1) * size, self.replicas) for m in range(self.micro_batches)]


def micro_batch(
    reader: "SampleReader | Blend", indices: Sequence[int], total_samples: int, multiple: int | None = None
) -> MicroBatch:
    """Samples laid end to end; those from ``total_samples`` on are blank.

    Nothing is trained on the last token of a document, which predicts nothing, and on what is left over of a sample,
    which is a document of its own. With ``multiple`` that is left out, and the length rounded up to a multiple of so
    many tokens, but never to more than it is without.
    """
    length, tokens = reader.seq_len, reader.seq_len * len(indices)
    real = [index for index in indices if index < total_samples]
    ids, labels = np.zeros(tokens, dtype=np.int32), np.empty(tokens, dtype=np.int64)
    ends, filled = _fill(reader.samples(real), 0 if multiple else length, reader.aligned, ids, labels)
    if multiple:
        filled = filled[-1:] or [0]
        tokens = min(tokens, max(1, -(-filled[0] // multiple)) * multiple)
        ids, labels, stops = ids[:tokens], labels[:tokens], [tokens]
    else:
        stops = range(length, tokens + 1, length)
        filled += range(len(real) * length, tokens, length)
    unfilled = [(a, b) for a, b in zip(filled, stops, strict=True) if a < b]
    labels[:-1] = labels[1:] if reader.aligned else ids[1:]
    ends = np.array(ends, dtype=np.int64)
    if unfilled and not multiple:
        ends = np.union1d(ends, stops)
    labels[ends - 1] = IGNORE
    for start, stop in unfilled:
        labels[start:stop] = IGNORE
    cu_seqlens = np.full(tokens + 1, ends[-1] if len(ends) else 0, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(ends) + 1] = ends
    return MicroBatch(ids[None], labels, cu_seqlens, int(np.count_nonzero(labels != IGNORE)))


def _fill(
    samples: Iterable[list[tuple[Piece, Rows]]], stride: int, aligned: bool, ids: np.ndarray, labels: np.ndarray
) -> tuple[list[int], list[int]]:
    """Write samples, one after the other, into ``ids`` and, where their token stands, if ``aligned``, ``labels``.

    Each begins ``stride`` tokens after the one before, or, if that is 0, where it ended. Returns where the documents
    end, and up to where each sample is filled.
    """
    ends: list[int] = []
    filled: list[int] = []
    at = 0
    for number, pieces in enumerate(samples):
        at = number * stride if stride else at
        for piece, rows in pieces:
            begin, length = int(rows.offsets[piece.row]) + piece.start, piece.stop - piece.start
            if rows.input_ids is not None:
                ids[at : at + length] = rows.input_ids[begin : begin + length]
            if aligned:
                targets = rows.input_ids if rows.labels is None else rows.labels
                labels[at : at + length] = targets[begin : begin + length]
            ends += [at + end for end in rows.document_ends(piece.row, piece.start, piece.stop)]
            at += length
        filled.append(at)
    return ends, filled


def step_batches(reader: "SampleReader | Blend", plan: BatchPlan, first: int, total_samples: int) -> list[MicroBatch]:
    """This replica's micro-batches of the global batch that begins with sample ``first``."""
    return [micro_batch(reader, indices, total_samples, plan.multiple) for indices in plan.indices(first)]


class Loader:
    """The micro-batches of one replica, step after step; row groups are decoded ahead. State is a number of samples.

    Iterating yields the list of a step's micro-batches until ``total_samples`` have been consumed by all replicas
    together. ``waited`` adds up the seconds for which the caller had to wait.
    """

    def __init__(self, reader: "SampleReader | Blend", plan: BatchPlan, total_samples: int) -> None:
        self._reader, self._plan, self._total = reader, plan, total_samples
        self._consumed = 0
        self.waited = 0.0

    def state_dict(self) -> dict[str, object]:
        """Epoch, samples consumed in it by all replicas together, and what their order depends on."""
        epoch, samples = divmod(self._consumed, self._reader.samples_per_epoch)
        return {"epoch": epoch, "samples": samples, **self._reader.identity}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on after the samples that were consumed. Raises :class:`UserError` when the order would be another."""
        for name, value in self._reader.identity.items():
            if state.get(name) != value and name != "table":
                raise UserError(
                    f"the data's {name} is {value}, that of the run to be resumed {state.get(name)}: give the same "
                    "tables and weights, --seq_len, --seed, --pack, --shuffle_lanes and --blend_end."
                )
        self._consumed = state["epoch"] * self._reader.samples_per_epoch + state["samples"]

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        batch = self._plan.global_batch
        ahead = -(-(self._reader.lookahead + self._reader.lanes) // batch) * batch
        for first in range(self._consumed, self._consumed + ahead, batch):
            self._prefetch(first)
        while self._consumed < self._total:
            begin = time.perf_counter()
            self._prefetch(self._consumed + ahead)
            made = step_batches(self._reader, self._plan, self._consumed, self._total)
            self.waited += time.perf_counter() - begin
            self._consumed += batch
            yield made

    def _prefetch(self, first: int) -> None:
        parts = self._plan.indices(first)
        self._reader.prefetch([index for part in parts for index in part if index < self._total])
