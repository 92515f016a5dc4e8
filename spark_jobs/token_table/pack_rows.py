"""Pack a partition's stream of documents to rows, window by window, in Arrow batches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists, values_of_bytes
from fft.data.known import DOC_IDS
from fft.data.packing import DocumentSpans, best_fit, concat, cut_rows, gather_tokens, permute_rows
from fft.errors import UserError
from fft.images.rules import ImageRules
from spark_jobs.token_table.document_images import DocumentImages
from spark_jobs.token_table.read import texts_beside

_BATCH_ROWS = 1024
#: Rows by which a window grows: fixed, since the batches that an engine makes differ.
_STEP_ROWS, _STEP_ROWS_WITH_IMAGES = 256, 32
#: Bytes of images that are packed together: fewer documents than without, but memory holds them.
_WINDOW_IMAGE_BYTES = 1 << 28


@dataclass(frozen=True)
class Window:
    """Documents laid end to end: document ``d`` is ``values[name][offsets[d]:offsets[d + 1]]``, and row ``d`` of
    ``texts`` has its id and what goes with it.

    ``row_ends`` are the ends, in documents, of the rows in which they came. ``images`` are those of the documents.
    """

    values: dict[str, np.ndarray]
    offsets: np.ndarray
    texts: pa.RecordBatch
    row_ends: np.ndarray
    images: DocumentImages | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])


def window_tokens(max_len: int) -> int:
    """Tokens to pack together: 512 rows, at least 4 million and at most 64 million tokens."""
    return min(max(512 * max_len, 1 << 22), 1 << 26)


@dataclass(frozen=True)
class Packer:
    """Packs the rows of one part: batches (``part``, ``doc_ids``, lists as bytes) in, batches of packed rows out.

    ``window`` tokens are packed together; memory is that of one window. ``vision`` says what was made of images, where
    rows have some. With ``pairs``, every two documents are one for the packing, which is never cut.
    """

    max_len: int
    method: str
    seed: int
    window: int
    vision: ImageRules | None = None
    pairs: bool = False

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Pack one partition."""
        waiting: list[Window] = []
        partition, number = 0, 0
        for batch in fixed_batches(batches, _STEP_ROWS if self.vision is None else _STEP_ROWS_WITH_IMAGES):
            partition = batch.column("part")[0].as_py()
            waiting.append(read_window(batch, self.vision))
            held = sum(window.images.files.nbytes for window in waiting if window.images is not None)
            if sum(window.tokens for window in waiting) >= self.window or held >= _WINDOW_IMAGE_BYTES:
                spans, window = self._pack(waiting)
                waiting = []
                if self.method == "concat":
                    spans, rest = hold_back_short_row(spans, window, self.max_len)
                    waiting = [rest] if rest.tokens else []
                yield from self._rows(spans, window, partition, number)
                number += 1
        if waiting:
            yield from self._rows(*self._pack(waiting), partition, number)

    def _pack(self, waiting: list[Window]) -> tuple[DocumentSpans, Window]:
        window = join_windows(waiting)
        lengths, row_ends = np.diff(window.offsets), window.row_ends
        units = lengths
        if self.pairs:
            units, row_ends = self._pairs(window), row_ends // 2
        if self.method == "none":
            spans = cut_rows(units, row_ends, self.max_len)
        else:
            spans = {"best-fit": best_fit, "concat": concat}[self.method](units, self.max_len)
        if self.pairs:
            spans = whole_pairs(spans, lengths)
        if window.images is not None:
            window.images.check_whole(spans, lengths, window.texts.column(DOC_IDS), self.max_len)
        return spans, window

    def _pairs(self, window: Window) -> np.ndarray:
        """Tokens of each pair. Raises :class:`UserError` for half a one, and where one would be cut."""
        lengths, ends = np.diff(window.offsets), window.row_ends
        if (ends % 2).any():
            raise UserError("a row of preferences holds half a pair: write the input table again.")
        pairs = lengths.reshape(-1, 2).sum(1)
        rows = np.diff(window.offsets[np.append(0, ends)])
        if (longest := (rows if self.method == "none" else pairs).max(initial=0)) > self.max_len:
            name = window.texts.column(DOC_IDS)[2 * int(pairs.argmax())]
            raise UserError(
                f"preferences of {longest} tokens (document {name}) would be cut to `max_len` "
                f"{self.max_len}: raise it, or leave such pairs out with tokenize.py --max_len."
            )
        return pairs

    def _rows(self, spans: DocumentSpans, window: Window, partition: int, number: int) -> Iterator[pa.RecordBatch]:
        if self.method == "best-fit":  # it leaves rows sorted by the length of their first document
            order = np.random.default_rng((self.seed % 2**64, partition, number)).permutation(len(spans.row_ends))
            spans = permute_rows(spans, order)
        for first in range(0, len(spans.row_ends), _BATCH_ROWS):
            yield write_rows(spans.rows(first, first + _BATCH_ROWS), window)


def whole_pairs(pairs: DocumentSpans, lengths: np.ndarray) -> DocumentSpans:
    """Spans of whole pairs as those of their two documents each, of so many tokens."""
    document = np.stack([2 * pairs.document, 2 * pairs.document + 1], axis=1).ravel()
    return DocumentSpans(document, np.zeros_like(document), lengths[document], 2 * pairs.row_ends)


def fixed_batches(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of exactly ``rows``, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        first = 0
        while batch.num_rows - first >= rows - held:
            taken = rows - held
            yield pa.concat_batches([*waiting, batch.slice(first, taken)])
            first, waiting, held = first + taken, [], 0
        if first < batch.num_rows:
            waiting.append(batch.slice(first))
            held += batch.num_rows - first
    if waiting:
        yield pa.concat_batches(waiting)


def read_window(batch: pa.RecordBatch, vision: ImageRules | None = None) -> Window:
    """Take a batch apart into documents: by ``cu_seqlens`` where rows have them, else one a row.

    Raises :class:`UserError` when labels are not as long as ids, or boundaries do not rise from 0 to the row's length,
    or when a row's images are not those of its tokens.
    """
    window, row_offsets = _documents(batch)
    if vision is None:
        return window
    images = DocumentImages.read(batch, window.values["input_ids"], row_offsets, window.offsets, vision)
    return replace(window, images=images)


def _documents(batch: pa.RecordBatch) -> tuple[Window, np.ndarray]:
    """Documents of a batch without their images, and where its rows begin in their tokens."""
    ids, row_offsets = values_of_bytes(batch.column("input_ids"))
    values = {"input_ids": ids}
    if "labels" in batch.schema.names:
        values["labels"], offsets = values_of_bytes(batch.column("labels"))
        if not np.array_equal(offsets, row_offsets):
            raise UserError("labels and input_ids differ in length: write the input table again.")
    lists = {DOC_IDS: batch.column(DOC_IDS)} | texts_beside(batch)
    id_offsets = lists[DOC_IDS].offsets.to_numpy().astype(np.int64)
    texts = pa.RecordBatch.from_arrays([column.flatten() for column in lists.values()], list(lists))
    if "cu_seqlens" not in batch.schema.names:
        first = texts.take(pa.array(id_offsets[:-1] - id_offsets[0]))
        return Window(values, row_offsets, first, np.arange(1, batch.num_rows + 1)), row_offsets
    bounds, at = values_of_bytes(batch.column("cu_seqlens"))
    begins = np.ones(len(bounds), bool)
    begins[at[1:] - 1] = False  # the last boundary of a row begins no document
    if not (
        (np.diff(at) >= 2).all()
        and (bounds[at[:-1]] == 0).all()
        and np.array_equal(bounds[at[1:] - 1], np.diff(row_offsets))
        and (np.diff(bounds)[begins[:-1]] >= 0).all()
    ):
        raise UserError("cu_seqlens must rise from 0 to the row's length: write the input table again.")
    documents = np.diff(at) - 1
    starts = bounds[begins] + np.repeat(row_offsets[:-1], documents)
    if not np.array_equal(np.diff(id_offsets), documents):
        # Named as one row elsewhere: each of its documents gets the row's first name.
        texts = texts.take(pa.array(np.repeat(id_offsets[:-1] - id_offsets[0], documents)))
    return Window(values, np.append(starts, row_offsets[-1]), texts, np.cumsum(documents)), row_offsets


def join_windows(windows: list[Window]) -> Window:
    """Several windows as one."""
    if len(windows) == 1:
        return windows[0]
    shifts = np.cumsum([0] + [w.tokens for w in windows])
    rows = np.cumsum([0] + [w.texts.num_rows for w in windows])
    images = [w.images for w in windows if w.images is not None]
    return Window(
        {name: np.concatenate([w.values[name] for w in windows]) for name in windows[0].values},
        np.append(np.concatenate([w.offsets[:-1] + s for w, s in zip(windows, shifts, strict=False)]), shifts[-1]),
        pa.concat_batches([w.texts for w in windows]),
        np.concatenate([w.row_ends + r for w, r in zip(windows, rows, strict=False)]),
        DocumentImages.join(images) if images else None,
    )


def hold_back_short_row(spans: DocumentSpans, window: Window, max_len: int) -> tuple[DocumentSpans, Window]:
    """Take the last row out if it is not full, and make its spans the beginning of the next window."""
    full = window.tokens // max_len
    rest = spans.rows(full, full + 1)
    texts = window.texts.take(pa.array(rest.document))
    values = {name: gather_tokens(v, window.offsets, rest) for name, v in window.values.items()}
    offsets = np.concatenate(([0], np.cumsum(rest.length)))
    return spans.rows(0, full), Window(values, offsets, texts, np.arange(1, texts.num_rows + 1))


def write_rows(spans: DocumentSpans, window: Window) -> pa.RecordBatch:
    """Spans to rows of ``input_ids``, ``cu_seqlens``, ``doc_ids`` and, if there are any, what goes with ids, ``labels``
    and images."""
    row_starts = np.concatenate(([0], spans.row_ends[:-1]))
    ends = np.concatenate(([0], np.cumsum(spans.length)))
    row_offsets = np.append(ends[row_starts], ends[-1])
    counts = spans.row_ends - row_starts
    row = np.repeat(np.arange(len(counts)), counts)
    bounds = np.zeros(len(row) + len(counts), np.int32)
    bounds[np.arange(len(row)) + row + 1] = ends[1:] - row_offsets[row]
    lists = {name: int_lists(gather_tokens(v, window.offsets, spans), row_offsets) for name, v in window.values.items()}
    id_offsets = np.append(row_starts, spans.row_ends[-1:])
    columns = {
        "input_ids": lists["input_ids"],
        "cu_seqlens": int_lists(bounds, id_offsets + np.arange(len(id_offsets))),
    }
    ends_of_texts, texts = pa.array(id_offsets.astype(np.int32)), window.texts.take(pa.array(spans.document))
    for name, column in zip(texts.schema.names, texts.columns, strict=True):
        columns[name] = pa.ListArray.from_arrays(ends_of_texts, column)
    if "labels" in lists:
        columns["labels"] = lists["labels"]
    if window.images is not None:
        columns |= window.images.columns(spans)
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
