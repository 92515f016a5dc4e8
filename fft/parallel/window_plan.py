"""Attention within a sliding window, as calls that every kernel can do: causal ones and dense rectangles.

A query sees itself and the ``window - 1`` tokens before it in its document. Let B be ``window - 1``. A stretch of a
document is cut into blocks of B tokens: within each, all earlier tokens are near enough, which is causal attention. Of
the block before it, query r sees the keys from r on: taken in reverse order, that is causal attention again, of equal
length. What precedes a stretch, on this rank or on another, is a rectangle of which a band is seen: the first queries
see all keys, which is dense, then each one fewer than the one before, which in reverse is causal. So no kernel needs to
know of windows, nothing is computed that is not seen, and no key travels that nobody sees.

Host arithmetic, as :mod:`fft.parallel.ring_plan`.
"""

import argparse
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from fft.errors import Parser, UserError, run_cli
from fft.parallel.ring_calls import Band, RankPlan, Span, Step
from fft.parallel.ring_plan import TokenShards, plan_rank, plan_shards


@dataclass(frozen=True)
class _Stretch:
    """Tokens ``start`` to ``stop`` of the row, all of a document that starts at ``begin``; ``at`` is where the rank
    keeps the first.
    """

    start: int
    stop: int
    begin: int
    at: int


@dataclass(frozen=True)
class _Piece:
    """What one document is to a call: rows of queries and of keys, each cut into ``lengths``."""

    queries: Span
    keys: Span
    reverse: bool
    lengths: tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def plan_attention(shards: TokenShards, rank: int, window: int | None = None) -> RankPlan:
    """What ``rank`` computes, sends and receives where queries see at most ``window`` tokens; None: all before."""
    longest = max(b - a for a, b in zip(shards.bounds, shards.bounds[1:], strict=False))
    if window is None or window >= longest:
        return plan_rank(shards, rank)
    reach, ranks, own = window - 1, shards.ranks, _stretches(shards, rank)
    cuts, pieces = [0], []
    for stretch in own:
        length = stretch.stop - stretch.start
        blocks = range(max(1, reach), length, max(1, reach))
        cuts += [stretch.at + block for block in (*blocks, length)]
        pieces += _within(stretch, reach)
        pieces += [piece for span, at in _before(stretch, own, reach) for piece in _band(stretch, span, at, reach)]
    steps = []
    for distance in range(1, ranks):
        to, source = (rank + distance) % ranks, (rank - distance) % ranks
        sent = [_rows(own, span) for span in _needed(_stretches(shards, to), own, reach)]
        theirs = _stretches(shards, source)
        needed = _needed(own, theirs, reach)
        starts = list(accumulate((b - a for a, b in needed), initial=0))
        calls = []
        for stretch in own:
            for span, _ in _before(stretch, theirs, reach):
                place = bisect_right([a for a, _ in needed], span[0]) - 1
                calls += _band(stretch, span, starts[place] + span[0] - needed[place][0], reach)
        steps.append(Step(to, tuple(s for spans in sent for s in spans), source, starts[-1], _launches(calls)))
    return RankPlan(rank, tuple(cuts), tuple(steps), _launches(pieces))


@lru_cache(maxsize=1024)
def _stretches(shards: TokenShards, rank: int) -> tuple[_Stretch, ...]:
    found, at, bounds = [], 0, shards.bounds
    for a, b in shards.spans(rank):
        while a < b:
            document = bisect_right(bounds, a) - 1
            stop = min(b, bounds[document + 1])
            found.append(_Stretch(a, stop, bounds[document], at))
            a, at = stop, at + stop - a
    return tuple(found)


def _within(stretch: _Stretch, reach: int) -> list[_Piece]:
    """What the blocks of a stretch see of the blocks before them."""
    length = stretch.stop - stretch.start
    if not 0 < reach < length:
        return []
    lengths = [reach] * ((length - reach) // reach)
    rest = length % reach
    at, end = stretch.at, stretch.at + length
    if rest:
        lengths.append(rest)
    pieces = [_Piece((at + reach, end), (at, end - reach), True, tuple((n, n) for n in lengths))]
    if rest:  # the last block is short: it sees all of the later keys before it
        pieces.append(_Piece((end - rest, end), (end - reach, end - rest), False, ((rest, reach - rest),)))
    return pieces


def _before(queries: _Stretch, keys: Iterable[_Stretch], reach: int) -> list[tuple[Span, int]]:
    """Tokens of the row that precede a stretch and are seen from it, and where their rank keeps the first."""
    first, found = max(queries.begin, queries.start - reach), []
    for stretch in keys:
        a, b = max(first, stretch.start), min(queries.start, stretch.stop)
        if a < b:
            found.append(((a, b), stretch.at + a - stretch.start))
    return found


def _band(queries: _Stretch, keys: Span, at: int, reach: int) -> list[_Piece]:
    """What a stretch sees of the tokens ``keys`` of the row before it, which are kept from ``at`` on."""
    count, length = queries.stop - queries.start, keys[1] - keys[0]
    whole = min(count, keys[0] - (queries.start - reach))  # so many queries see all of them
    fewer, pieces, own = min(count - whole, length), [], queries.at
    if whole:
        pieces.append(_Piece((own, own + whole), (at, at + length), False, ((whole, length),)))
    if fewer:
        rows = own + whole, own + whole + fewer
        pieces.append(_Piece(rows, (at, at + fewer), True, ((fewer, fewer),)))
        if length > fewer:
            pieces.append(_Piece(rows, (at + fewer, at + length), False, ((fewer, length - fewer),)))
    return pieces


def _needed(queries: Iterable[_Stretch], keys: Iterable[_Stretch], reach: int) -> list[Span]:
    """Tokens of the row that one rank needs of another, each once, in the row's order."""
    merged: list[Span] = []
    for a, b in sorted(span for stretch in queries for span, _ in _before(stretch, keys, reach)):
        if merged and merged[-1][1] >= a:
            start, stop = merged.pop()
            a, b = start, max(b, stop)
        merged.append((a, b))
    return merged


def _rows(own: Iterable[_Stretch], tokens: Span) -> list[Span]:
    """Where a rank keeps tokens of the row."""
    found = [(max(s.start, tokens[0]), min(s.stop, tokens[1]), s) for s in own]
    return [(s.at + a - s.start, s.at + b - s.start) for a, b, s in found if a < b]


def _launches(pieces: Iterable[_Piece]) -> tuple[Band, ...]:
    """As few calls as can be, in each of which a query occurs once."""
    groups: list[list[_Piece]] = []
    for piece in pieces:
        (a, b), fitting = piece.queries, [group for group in groups if group[0].reverse == piece.reverse]
        free = (g for g in fitting if all(b <= other.queries[0] or other.queries[1] <= a for other in g))
        group = next(free, None)
        if group is None:
            groups.append([piece])
        else:
            group.append(piece)
    return tuple(map(_band_of, groups))


def _band_of(group: list[_Piece]) -> Band:
    reverse = group[0].reverse
    lengths = [pair for piece in group for pair in (reversed(piece.lengths) if reverse else piece.lengths)]
    queries, keys = (tuple(accumulate((pair[side] for pair in lengths), initial=0)) for side in (0, 1))
    return Band(tuple(p.queries for p in group), tuple(p.keys for p in group), queries, keys, reverse)


def savings(lengths: Sequence[int], ranks: int, window: int) -> str:
    """What every rank computes and receives with a window, beside the same without one."""
    shards = plan_shards((0, *accumulate(lengths)), ranks)
    lines = ["rank      pairs  windowed   calls  windowed   received  windowed"]
    for rank in range(ranks):
        row = [f"{rank:4d}"]
        numbers = [_work(plan_attention(shards, rank, seen)) for seen in (None, window)]
        for all_seen, windowed in zip(*numbers, strict=True):
            row.append(f"{all_seen:10,d} {windowed:9,d}")
        lines.append(" ".join(row))
    return "\n".join(lines)


def _work(plan: RankPlan) -> tuple[int, int, int]:
    """Pairs of a query and a key, launches, and keys received."""
    bounds = zip(plan.bounds, plan.bounds[1:], strict=False)
    pairs = sum((b - a) * (b - a + 1) // 2 for a, b in bounds)
    calls = [*plan.near, *(call for step in plan.steps for call in step.calls)]
    return pairs + sum(call.area for call in calls), plan.calls, sum(step.received for step in plan.steps)


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = Parser(
        description="What a sliding window spares the ranks of a ring.", prog="python -m fft.parallel.window_plan"
    )
    parser.add_argument("lengths", type=int, nargs="+", help="tokens of each document")
    parser.add_argument("--ranks", type=int, default=4, help="ranks of the ring (default %(default)s)")
    parser.add_argument("--window", type=int, required=True, help="tokens that a query sees, itself the last")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what a window spares. Raises :class:`UserError` for lengths and ranks that no plan is for."""
    options = build_parser().parse_args(arguments)
    if min(*options.lengths, options.ranks, options.window) < 1:
        raise UserError("lengths, --ranks and --window must be at least 1.")
    try:
        print(savings(options.lengths, options.ranks, options.window))
    except ValueError as error:
        raise UserError(f"{error}: give longer documents, or fewer --ranks.") from None


if __name__ == "__main__":
    run_cli(main)
