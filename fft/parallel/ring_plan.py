"""Which rank holds, computes and sends what, so that packed documents are attended to across ranks.

The packed row of N tokens is cut into C * P chunks of equal length, C for each of the P ranks: everything outside
attention stays balanced. The chunks are dealt out by the attention they cost, so that attention is balanced, too; with
one document this is the zigzag of Llama 3 (arXiv:2407.21783) and C = 2.

A rank keeps its chunks one after the other. Because documents are contiguous and the order of tokens is kept, attention
of a rank's tokens among themselves is one causal call over its piece of each document. All other attention is
rectangular: a chunk's first document may have begun on other ranks, and every query of it there sees all those earlier
tokens. So a chunk needs at most one dense rectangle of each other rank, and only the keys of documents that both ranks
hold a piece of ever travel.

Everything here is host arithmetic, a pure function of the boundaries and the number of ranks.
"""

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from fft.errors import Parser, UserError, run_cli
from fft.parallel.ring_calls import Call, RankPlan, Span, Step

#: Chunks per rank that are tried, in this order.
CHUNKS = (1, 2, 4, 8, 16)

#: The busiest rank may have this much more attention than the mean before more chunks are tried.
BALANCED = 1.05

#: More than two chunks per rank are worth their calls from this length on: below, kernels are far from their peak rate.
MIN_CHUNK = 256


def row_multiple(ranks: int) -> int:
    """Rows of a multiple of so many tokens are cut into equal chunks, whatever number of :data:`CHUNKS` is tried.

    A rank's share is then a multiple of 16 tokens, the tile of a device's matrix unit.
    """
    return CHUNKS[-1] * ranks


@dataclass(frozen=True, eq=False)  # made once by the cached functions below: equal means the same, and hashes fast
class TokenShards:
    """Who holds which tokens: chunk i is ``cuts[i]`` to ``cuts[i + 1]`` of the row and lies with rank ``owners[i]``."""

    bounds: tuple[int, ...]
    cuts: tuple[int, ...]
    owners: tuple[int, ...]
    areas: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.areas)

    @property
    def imbalance(self) -> float:
        """Attention (query-key pairs) of the busiest rank over the mean."""
        return max(self.areas) * self.ranks / sum(self.areas)

    def spans(self, rank: int) -> list[Span]:
        """The tokens of a rank, in the order it keeps them, adjacent chunks as one."""
        spans: list[Span] = []
        for owner, (a, b) in zip(self.owners, pairwise(self.cuts), strict=True):
            if owner != rank:
                continue
            if spans and spans[-1][1] == a:
                a = spans.pop()[0]
            spans.append((a, b))
        return spans

    def tokens(self, rank: int) -> np.ndarray:
        """Index in the row of every token of a rank, int64."""
        return np.concatenate([np.arange(a, b) for a, b in self.spans(rank)])


@lru_cache(maxsize=64)
def plan_shards(bounds: tuple[int, ...], ranks: int, chunks: int | None = None) -> TokenShards:
    """Cut the row with document boundaries ``bounds`` (first 0, last N) into chunks and deal them to the ranks.

    Without ``chunks`` (chunks per rank) the fewest are taken that balance attention to :data:`BALANCED`, or those that
    balance it best. Ranks hold equally many tokens where N is a multiple of the ranks, else to within a token per
    chunk. Raises ValueError if there are fewer tokens than chunks.
    """
    tokens = bounds[-1]
    if tokens < ranks * (chunks or 1):
        raise ValueError(f"{tokens} tokens cannot be cut into {ranks * (chunks or 1)} chunks, {chunks or 1} per rank")
    if chunks:
        return _deal(bounds, ranks, chunks)
    first, *more = CHUNKS
    best = _deal(bounds, ranks, first)
    for count in more:
        if best.imbalance <= BALANCED or tokens < ranks * count * (1 if count == 2 else MIN_CHUNK):
            break
        if tokens % ranks or tokens % (ranks * count) == 0:  # equal shares are worth more than balance
            best = min(best, _deal(bounds, ranks, count), key=lambda shards: shards.imbalance)
    return best


@lru_cache(maxsize=256)
def plan_rank(shards: TokenShards, rank: int) -> RankPlan:
    """What ``rank`` computes, sends and receives."""
    ranks = shards.ranks
    own = _Pieces.of(shards, rank)
    others = {other: _Pieces.of(shards, other) for other in range(ranks) if other != rank}
    steps = []
    for distance in range(1, ranks):
        to, source = (rank + distance) % ranks, (rank - distance) % ranks
        sent = _merged([span for _, span in _needed(others[to], own)])
        received, calls = _calls(own, others[source])
        steps.append(Step(to, sent, source, received, calls))
    return RankPlan(rank, own.bounds, tuple(steps))


def shards_of(bounds: tuple[int, ...], owners: Sequence[int]) -> TokenShards:
    """Cut the row into as many equal chunks as there are ``owners`` and give them to those."""
    cuts = np.arange(len(owners) + 1) * bounds[-1] // len(owners)
    sums = np.zeros(max(owners) + 1, dtype=np.int64)
    np.add.at(sums, list(owners), np.diff(_area_before(np.asarray(bounds), cuts)))
    return TokenShards(bounds, tuple(cuts.tolist()), tuple(owners), tuple(sums.tolist()))


def _deal(bounds: tuple[int, ...], ranks: int, chunks: int) -> TokenShards:
    """Longest processing time first (Graham 1969), each rank taking ``chunks`` chunks."""
    total, count = bounds[-1], ranks * chunks
    cuts = np.arange(count + 1) * total // count
    areas = np.diff(_area_before(np.asarray(bounds), cuts))
    if chunks == 1:
        return shards_of(bounds, list(range(ranks)))  # neighbours share documents: ranks in the row's order
    owners = np.empty(count, dtype=int)
    loads = [(0, 0, rank) for rank in range(ranks)]  # a heap of (area, chunks taken, rank)
    for chunk in np.argsort(-areas, kind="stable"):
        area, taken, rank = heapq.heappop(loads)
        owners[chunk] = rank
        if taken + 1 < chunks:
            heapq.heappush(loads, (area + int(areas[chunk]), taken + 1, rank))
    return shards_of(bounds, owners.tolist())


def _area_before(bounds: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Query-key pairs of all queries before each of ``tokens``."""
    lengths = np.diff(bounds)
    whole = np.concatenate([[0], np.cumsum(lengths * (lengths + 1) // 2)])
    document = np.searchsorted(bounds, tokens, side="right") - 1
    inside = tokens - bounds[document]
    return whole[document] + inside * (inside + 1) // 2


@dataclass(frozen=True)
class _Pieces:
    """A rank's tokens: runs of the row, cut at document boundaries where a run's first document began before it.

    ``runs`` are (start in the row, end of the run's first document or of the run, start among the rank's tokens);
    ``spans`` (start, end in the row, start among the rank's tokens); ``begins`` is each run's first document's start.
    """

    runs: tuple[tuple[int, int, int], ...]
    begins: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, shards: TokenShards, rank: int) -> "_Pieces":
        return _pieces(shards, rank)

    def within(self, start: int, stop: int) -> list[Span]:
        """Rows among the rank's tokens that hold tokens ``start`` to ``stop`` of the row."""
        spans = ((max(a, start), min(b, stop), a, at) for a, b, at in self.spans)
        return [(lo - a + at, hi - a + at) for lo, hi, a, at in spans if lo < hi]


@lru_cache(maxsize=1024)
def _pieces(shards: TokenShards, rank: int) -> _Pieces:
    documents = np.asarray(shards.bounds)
    runs, begins, spans, bounds, at, last = [], [], [], [0], 0, -1
    for a, b in shards.spans(rank):
        first = int(np.searchsorted(documents, a, side="right")) - 1
        stop = int(np.searchsorted(documents, b, side="left"))
        if at and first != last:  # another document than the run before ended with
            bounds.append(at)
        bounds.extend((documents[first + 1 : stop] - a + at).tolist())
        last = stop - 1
        if documents[first] < a:
            runs.append((a, min(b, int(documents[first + 1])), at))
            begins.append(int(documents[first]))
        spans.append((a, b, at))
        at += b - a
    bounds.append(at)
    return _Pieces(tuple(runs), tuple(begins), tuple(spans), tuple(bounds))


def _needed(queries: _Pieces, keys: _Pieces) -> list[tuple[int, Span]]:
    """(Document's start, rows of the keys' rank) the queries' rank needs: a document's tokens before its last run."""
    last = {begin: a for begin, (a, _, _) in zip(queries.begins, queries.runs, strict=True)}
    return [(begin, span) for begin, a in last.items() for span in keys.within(begin, a)]


def _calls(queries: _Pieces, keys: _Pieces) -> tuple[int, tuple[Call, ...]]:
    """Rows received, and the dense calls over them."""
    starts: dict[int, int] = {}  # where each document's rows begin in the block received
    received = 0
    for begin, (a, b) in _needed(queries, keys):
        starts.setdefault(begin, received)
        received += b - a
    calls: list[Call] = []
    for begin, (a, b, at) in zip(queries.begins, queries.runs, strict=True):
        seen = sum(stop - start for start, stop in keys.within(begin, a))
        if seen:
            start = starts[begin]
            _append(calls, Call((at, at + b - a), (start, start + seen), (0, b - a), (0, seen)))
    return received, tuple(calls)


def _append(calls: list[Call], call: Call) -> None:
    """Add a call, as one with the last where one launch can do both."""
    last = calls[-1] if calls else None
    if last is None or last.queries[1] != call.queries[0]:
        calls.append(call)
    elif last.keys == call.keys and len(last.key_bounds) == 2:  # more queries over the same keys
        stop = call.queries[1] - last.queries[0]
        calls[-1] = Call((last.queries[0], call.queries[1]), last.keys, (0, stop), last.key_bounds)
    elif last.keys[1] == call.keys[0]:  # the next document in both
        queries, keys = call.queries[1] - last.queries[0], call.keys[1] - last.keys[0]
        calls[-1] = Call(
            (last.queries[0], call.queries[1]),
            (last.keys[0], call.keys[1]),
            (*last.query_bounds, queries),
            (*last.key_bounds, keys),
        )
    else:
        calls.append(call)


def _merged(spans: list[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for a, b in spans:
        if merged and merged[-1][1] == a:
            a = merged.pop()[0]
        merged.append((a, b))
    return tuple(merged)


def picture(shards: TokenShards) -> str:
    """The plan for people: the row by owner, then what every rank computes in every step, as shares of the mean."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-"
    row = "".join(digits[owner % len(digits)] for owner in shards.owners)
    mean = sum(shards.areas) / shards.ranks
    lines = [
        f"{shards.bounds[-1]:,} tokens, {len(shards.bounds) - 1:,} documents, {shards.ranks} ranks, "
        f"{len(row) // shards.ranks} chunks a rank, busiest rank {shards.imbalance:.3f} of the mean",
        f"chunks by owner: {row}",
        "rank   own " + " ".join(f"{f'+{d}':>5}" for d in range(1, shards.ranks)) + "   sum calls   received",
    ]
    for rank in range(shards.ranks):
        plan = plan_rank(shards, rank)
        dense = [sum(call.area for call in step.calls) for step in plan.steps]
        parts = " ".join(f"{area / mean:5.2f}" if area else "    ." for area in dense)
        received = sum(step.received for step in plan.steps)
        own = (shards.areas[rank] - sum(dense)) / mean
        lines.append(f"{rank:4d} {own:5.2f} {parts} {shards.areas[rank] / mean:5.2f} {plan.calls:5d} {received:10,d}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = Parser(
        description="Print the plan for the document lengths given.", prog="python -m fft.parallel.ring_plan"
    )
    parser.add_argument("lengths", type=int, nargs="+", help="tokens of each document")
    parser.add_argument("--ranks", type=int, default=4, help="ranks of the ring (default %(default)s)")
    parser.add_argument("--chunks", type=int, help="chunks per rank (default: the fewest that balance)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan for the document lengths given. Raises :class:`UserError` for those that no plan is for."""
    options = build_parser().parse_args(arguments)
    if min(*options.lengths, options.ranks, 1 if options.chunks is None else options.chunks) < 1:
        raise UserError("lengths, --ranks and --chunks must be at least 1.")
    try:
        shards = plan_shards((0, *np.cumsum(options.lengths).tolist()), options.ranks, options.chunks)
    except ValueError as error:
        raise UserError(f"{error}: give longer documents, or fewer --ranks or --chunks.") from None
    print(picture(shards))


if __name__ == "__main__":
    run_cli(main)
