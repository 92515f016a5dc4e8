"""From samples to micro-batches: packed, no padding, boundaries kept, resumable at any sample."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fft.data.by_dataset import DatasetBatch, datasets_within
from fft.data.draws import token_draws
from fft.data.image_batches import Chosen, EncodedImages, ImageBatch, RowLayout, StepDecoding
from fft.data.pairs import PairBatch
from fft.data.samples import Samples, SampleSpan
from fft.data.table import IGNORE, Rows
from fft.errors import UserError

#: Threads that decode images, and bytes of patches that they make of the next step while one is computed.
_IMAGE_DECODERS, _AHEAD_BYTES = 4, 256 << 20


@dataclass(frozen=True)
class MicroBatch:
    """Samples laid end to end, T tokens, as the pipeline takes them: samples * seq_len, or, ragged, fewer.

    ``input_ids`` int32 [1, T]; ``labels`` int64 [T]; ``cu_seqlens`` int32 [T + 1], padded by repeating its last entry:
    its shape depends on T alone. That entry is T or, ragged, where documents end and the tokens that round T up begin.
    ``trained`` counts the labels that are trained on, or, of preferences, the ``pairs``. ``images`` is None where a run
    trains without; in one with images every micro-batch has it, also one of texts. ``draws`` int64 [T] are each token's
    random number, where such are asked for, see :mod:`fft.data.draws`. ``datasets`` are those of the documents, where
    these are asked for.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    trained: int
    images: ImageBatch | None = None
    pairs: PairBatch | None = None
    draws: np.ndarray | None = None
    datasets: DatasetBatch | None = None


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt: replica ``r`` takes its samples ``i`` with ``i % replicas == r``, in order.

    The samples of a global batch, and so its loss, depend neither on the number of replicas nor on the micro-batch.
    With ``multiple`` micro-batches are ragged, as :func:`micro_batch` says; with ``draws``, a seed, tokens have random
    numbers.
    """

    replicas: int
    replica: int
    micro_batches: int
    micro_batch_size: int
    multiple: int | None = None
    draws: int | None = None

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.replicas * self.micro_batches * self.micro_batch_size

    def indices(self, first: int) -> list[range]:
        """Sample indices of this replica's micro-batches, in the global batch that begins with sample ``first``."""
        own = first + (self.replica - first) % self.replicas
        size = self.micro_batch_size * self.replicas
        return [range(own + m * size, own + (m + 1) * size, self.replicas) for m in range(self.micro_batches)]


def micro_batch(reader: Samples, indices: Sequence[int], total_samples: int, multiple: int | None = None) -> MicroBatch:
    """Samples laid end to end; those from ``total_samples`` on are blank.

    Nothing is trained on the last token of a document, which predicts nothing, on the tokens of images, and on what is
    left over of a sample, which is a document of its own. With ``multiple`` that is left out, and the length rounded up
    to a multiple of so many tokens, but never to more than it is without. Raises :class:`UserError` for images that
    cannot be decoded.
    """
    (made,) = _Step([_laid_out(reader, indices, total_samples, multiple)], reader).finish()
    return made


def _laid_out(
    reader: Samples, indices: Sequence[int], total_samples: int, multiple: int | None, seed: int | None = None
) -> tuple[MicroBatch, EncodedImages | None]:
    """A micro-batch without its images, and these. With ``seed`` its tokens have random numbers."""
    length, tokens = reader.seq_len, reader.seq_len * len(indices)
    real = [index for index in indices if index < total_samples]
    ids, labels = np.zeros(tokens, dtype=np.int32), np.empty(tokens, dtype=np.int64)
    layout = None if reader.rules is None else RowLayout()
    known: list[np.ndarray] | None = [] if reader.pairs else None
    numbers: list[np.ndarray] | None = [] if reader.datasets else None
    beside = layout, known, numbers
    ends, filled = _fill(reader.samples(real), 0 if multiple else length, reader.aligned, (ids, labels), beside)
    starts = [0, *filled[:-1]][: len(indices)] if multiple else range(0, tokens, length)
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
    pairs = datasets = None
    if known is not None or numbers is not None:
        documents = np.repeat(np.arange(len(ends) + 1, dtype=np.int32), np.diff(ends, prepend=0, append=tokens))
        if known is not None:
            pairs = PairBatch(documents, np.concatenate([np.empty(0, np.float32), *known]))
        if numbers is not None:
            datasets = DatasetBatch(documents, np.concatenate([np.empty(0, np.int32), *numbers]))
    if unfilled and not multiple:
        ends = np.union1d(ends, stops)
    labels[ends - 1] = IGNORE
    for start, stop in unfilled:
        labels[start:stop] = IGNORE
    cu_seqlens = np.full(tokens + 1, ends[-1] if len(ends) else 0, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(ends) + 1] = ends
    images = None
    if layout is not None and reader.rules is not None:
        images = layout.encoded(ids, np.union1d(ends, [tokens]), reader.rules)
        labels[images.index[:-1] - 1] = IGNORE  # of the row's first token: the last label, which is no other
    trained = int(np.count_nonzero(labels != IGNORE)) if pairs is None else pairs.count
    draws = None if seed is None else token_draws(seed, indices[: len(starts)], starts, tokens)
    made = MicroBatch(ids[None], labels, cu_seqlens, trained, pairs=pairs, draws=draws, datasets=datasets)
    return made, images


def _fill(
    samples: Iterable[list[tuple[SampleSpan, Rows]]],
    stride: int,
    aligned: bool,
    row: tuple[np.ndarray, np.ndarray],
    beside: tuple[RowLayout | None, list[np.ndarray] | None, list[np.ndarray] | None],
) -> tuple[list[int], list[int]]:
    """Write samples, one after the other, into a row's ids and, where their token stands, if ``aligned``, its labels.

    Each begins ``stride`` tokens after the one before, or, if that is 0, where it ended. What lies ``beside`` is laid
    out as well: images, and of documents what a reference model says and the numbers of their datasets. Returns where
    the documents end, and up to where each sample is filled.
    """
    (ids, labels), (layout, known, numbers) = row, beside
    ends: list[int] = []
    filled: list[int] = []
    at = 0
    for number, spans in enumerate(samples):
        at = number * stride if stride else at
        for span, rows in spans:
            begin, length = int(rows.offsets[span.row]) + span.start, span.stop - span.start
            if len(rows.input_ids):
                ids[at : at + length] = rows.input_ids[begin : begin + length]
            if aligned:
                targets = rows.input_ids if rows.labels is None else rows.labels
                labels[at : at + length] = targets[begin : begin + length]
            if layout is not None and rows.images is not None:
                layout.add(rows.images, begin, begin + length)
            ends += [at + end for end in rows.document_ends(span.row, span.start, span.stop)]
            if known is not None:
                known.append(rows.reference_of(span.row))
            if numbers is not None:
                numbers.append(datasets_within(rows, span.row, span.start, span.stop))
            at += length
        filled.append(at)
    return ends, filled


def step_batches(reader: Samples, plan: BatchPlan, first: int, total_samples: int) -> list[MicroBatch]:
    """This replica's micro-batches of the global batch that begins with sample ``first``."""
    return _step(reader, plan, first, total_samples).finish()


class _Step:
    """A step's micro-batches while their images are decoded."""

    def __init__(
        self,
        laid_out: list[tuple[MicroBatch, EncodedImages | None]],
        reader: Samples,
        chosen: Chosen | None = None,
        pool: Executor | None = None,
    ) -> None:
        self._batches = [batch for batch, _ in laid_out]
        images = [images for _, images in laid_out if images is not None]
        self._decoding = None if reader.rules is None else StepDecoding(images, reader.rules, chosen, pool)

    def begin(self) -> None:
        """Begin to decode its images."""
        if self._decoding is not None:
            self._decoding.begin(_AHEAD_BYTES)

    def finish(self) -> list[MicroBatch]:
        if self._decoding is None:
            return self._batches
        images = self._decoding.batches()
        return [replace(batch, images=own) for batch, own in zip(self._batches, images, strict=True)]


def _step(
    reader: Samples, plan: BatchPlan, first: int, total: int, chosen: Chosen | None = None, pool: Executor | None = None
) -> _Step:
    laid_out = [_laid_out(reader, indices, total, plan.multiple, plan.draws) for indices in plan.indices(first)]
    return _Step(laid_out, reader, chosen, pool)


class Loader:
    """The micro-batches of one replica, step after step; row groups are decoded ahead. State is a number of samples.

    Iterating yields the list of a step's micro-batches until ``total_samples`` have been consumed by all replicas
    together. ``waited`` adds up the seconds for which the caller had to wait. Images are decoded a step ahead, in
    threads: those that are ``chosen``, see :mod:`fft.data.image_batches`, or all.
    """

    def __init__(self, reader: Samples, plan: BatchPlan, total_samples: int, chosen: Chosen | None = None) -> None:
        self._reader, self._plan, self._total, self._chosen = reader, plan, total_samples, chosen
        self._consumed = 0
        self.waited = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Epoch, samples consumed in it by all replicas together, and what their order depends on."""
        epoch, samples = divmod(self._consumed, self._reader.samples_per_epoch)
        return {"epoch": epoch, "samples": samples, **self._reader.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the samples that were consumed. Raises :class:`UserError` when the order would be another."""
        before = state.get("table", ())
        tables = [before] if isinstance(before, str) else before
        for name, value in self._reader.identity.items():
            if state.get(name) != value and name != "table":
                raise UserError(
                    f"the data's {name} is {value}, that of the run to be resumed {state.get(name)}: give the same "
                    "tables and weights, --seq_len, --seed, --pack, --shuffle_lanes and --blend_end. That run read "
                    f"{', '.join(tables)}."
                )
        self._consumed = state["epoch"] * self._reader.samples_per_epoch + state["samples"]

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        batch = self._plan.global_batch
        ahead = -(-(self._reader.lookahead + self._reader.lanes) // batch) * batch
        for first in range(self._consumed, self._consumed + ahead, batch):
            self._prefetch(first)
        with nullcontext() if self._reader.rules is None else ThreadPoolExecutor(_IMAGE_DECODERS, "images") as pool:
            following = None
            while self._consumed < self._total:
                begin = time.perf_counter()
                self._prefetch(self._consumed + ahead)
                made = (following or self._step(self._consumed, pool)).finish()
                self._consumed += batch
                if pool is not None and self._consumed < self._total:
                    following = self._step(self._consumed, pool)
                    following.begin()
                self.waited += time.perf_counter() - begin
                yield made

    def _step(self, first: int, pool: Executor | None) -> _Step:
        return _step(self._reader, self._plan, first, self._total, self._chosen, pool)

    def _prefetch(self, first: int) -> None:
        micro_batches = self._plan.indices(first)
        self._reader.prefetch([index for batch in micro_batches for index in batch if index < self._total])
