"""Which bytes of which input files each part reads: planned from sizes alone, so that any engine reads alike."""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass

#: Input bytes of a part, and the fewest parts: enough to occupy a few cores with little input.
PART_BYTES, FEWEST_PARTS = 64 << 20, 8
#: Parts of a large input, about: they are larger, so that a driver and a manifest can hold them all.
MOST_PARTS = 20_000
#: Files of a part at most: each costs a while to open, however small it is.
PART_FILES = 1_000
#: Schema of :func:`Split.row` after ``part``.
SPLIT = "dataset string, kind string, path string, start bigint, stop bigint, doc_id string, most bigint"
#: Bytes of a line or a document: what decompresses to more, or never ends, is no text to train on.
MOST_BYTES = 512 << 20


@dataclass(frozen=True)
class Span:
    """A stretch of a file that can be read on its own: bytes [start, stop) of a text, or row groups of a parquet file.

    ``dataset`` names the input it belongs to. ``size`` is its cost in bytes. A compressed text is one span (0, 0).
    ``doc_id`` is that of all its documents, from the partition of a table in which the file lies.
    """

    dataset: str
    kind: str
    path: str
    start: int
    stop: int
    size: int
    doc_id: str | None = None


@dataclass(frozen=True)
class Split:
    """A :class:`Span` and the number of the part that reads it; a line or a document of ``most`` bytes is refused."""

    part: int
    dataset: str
    kind: str
    path: str
    start: int
    stop: int
    doc_id: str | None = None
    most: int = MOST_BYTES

    def row(self) -> tuple:
        """As a row for Spark."""
        return astuple(self)


def cut_text(dataset: str, kind: str, path: str, size: int, chunk: int) -> list[Span]:
    """Cut a plain text file into spans of about ``chunk`` bytes; records belong to the span they begin in."""
    chunks = max(1, -(-size // chunk))
    bounds = [size * i // chunks for i in range(chunks + 1)]
    return [Span(dataset, kind, path, a, b, b - a) for a, b in itertools.pairwise(bounds)]


def chunk_size(total: int) -> int:
    """Bytes into which large files are cut when the whole input has ``total``."""
    return max(1, min(max(PART_BYTES, -(-total // MOST_PARTS)), -(-total // FEWEST_PARTS)))


def deal(spans: Sequence[Span], target: int | None = None, most: int = MOST_BYTES) -> list[Split]:
    """Spans to parts of about ``target`` bytes, and no more than :data:`PART_FILES` files, in order, neighbours
    together; numbered from 0 without gaps."""
    target = target or chunk_size(sum(span.size for span in spans))
    splits, before, last, part = [], 0, None, -1
    path, files = "", 0
    for span in spans:
        bin_ = (before + span.size // 2) // target
        files += span.path != path
        if bin_ != last or files > PART_FILES:
            part, last, files = part + 1, bin_, 1
        path = span.path
        splits.append(Split(part, span.dataset, span.kind, span.path, span.start, span.stop, span.doc_id, most))
        before += span.size
    return splits
