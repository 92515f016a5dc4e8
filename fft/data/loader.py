"""From a token table to micro-batches: packed, no padding, boundaries kept, resumable at any sample.

A sample is ``seq_len`` tokens. From a table packed to that length it is one row (whose unused tail, if any, is filled).
From any other table, rows of any length, samples are cut from the rows laid end to end in the epoch's order; only
the epoch's last sample may be partly filled. Either way sample ``i`` is found by arithmetic on the footers.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fft.data.order import EpochOrder
from fft.data.table import Rows, Table

IGNORE = -100

#: Decoded row groups kept per reader. Neighbouring samples share one; two cover the seam between row groups.
_CACHED_GROUPS = 2


@dataclass(frozen=True)
class Sample:
    """``seq_len`` tokens: ids, labels aligned with the position that predicts them, boundaries from 0 to seq_len."""

    input_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """Samples laid end to end, T = samples * seq_len tokens, as the pipeline takes them.

    ``input_ids`` int32 [1, T]; ``labels`` int64 [T]; ``cu_seqlens`` int32 [T + 1], padded by repeating T so that its
    shape never changes. ``trained`` counts the labels that are trained on.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    trained: int


class SampleReader:
    """Random access to the samples of an endless sequence of epochs."""

    def __init__(self, table: Table, seq_len: int, seed: int, vocab_size: int | None = None, shuffle: bool = True):
        manifest = table.manifest
        self._by_row = manifest is not None and manifest.seq_len == seq_len
        sizes = [g.rows if self._by_row else g.tokens for g in table.row_groups]
        self.seq_len = seq_len
        self.table, self._seed, self._shuffle = table, seed, shuffle
        self._vocab_size = vocab_size
        self._sizes = np.array(sizes, dtype=np.int64)
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._decoded: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._step = 1 if self._by_row else seq_len

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch, the last of which may be partly filled."""
        return -(-int(self._sizes.sum()) // self._step)

    def sample(self, index: int) -> Sample:
        """Sample ``index`` counted from the start of epoch 0."""
        epoch, within = divmod(index, self.samples_per_epoch)
        order = self._order(epoch)
        ids, labels, bounds = [], [], [0]
        for group, start, stop in order.spans(within * self._step, (within + 1) * self._step):
            rows = self._rows(epoch, group, order)
            for piece_ids, piece_labels, piece_bounds in self._pieces(rows, start, stop):
                bounds.extend(piece_bounds[1:] + (bounds[-1] - piece_bounds[0]))
                ids.append(piece_ids)
                labels.append(piece_labels)
        return self._assemble(ids, labels, np.asarray(bounds))

    def _assemble(self, ids: list, labels: list, bounds: np.ndarray) -> Sample:
        """Shift labels inside documents and fill what is left with a document that is not trained on."""
        length, total = int(bounds[-1]), self.seq_len
        input_ids = np.zeros(total, dtype=np.int32)
        shifted = np.full(total, IGNORE, dtype=np.int64)
        if length:
            input_ids[:length] = np.concatenate(ids)
            targets = np.concatenate(labels)
            shifted[: length - 1] = targets[1:]
            shifted[bounds[1:] - 1] = IGNORE  # a document's last token predicts nothing
        if length < total:
            bounds = np.append(bounds, total)
        return Sample(input_ids, shifted, bounds.astype(np.int32))

    def _pieces(self, rows: Rows, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Cut units [start, stop) of a row group into (ids, labels, boundaries), one per row touched."""
        offsets = rows.offsets
        if self._by_row:
            first, last = start, stop
        else:
            first = int(np.searchsorted(offsets, start, side="right")) - 1
            last = int(np.searchsorted(offsets, stop, side="left"))
        targets = rows.input_ids if rows.labels is None else rows.labels
        for row in range(first, last):
            a, b = int(offsets[row]), int(offsets[row + 1])
            if not self._by_row:
                a, b = max(a, start), min(b, stop)
            bounds = np.clip(rows.boundaries(row) + int(offsets[row]), a, b)
            yield rows.input_ids[a:b], targets[a:b], np.unique(bounds)

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            self._orders[epoch] = EpochOrder(self._sizes, self._seed, epoch, self._shuffle)
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _rows(self, epoch: int, group: int, order: EpochOrder) -> Rows:
        key = (epoch, group)
        if key not in self._decoded:
            rows = self.table.read(group, self._vocab_size)
            self._decoded[key] = _permuted(rows, order.row_order(group, len(rows.offsets) - 1))
            while len(self._decoded) > _CACHED_GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(key)
        return self._decoded[key]


def _permuted(rows: Rows, order: np.ndarray) -> Rows:
    lengths = np.diff(rows.offsets)[order]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    # Source position of every token: row starts repeated, plus the place within the row.
    source = np.repeat(rows.offsets[:-1][order] - offsets[:-1], lengths) + np.arange(offsets[-1])
    labels = None if rows.labels is None else rows.labels[source]
    documents = None if rows.documents is None else [rows.documents[i] for i in order]
    return Rows(rows.input_ids[source], offsets, labels, documents)


def blank_sample(seq_len: int) -> Sample:
    """A sample on which nothing is trained; fills the last batch when the samples run out."""
    zeros = np.zeros(seq_len, dtype=np.int32)
    return Sample(zeros, np.full(seq_len, IGNORE, dtype=np.int64), np.array([0, seq_len], dtype=np.int32))


def collate(samples: list[Sample]) -> MicroBatch:
    """Lay samples end to end; the boundary between two is a document boundary."""
    seq_len = len(samples[0].input_ids)
    total = seq_len * len(samples)
    cu_seqlens = np.full(total + 1, total, dtype=np.int32)
    bounds = np.concatenate([[0], *(s.cu_seqlens[1:] + i * seq_len for i, s in enumerate(samples))])
    cu_seqlens[: len(bounds)] = bounds
    labels = np.concatenate([s.labels for s in samples])
    return MicroBatch(
        np.concatenate([s.input_ids for s in samples])[None], labels, cu_seqlens, int((labels != IGNORE).sum())
    )


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt: micro-batch ``m`` of replica ``r`` takes samples (m * replicas + r) * size onward.

    The samples of a global batch, and so its loss, do not depend on the number of replicas.
    """

    replicas: int
    replica: int
    micro_batches: int
    micro_batch_size: int

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.replicas * self.micro_batches * self.micro_batch_size

    def indices(self, step: int) -> list[range]:
        """Sample indices of this replica's micro-batches at ``step``."""
        size = self.micro_batch_size
        first = step * self.global_batch + self.replica * size
        return [range(at, at + size) for at in (first + m * self.replicas * size for m in range(self.micro_batches))]


def step_batches(reader: SampleReader, plan: BatchPlan, step: int, total_samples: int) -> list[MicroBatch]:
    """This replica's micro-batches of one step; indices from ``total_samples`` on are blank."""
    blank = blank_sample(reader.seq_len)
    return [
        collate([reader.sample(i) if i < total_samples else blank for i in indices]) for indices in plan.indices(step)
    ]
