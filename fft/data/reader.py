"""The samples of one token table, any of them at once: no padding, boundaries kept.

A sample is ``seq_len`` tokens. From a table packed to that length it is one row (whose unused tail, if any, is filled).
From any other table, samples are cut from the rows laid end to end, or hold whole documents that fit together
(``pack="best-fit"``). Which rows a sample is made of is arithmetic on the footers: see :mod:`fft.data.order`.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import list_values
from fft.data.by_dataset import dataset_numbers
from fft.data.known import DATASET, GRIDS, IMAGES
from fft.data.order import LANES, EpochOrder, lanes_for
from fft.data.packing import DocumentSpans, best_fit
from fft.data.pairs import Reference
from fft.data.samples import SampleSpan
from fft.data.table import Rows, Table
from fft.errors import UserError
from fft.images.rules import ImageRules

#: Threads that decode row groups.
_DECODERS = 2


class Decoded:
    """A row group and the slots an epoch takes from it, in its order; nothing is moved, rows are looked up.

    A slot is a row, or a bin of rows that were packed together.
    """

    def __init__(self, rows: Rows, order: np.ndarray, bins: DocumentSpans | None) -> None:
        self.rows, self.order, self.bins = rows, order, bins
        #: Where each row, in that order, ends: in tokens; bins are not laid end to end.
        self.ends = np.cumsum(np.diff(rows.offsets)[order]) if bins is None else np.empty(0, np.int64)

    def slot(self, number: int) -> list[tuple[int, int, int]]:
        """Stretches (row, first token, last + 1) of a slot."""
        at = int(self.order[number])
        if self.bins is None:
            return [(at, 0, int(self.rows.offsets[at + 1] - self.rows.offsets[at]))]
        spans = self.bins.rows(at, at + 1)
        return [
            (row, start, start + length)
            for row, start, length in zip(
                spans.document.tolist(), spans.start.tolist(), spans.length.tolist(), strict=True
            )
        ]

    def stretch(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Stretches of tokens [start, stop) of the rows laid end to end."""
        position = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[position - 1]) if position else 0
            end = min(stop, int(self.ends[position]))
            yield int(self.order[position]), start - begin, end - begin
            start, position = end, position + 1


class SampleReader:
    """Random access to the samples of an endless sequence of epochs; for one thread, which others decode for.

    ``pack`` says how samples are made of rows that are not packed to ``seq_len``: "cut" lays them end to end and cuts,
    "best-fit" packs the rows of each row group, cutting only those longer than ``seq_len``; it reads all lengths once,
    when it begins. Raises :class:`UserError` where that would cut a row that has images.
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
        if (table.has_images or table.has_pairs) and self.pack == "cut":
            raise UserError(
                f"{table.path} has {'images' if table.has_images else 'preferences'}, which --pack cut would cut: give "
                f"--pack best-fit, or pack the table to {seq_len} tokens with spark_jobs/repartition.py."
            )
        self._vocab_size, self._shuffle = vocab_size, shuffle
        #: What is needed; what is not is neither read nor filled in. Without ``rules`` there are no images.
        self._ids = self._labels = self._images = True
        self.rules: ImageRules | None = None
        #: Whether a run trains on preferences, and what is known of them.
        self.pairs, self._reference = False, None
        #: Names of datasets, where documents come with the number of theirs.
        self.datasets: tuple[str, ...] = ()
        self._whole: str | None = None
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
    def members(self) -> list["SampleReader"]:
        """This reader itself, which is no blend."""
        return [self]

    def member(self, index: int) -> tuple["SampleReader", int]:
        """Who reads a sample, and its index there."""
        return self, index

    def index(self, member: int, own: int) -> int:
        """The inverse of :meth:`member`."""
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

    def for_stage(self, ids: bool, labels: bool, images: bool = False) -> "SampleReader":
        """The same order, for who needs only ids, only labels, or pixels."""
        return self._changed(_ids=ids, _labels=labels, _images=images, datasets=self.datasets if labels else ())

    def with_images(self, rules: ImageRules) -> "SampleReader":
        """The same order, in a run that trains on images."""
        return self._changed(rules=rules)

    def with_pairs(self, known: Mapping[str, Reference] | None = None) -> "SampleReader":
        """The same order, in a run that trains on preferences; what is ``known`` of tables, by their source."""
        return self._changed(pairs=True, _reference=(known or {}).get(self.table.source))

    def with_datasets(self, names: Sequence[str], whole: Mapping[str, str] | None = None) -> "SampleReader":
        """The same order, where documents come with the number of their dataset among ``names``, which are all."""
        return self._changed(datasets=tuple(names), _whole=(whole or {}).get(self.table.source))

    def as_member(self, lanes: int, aligned: bool) -> "SampleReader":
        """The same table in another number of lanes, in a blend in which some table has labels, or none."""
        return self._changed(lanes=lanes, aligned=aligned)

    def _changed(self, **attributes: object) -> "SampleReader":
        reader = copy(self)
        reader._orders, reader._loaded = OrderedDict(), OrderedDict()
        vars(reader).update(attributes)
        return reader

    def spans_of(self, index: int) -> list[SampleSpan]:
        """What sample ``index`` is made of."""
        (spans,) = self.samples([index])
        return [span for span, _ in spans]

    def samples(self, indices: Sequence[int]) -> Iterator[list[tuple[SampleSpan, Rows]]]:
        """What samples are made of, and the rows in which it lies."""
        for epoch, order, spans in self._spans(indices):
            made_of, at = [], 0
            for group, start, stop in spans:
                decoded = self._decoded(epoch, order, group)
                for row, first, last in decoded.stretch(start, stop) if self.pack == "cut" else decoded.slot(start):
                    made_of.append((SampleSpan(group, row, first, last, at), decoded.rows))
                    at += last - first
            yield made_of

    def samples_with(self, epoch: int, group: int, row: int, start: int, stop: int) -> list[int]:
        """Samples of an epoch that hold some of tokens [start, stop) of a row."""
        order = self.order(epoch)
        decoded = self._decoded(epoch, order, group)
        begin = order.first_unit(group)
        if self.pack == "cut":
            position = int(np.flatnonzero(decoded.order == row)[0])
            begin += int(decoded.ends[position - 1]) if position else 0
            positions = range((begin + start) // self._step, (begin + stop - 1) // self._step + 1)
        else:
            slots = [row]
            if decoded.bins is not None:
                bins = decoded.bins
                touched = (bins.document == row) & (bins.start < stop) & (bins.start + bins.length > start)
                slots = np.unique(bins.row_ends.searchsorted(np.flatnonzero(touched), "right")).tolist()
            positions = [begin + int(np.flatnonzero(decoded.order == slot)[0]) for slot in slots]
        return sorted(epoch * self.samples_per_epoch + order.index(position) for position in positions)

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
        loaded = self.table.load(group, labels=False, more=(GRIDS,))
        rows = self.table.check(group, loaded)
        if self.table.has_images:
            where = str(self.table.row_groups[group])
            cut = (np.diff(rows.offsets) > self.seq_len) & (np.diff(list_values(loaded, GRIDS, where)[1]) > 0)
            if cut.any():
                row = int(cut.argmax())
                raise UserError(
                    f"{where}, row {row} has images and {np.diff(rows.offsets)[row]} tokens, "
                    f"more than --seq_len {self.seq_len}, which would cut it: raise --seq_len, or cut chats with "
                    "spark_jobs/tokenize.py --max_len."
                )
        if self.table.has_pairs and (lengths := np.diff(rows.offsets)).max(initial=0) > self.seq_len:
            raise UserError(
                f"{self.table.row_groups[group]}, row {lengths.argmax()} is a preference of {lengths.max()} tokens, "
                f"more than --seq_len {self.seq_len}, which would cut it: raise --seq_len, or leave such pairs out by "
                "spark_jobs/tokenize.py --max_len."
            )
        return len(self._bins(rows).row_ends)

    def _with_reference(self, group: int, rows: Rows) -> Rows:
        """Rows of pairs with what is known of them. Raises :class:`UserError` where a document has no other."""
        where = str(self.table.row_groups[group])
        documents = np.ones(1, np.int64) if rows.end_offsets is None else np.diff(rows.end_offsets)
        if (documents % 2).any():
            raise UserError(f"{where}: a row of preferences holds half a pair: write the table again.")
        if self._reference is None:
            return rows
        return replace(rows, reference=self._reference.in_group(group, documents, where))

    def _dataset_numbers(self, group: int, loaded: pa.Table, rows: Rows) -> np.ndarray:
        if self._whole is None:
            return dataset_numbers(loaded, self.datasets, str(self.table.row_groups[group]))
        documents = len(rows.offsets) - 1 if rows.ends is None else len(rows.ends)
        return np.full(documents, self.datasets.index(self._whole), np.int32)

    def _bins(self, rows: Rows) -> DocumentSpans:
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
            # In a run with images, ids say where these are, and grids belong to them.
            images = () if self.rules is None else (GRIDS, IMAGES) if self._images else (GRIDS,)
            more = (*images, DATASET) if self.datasets and self._whole is None else images
            wanted = group, self._ids or self.rules is not None, self._labels, more
            found = self._loaded[key] = self._pool.submit(self.table.load, *wanted)
        else:
            self._loaded.move_to_end(key)
        return found

    def _decoded(self, epoch: int, order: EpochOrder, group: int) -> Decoded:
        found = self._request(epoch, group)
        if isinstance(found, Decoded):
            return found
        loaded = found.result()
        rows = self.table.check(group, loaded, self._vocab_size, self.rules)
        rows = self._with_reference(group, rows) if self.pairs else rows
        if self.datasets:
            rows = replace(rows, datasets=self._dataset_numbers(group, loaded, rows))
        bins = self._bins(rows) if self.pack == "best-fit" else None
        slots = len(rows.offsets) - 1 if bins is None else len(bins.row_ends)
        decoded = self._loaded[epoch, group] = Decoded(rows, order.row_order(group, slots), bins)
        # Each lane has a row group open; small ones may fit several times into a sample. Those that were asked for and
        # not opened yet stay: a step may need more of them than there are lanes, and would read them twice.
        opened = [key for key, value in self._loaded.items() if isinstance(value, Decoded)]
        for key in opened[: -(self.lanes + 1) * (1 + len(self._sizes) // self.samples_per_epoch)]:
            del self._loaded[key]
        return decoded
