"""What a rank of a ring computes and exchanges: calls of an attention kernel, and steps between ranks."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

Span = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """A dense call: queries ``queries`` of the rank's tokens over rows ``keys`` of the block received.

    ``query_bounds`` and ``key_bounds`` are the boundaries of the call's documents, counted from the spans' starts.
    """

    queries: Span
    keys: Span
    query_bounds: tuple[int, ...]
    key_bounds: tuple[int, ...]

    #: Not as a :class:`Band` may be.
    reverse: ClassVar[bool] = False

    @property
    def query_spans(self) -> tuple[Span, ...]:
        """As a :class:`Band` has them."""
        return (self.queries,)

    @property
    def key_spans(self) -> tuple[Span, ...]:
        """As a :class:`Band` has them."""
        return (self.keys,)

    @property
    def area(self) -> int:
        """Query-key pairs."""
        documents = zip(pairwise(self.query_bounds), pairwise(self.key_bounds), strict=True)
        return sum((b - a) * (d - c) for (a, b), (c, d) in documents)


@dataclass(frozen=True)
class Band:
    """A call under a window: rows of ``query_spans`` see rows of ``key_spans``, document by document.

    Every query sees all keys of its document (they are cut at ``query_bounds`` and ``key_bounds``) or, with ``reverse``
    and equally many of both, the key of its own number and those after it. Rows of each span are then taken in reverse,
    which makes the call a causal one.
    """

    query_spans: tuple[Span, ...]
    key_spans: tuple[Span, ...]
    query_bounds: tuple[int, ...]
    key_bounds: tuple[int, ...]
    reverse: bool

    @property
    def area(self) -> int:
        """Query-key pairs."""
        documents = zip(pairwise(self.query_bounds), pairwise(self.key_bounds), strict=True)
        return sum((b - a) * (b - a + 1) // 2 if self.reverse else (b - a) * (d - c) for (a, b), (c, d) in documents)


@dataclass(frozen=True)
class Step:
    """One exchange: rows ``sent`` of own keys and values go to rank ``to``, ``received`` rows come from ``source``."""

    to: int
    sent: tuple[Span, ...]
    source: int
    received: int
    calls: tuple[Call | Band, ...]


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does: a causal call over its own tokens, cut at ``bounds``, then a step for each distance.

    Under a window there are more calls over its own tokens: ``near``.
    """

    rank: int
    bounds: tuple[int, ...]
    steps: tuple[Step, ...]
    near: tuple[Band, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens the rank holds."""
        return self.bounds[-1]

    @property
    def calls(self) -> int:
        """Kernel launches, the own one included."""
        return 1 + len(self.near) + sum(len(step.calls) for step in self.steps)
