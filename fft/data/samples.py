"""What the trainer reads: an endless sequence of samples, of one table or of several that are blended."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from fft.data.pairs import Reference
from fft.data.table import Rows, Table
from fft.images.rules import ImageRules


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
    the tables are read side by side. ``rules`` are those of the images on which a run trains, None in a run without.
    ``pairs``: a run trains on preferences. ``datasets`` are names, where documents come with the number of theirs.
    """

    seq_len: int
    aligned: bool
    lanes: int
    samples_per_epoch: int

    @property
    def rules(self) -> ImageRules | None:
        """See above."""

    @property
    def pairs(self) -> bool:
        """See above."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """See above."""

    @property
    def lookahead(self) -> int:
        """By how many samples row groups are asked for before they are needed."""

    @property
    def tables(self) -> list[Table]:
        """The tables, in the order in which they were given."""

    @property
    def identity(self) -> dict[str, object]:
        """All that the order depends on, as JSON has it."""

    def samples(self, indices: Sequence[int]) -> Iterator[list[tuple[SampleSpan, Rows]]]:
        """What samples are made of, and the rows in which it lies. Raises :class:`UserError` for unreadable rows."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to decode what samples will need."""

    def for_stage(self, ids: bool, labels: bool, images: bool = False) -> Self:
        """The same order, for who needs only ids, only labels, or pixels.

        In a run with images, all read ids and grids, so that all know of every image; who needs no pixels does not read
        the bytes of images, and has the patches of blank ones alone.
        """

    def with_images(self, rules: ImageRules) -> Self:
        """The same order, in a run that trains on images: its tables' rules are these, or they have no images."""

    def with_pairs(self, known: Mapping[str, Reference] | None = None) -> Self:
        """The same order, in a run that trains on preferences; what is ``known`` of tables, by their source."""

    def with_datasets(self, names: Sequence[str], whole: Mapping[str, str] | None = None) -> Self:
        """The same order, where documents come with the number of their dataset among ``names``, which are all. Tables
        that are one as a ``whole``, by their source, need not say of which each is.
        """

    @property
    def members(self) -> Sequence["TableSamples"]:
        """The samples of each table by themselves."""

    def member(self, index: int) -> tuple["TableSamples", int]:
        """Whose sample it is, and its index there."""

    def index(self, member: int, own: int) -> int:
        """The inverse of :meth:`member`, for the number of a table."""


class TableSamples(Samples, Protocol):
    """The samples of one table, which may be a member of a blend and can be searched for what they are made of."""

    table: Table

    @property
    def has_labels(self) -> bool:
        """Whether the table says what is trained on; otherwise every token is."""

    def as_member(self, lanes: int, aligned: bool) -> Self:
        """The same table in another number of lanes, in a blend in which some table has labels, or none."""

    def spans_of(self, index: int) -> list[SampleSpan]:
        """What a sample is made of."""

    def samples_with(self, epoch: int, group: int, row: int, start: int, stop: int) -> list[int]:
        """Samples of an epoch that hold some of tokens [start, stop) of a row of a row group."""
