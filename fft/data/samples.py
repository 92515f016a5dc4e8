"""What the trainer reads: an endless sequence of samples, of one table (:mod:`fft.data.reader`) or of several."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from fft.data.table import Rows, Table

if TYPE_CHECKING:
    from fft.data.reader import SampleReader


@dataclass(frozen=True)
class SampleSpan:
    """Tokens [start, stop) of a row of a row group (its number in the file's order), at ``at`` of a sample."""

    group: int
    row: int
    start: int
    stop: int
    at: int


class Samples(Protocol):
    """Random access to samples of ``seq_len`` tokens, counted from the start of epoch 0; for one thread.

    ``aligned``: labels are written where their token stands; without them, ids are the labels. ``lanes`` places of
    the tables are read side by side, and row groups asked for ``lookahead`` samples before they are needed.
    """

    seq_len: int
    aligned: bool
    lanes: int
    samples_per_epoch: int

    @property
    def lookahead(self) -> int:
        """By how many samples row groups are asked for before they are needed."""

    @property
    def tables(self) -> list[Table]:
        """The tables, in the order in which they were given."""

    @property
    def parts(self) -> "list[SampleReader]":
        """A reader for each table."""

    @property
    def identity(self) -> dict[str, object]:
        """All that the order depends on."""

    def samples(self, indices: Sequence[int]) -> Iterator[list[tuple[SampleSpan, Rows]]]:
        """What samples are made of, and the rows in which it lies. Raises :class:`UserError` for unreadable rows."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to decode what samples will need."""

    def for_stage(self, ids: bool, labels: bool) -> Self:
        """The same order, for who needs only ids, or only labels."""

    def part(self, index: int) -> "tuple[SampleReader, int]":
        """Whose sample it is, and its index there."""

    def index(self, part: int, own: int) -> int:
        """The inverse of :meth:`part`, for the number of a table."""
