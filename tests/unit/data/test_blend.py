"""Several tables as one: exact shares, every sample of each in turn, replicas that share the work."""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from conftest import write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import read_sample
from test_stream import check_any_split_into_runs

from fft.data import order
from fft.data.batches import BatchPlan, Loader
from fft.data.blend import Blend, Mixture, data_places, parse_evaluations, parse_tables
from fft.data.reader import SampleReader
from fft.data.table import IGNORE, Table
from fft.data.trace import documents_of_step
from fft.errors import UserError

WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.7, 1.0, 2.5, 10.0]), min_size=1, max_size=7)


@given(WEIGHTS, st.integers(0, 10**12))
def test_shares_are_exact_in_the_long_run(weights, start):
    mixture = Mixture(weights)
    tables, before = mixture.choose(np.arange(start, start + 200))
    counts = Counter()
    for number in range(len(weights)):
        counts[number] = mixture.count(number, start)
        assert abs(counts[number] - start * weights[number] / sum(weights)) <= len(weights)
    for place, table, earlier in zip(range(start, start + 200), tables.tolist(), before.tolist(), strict=True):
        assert earlier == counts[table]
        assert mixture.position(table, earlier) == place
        counts[table] += 1
    assert all(counts[number] == mixture.count(number, start + 200) for number in range(len(weights)))


def test_weights_of_any_size_stay_within_64_bits():
    mixture = Mixture([999_999.999999, 0.000001, 123_456.789012, 0])
    start = 5 * 10**9
    tables, before = mixture.choose(np.arange(start, start + 1000))
    for place, table, earlier in zip(range(start, start + 1000), tables.tolist(), before.tolist(), strict=True):
        assert (mixture.count(table, place), mixture.position(table, earlier)) == (earlier, place)
    assert abs(Counter(tables.tolist())[2] - 1000 * 123_457 / 1_123_457) <= 2


@dataclass(frozen=True)
class Member:
    """What a blend asks of a reader to choose between tables."""

    samples_per_epoch: int
    lanes: int
    has_labels: bool = False
    lookahead: int = 1
    seq_len: int = 8

    def as_member(self, lanes, aligned):
        return replace(self, lanes=lanes)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0.1, 0.5, 1.0, 3.0])), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
)
def test_tables_that_end_leave_the_others_their_proportions(tables, lanes, epoch):
    """An epoch has each sample of each table once; between two ends, what is left is drawn by weight."""
    weights = [weight for _, weight in tables]
    blend = Blend([Member(samples, lanes) for samples, _ in tables], weights, "drop")
    number_of = {id(member): number for number, member in enumerate(blend.members)}
    first = epoch * blend.samples_per_epoch
    drawn, last = [], {}
    for place in range(blend.samples_per_epoch):
        member, own = blend.member(first + place)
        number = number_of[id(member)]
        assert blend.index(number, own) == first + place
        drawn.append((number, own))
        last[number, place % lanes] = place + 1
    for number, (samples, _) in enumerate(tables):
        own = sorted(own for other, own in drawn if other == number)
        assert own == list(range(epoch * samples, (epoch + 1) * samples))
    ends = sorted({0, *last.values()})
    for start, stop in itertools.pairwise(ends):
        left = {number for (number, _), end in last.items() if end >= stop}
        ending = {number for (number, _), end in last.items() if end < stop}
        if left & ending:
            continue  # lanes end within a few samples of each other
        counts = Counter(number for number, _ in drawn[start:stop])
        for number in left:
            share = weights[number] / sum(weights[other] for other in left)
            assert abs(counts[number] - (stop - start) * share) <= 2 * len(tables) * lanes


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Three tables of 40, 100 and 64 rows of 8 tokens; a row's ids are its number, plus 1000 for each table before."""
    patch = pytest.MonkeyPatch()
    patch.setattr(order, "_GROUPS_PER_LANE", 1)
    made = []
    for number, rows in enumerate((40, 100, 64)):
        ids = [np.full(8, 1000 * number + row, dtype=np.int32) for row in range(rows)]
        labels = {"labels": [[IGNORE] * 4 + [7] * 4] * rows} if number == 1 else {}
        table = Table.open(write_table(tmp_path_factory.mktemp("t") / str(number), ids, 2, 4, **labels))
        made.append(SampleReader(table, 8, seed=1))
    yield made
    patch.undo()


def rows_seen(blend, total):
    seen = []
    for step in Loader(blend, BatchPlan(1, 0, 1, 4), total):
        seen += step[0].input_ids.reshape(-1, 8)[:, 0].tolist()
    return seen


@settings(deadline=None, max_examples=8)
@given(st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=3, max_size=3))
def test_each_tables_samples_come_in_turn(readers, weights):
    blend = Blend(readers, weights)
    drawn = [blend.member(index) for index in range(2000)]
    for number, reader in enumerate(readers):
        own = sorted(index for member, index in drawn if member.table is reader.table)
        assert abs(len(own) - 2000 * weights[number] / sum(weights)) <= 3 * blend.lanes
        # Its samples 0, 1, 2, ..., none twice, none left out but where a lane is a few samples behind the others.
        assert len(set(own)) == len(own)
        assert not own or own[-1] < len(own) + 6 * blend.lanes


def test_labels_where_only_some_tables_have_them(readers):
    blend = Blend(readers, [1, 1, 1])
    for index in range(60):
        member, own = blend.member(index)
        ours, alone = Loader(blend, BatchPlan(1, 0, 1, 1), 60), read_sample(member, own)
        ours.load_state_dict({**ours.state_dict(), "samples": index})
        (batch,) = next(iter(ours))
        assert batch.input_ids[0].tolist() == alone.input_ids.tolist()
        masked = member.table is readers[1].table
        assert batch.labels.tolist() == ([IGNORE] * 3 + [7] * 4 if masked else alone.input_ids[1:].tolist()) + [IGNORE]


def test_replicas_see_the_same_and_share_the_row_groups(readers, monkeypatch):
    load, read = Table.load, []
    monkeypatch.setattr(Table, "load", lambda self, group, *_: read.append((self.path, group)) or load(self, group))
    weights, total = [0.5, 0.3, 0.2], 160
    alone = rows_seen(Blend(readers, weights), total)
    for replicas in (2, 4):
        read.clear()
        seen = {}
        for replica in range(replicas):
            blend = Blend(readers, weights)
            for step, batches in enumerate(Loader(blend, BatchPlan(replicas, replica, 1, 2), total)):
                rows = batches[0].input_ids.reshape(-1, 8)[:, 0].tolist()
                first = step * 2 * replicas
                seen |= {first + replica + k * replicas: row for k, row in enumerate(rows)}
        assert [seen[i] for i in range(total)] == alone
        # Row groups, where lanes meet, and second epochs of the first table; without lanes it would be all by all.
        assert len(read) < 2 * len(set(read)) + Blend(readers, weights).lanes


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.sampled_from([0.1, 0.5, 3.0]), min_size=3, max_size=3), st.sampled_from(["repeat", "drop"]), st.data()
)
def test_any_split_into_runs_of_any_replicas_gives_the_same_samples(readers, weights, end, data):
    check_any_split_into_runs(lambda: Blend(readers, weights, end), data, longest=40)


def test_an_epoch_of_tables_that_are_dropped_has_every_row_once(readers):
    blend = Blend(readers, [5, 1, 1], "drop")
    rows = rows_seen(blend, 2 * 204)
    expected = sorted(1000 * number + row for number, rows in enumerate((40, 100, 64)) for row in range(rows))
    assert sorted(rows[:204]) == sorted(rows[204:]) == expected
    assert rows[:204] != rows[204:]
    # Of the first 56 samples 5/7 are the first table's: all it has.
    assert abs(max(place for place, row in enumerate(rows[:204]) if row < 1000) - 56) <= 6 * blend.lanes


def test_another_blend_is_not_resumed(readers):
    state = Loader(Blend(readers, [1, 1, 1]), BatchPlan(1, 0, 1, 1), 60).state_dict()
    for name, other in {"weights": Blend(readers, [1, 1, 2]), "blend_end": Blend(readers, [1, 1, 1], "drop")}.items():
        with pytest.raises(UserError, match=f"the data's {name} is .* give the same tables and weights"):
            Loader(other, BatchPlan(1, 0, 1, 1), 60).load_state_dict(state)
    read = ", ".join(reader.table.path for reader in readers)
    with pytest.raises(UserError, match=f"the data's fingerprint is .* That run read {read}\\."):
        Loader(readers[0], BatchPlan(1, 0, 1, 1), 60).load_state_dict(state)


def test_a_step_is_traced_to_its_tables(readers):
    blend = Blend(readers, [1, 2, 3])
    for step in (1, 5):
        expected = [blend.member(i)[0].table.path for i in range((step - 1) * 8, step * 8)]
        assert [seen.dataset for seen in documents_of_step(blend, step, 8)] == expected


def test_flags():
    assert parse_tables("a:0.7 b:0.3", "train_data") == [("a", 0.7), ("b", 0.3)]
    assert parse_tables("a b@v3:2", "train_data") == [("a", 1.0), ("b@v3", 2.0)]
    assert parse_tables("s3://x/y s3://x/z:2", "train_data") == [("s3://x/y", 1.0), ("s3://x/z", 2.0)]
    assert parse_tables("hdfs://x:8020/y", "train_data") == [("hdfs://x:8020/y", 1.0)]
    with pytest.raises(UserError, match="--train_data a:b: 'b' is no weight"):
        parse_tables("a:b", "train_data")
    with pytest.raises(UserError, match="a weight lies between"):
        parse_tables("a:0", "train_data")


def test_tables_to_evaluate_on_have_names(tmp_path):
    """What exists is a path, also with an equals sign; several tables need names, each its own."""
    (tmp_path / "day=1").mkdir()
    assert parse_evaluations(f"{tmp_path}/day=1") == {"": f"{tmp_path}/day=1"}
    assert parse_evaluations("web") == {"": "web"}
    assert parse_evaluations("s3://b/t?x=1") == {"": "s3://b/t?x=1"}
    assert parse_evaluations("web=a/b code-2=s3://c@v3") == {"web": "a/b", "code-2": "s3://c@v3"}
    assert list(parse_evaluations("b=1 a=2")) == ["b", "a"]
    assert data_places("web=a code=b", "eval_data") == ["a", "b"]
    assert data_places("a:0.3 b", "train_data") == ["a", "b"]
    for wrong, why in (("a b", "give each a name, as in web=A"), ("web=a b", "b: give each"), ("w=a w=b", "w=b: give")):
        with pytest.raises(UserError, match=why):
            parse_evaluations(wrong)
