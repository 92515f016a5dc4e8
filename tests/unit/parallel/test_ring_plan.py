"""The ring's plan: every query meets every key it must, once, in balance, and nothing else travels."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.errors import UserError
from fft.parallel.ring_plan import CHUNKS, main, plan_rank, plan_shards, row_multiple


def bounds_of(lengths) -> tuple[int, ...]:
    return (0, *np.cumsum(lengths).tolist())


@st.composite
def layouts(draw):
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    ranks = draw(st.integers(1, 5))
    chunks = draw(st.integers(1, 4))
    lengths.append(max(1, ranks * chunks - sum(lengths)))
    return plan_shards(bounds_of(lengths), ranks, chunks)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=8), st.integers(1, 5))
def test_a_multiple_of_tokens_is_shared_out_equally(lengths, ranks):
    bounds = bounds_of([*lengths, row_multiple(ranks) - sum(lengths) % row_multiple(ranks)])
    for chunks in (None, *CHUNKS):
        shards = plan_shards(bounds, ranks, chunks)
        assert {len(shards.tokens(rank)) for rank in range(ranks)} == {bounds[-1] // ranks}
        assert bounds[-1] // ranks % 16 == 0


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_every_pair_of_tokens_is_computed_once(shards):
    """Calls are played on token numbers: the pairs they cover are exactly those of the causal block-diagonal mask."""
    total = shards.bounds[-1]
    document = np.repeat(np.arange(len(shards.bounds) - 1), np.diff(shards.bounds))
    seen = np.zeros((total, total), dtype=int)
    assert np.array_equal(np.sort(np.concatenate([shards.tokens(r) for r in range(shards.ranks)])), np.arange(total))
    for rank in range(shards.ranks):
        plan, own, before = plan_rank(shards, rank), shards.tokens(rank), seen.sum()
        assert plan.tokens == len(own)
        for a, b in pairwise(plan.bounds):
            for i in range(a, b):
                seen[own[i], own[a : i + 1]] += 1
        for step in plan.steps:
            theirs = plan_rank(shards, step.source)
            (sent,) = (s.sent for s in theirs.steps if s.to == rank)
            rows = shards.tokens(step.source)
            block = np.concatenate([rows[a:b] for a, b in sent]) if sent else rows[:0]
            assert len(block) == step.received
            used = np.zeros(len(block), dtype=bool)
            for call in step.calls:
                queries, keys = own[slice(*call.queries)], block[slice(*call.keys)]
                spans = zip(pairwise(call.query_bounds), pairwise(call.key_bounds), strict=True)
                assert (call.query_bounds[-1], call.key_bounds[-1]) == (len(queries), len(keys))
                for (a, b), (c, d) in spans:
                    assert a < b
                    assert c < d  # nothing to attend to is never launched
                    seen[np.ix_(queries[a:b], keys[c:d])] += 1
                used[slice(*call.keys)] = True
            assert used.all()  # nothing travels unused
        assert seen.sum() - before == shards.areas[rank]
    assert np.array_equal(seen, np.tril(document[:, None] == document[None, :]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 50))
def test_ranks_hold_equally_many_tokens(ranks, chunks, length):
    shards = plan_shards((0, ranks * chunks * length), ranks, chunks)
    assert {len(shards.tokens(rank)) for rank in range(ranks)} == {chunks * length}


def test_one_document_is_dealt_in_a_zigzag():
    shards = plan_shards((0, 1024), 4)
    assert shards.owners == (0, 1, 2, 3, 3, 2, 1, 0)
    assert shards.imbalance == 1


def test_short_documents_stay_where_they_are():
    """Documents that end where ranks do need no exchange and a single call."""
    shards = plan_shards(bounds_of([64] * 64), 8)
    assert shards.owners == tuple(range(8))
    for rank in range(8):
        plan = plan_rank(shards, rank)
        assert (plan.calls, sum(step.received for step in plan.steps)) == (1, 0)


@pytest.mark.parametrize("ranks", [4, 8, 16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_realistic_documents_are_balanced(ranks, seed):
    """Log-normal lengths, median 2,000 tokens, in a row of a million: the longest of a hundred thousand."""
    rng, total = np.random.default_rng(seed), 1 << 20
    bounds = np.cumsum(rng.lognormal(np.log(2000), 1.5, 4000).astype(int) + 1)
    shards = plan_shards((0, *bounds[bounds < total].tolist(), total), ranks)
    assert shards.imbalance <= 1.05


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="5 tokens cannot be cut into 6 chunks, 2 per rank"):
        plan_shards((0, 5), 3, 2)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["5", "--ranks", "3", "--chunks", "2"], "5 tokens cannot be cut into 6 chunks, 2 per rank: give longer"),
        (["5", "0"], "lengths, --ranks and --chunks must be at least 1"),
        (["5", "--chunks", "0"], "lengths, --ranks and --chunks must be at least 1"),
        (["5", "--rank", "2"], "did you mean --ranks"),
    ],
)
def test_the_command_refuses_in_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        main(given)


def test_picture_adds_up(capsys):
    main(["100", "3900", "96", "--ranks", "4"])
    first, owners, _, *ranks = capsys.readouterr().out.splitlines()
    assert first.startswith("4,096 tokens, 3 documents, 4 ranks, 2 chunks a rank, busiest rank 1.048")
    assert owners == "chunks by owner: 01233201"
    assert len(ranks) == 4
    assert sum(float(line.split()[5]) for line in ranks) == pytest.approx(4, abs=0.03)
