"""The loader: every sample once in one order, whoever reads it, from wherever it goes on."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import read_sample

from fft.data import order
from fft.data.batches import BatchPlan, Loader
from fft.data.order import EpochOrder, lanes_for
from fft.data.reader import SampleReader
from fft.data.table import IGNORE, Table
from fft.errors import UserError

EXAMPLES = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@pytest.fixture(autouse=True)
def many_lanes(monkeypatch):
    """Small tables get as many lanes as row groups."""
    monkeypatch.setattr(order, "_GROUPS_PER_LANE", 1)


def table_of(folder, lengths, row_group_size=2, **columns):
    """Rows of the given lengths; every token is its own number."""
    for old in folder.glob("*"):
        old.unlink()
    rows = np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])
    return Table.open(write_table(folder, rows, 1 if len(rows) < 2 else 2, row_group_size, **columns))


def rows_of(batches):
    """Samples of a step's micro-batches, as tuples of (ids, labels)."""
    both = ((b.input_ids.reshape(-1, 8).tolist(), b.labels.reshape(-1, 8).tolist()) for b in batches)
    return [(tuple(i), tuple(t)) for ids, labels in both for i, t in zip(ids, labels, strict=True)]


def check_any_split_into_runs(make_reader, data, longest=6):
    """Two epochs in runs of any replicas and micro-batches, each going on from the last one's state, are one run's."""
    reader = make_reader()
    total = 2 * reader.samples_per_epoch
    expected = rows_of([batch for step in Loader(reader, BatchPlan(1, 0, 1, 1), total) for batch in step])
    assert len(expected) == total
    seen, state = [], None
    while len(seen) < total:
        replicas, micro, size = (data.draw(st.sampled_from(n)) for n in ((1, 2, 4, 8), (1, 2, 3), (1, 2)))
        steps = data.draw(st.integers(1, longest))
        own, states = [], []
        for replica in range(replicas):
            loader = Loader(make_reader(), BatchPlan(replicas, replica, micro, size), total)
            if state:
                loader.load_state_dict(state)
            taken = itertools.islice(loader, steps)
            own.append([rows_of(step) for step in taken])
            states.append(loader.state_dict())
        assert all(other == states[0] for other in states)
        batch = replicas * micro * size
        for step in range(len(own[0])):
            # Sample i of the run is in the hands of replica i % replicas.
            first = len(seen)
            hands = {(first + i) % replicas: iter(own[(first + i) % replicas][step]) for i in range(batch)}
            seen += [next(hands[(first + i) % replicas]) for i in range(batch)]
        state = states[0]
    blank = (tuple([0] * 8), tuple([IGNORE] * 8))
    assert seen[:total] == expected
    assert all(sample == blank for sample in seen[total:])


@EXAMPLES
@given(LENGTHS, st.sampled_from(["cut", "best-fit"]), st.data())
def test_any_split_into_runs_of_any_replicas_gives_the_same_samples(tmp_path, lengths, pack, data):
    table = table_of(tmp_path / "t", lengths)
    check_any_split_into_runs(lambda: SampleReader(table, 8, seed=3, pack=pack), data)


@EXAMPLES
@given(LENGTHS, st.integers(0, 3))
def test_best_fit_cuts_no_row_that_fits(tmp_path, lengths, seed):
    table = table_of(tmp_path / "t", lengths, row_group_size=5)
    reader = SampleReader(table, 16, seed, pack="best-fit")
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    pieces = []
    for index in range(reader.samples_per_epoch, 2 * reader.samples_per_epoch):
        sample, filled = read_sample(reader, index), sum(p.stop - p.start for p in reader.spans_of(index))
        for a, b in itertools.pairwise(b for b in sample.cu_seqlens.tolist() if b <= filled):
            ids = sample.input_ids[a:b]
            assert len(set(row_of[ids])) == 1
            assert sample.labels[a:b].tolist() == [*ids[1:].tolist(), IGNORE]
            pieces.append(ids.tolist())
        assert (sample.labels[filled:] == IGNORE).all()
    assert sorted(itertools.chain(*pieces)) == list(range(sum(lengths)))
    assert len(pieces) == sum(-(-n // 16) for n in lengths)


def test_replicas_share_the_row_groups_out(tmp_path, monkeypatch):
    """Lanes that divide among replicas: a row group is decoded by one of them, two where a lane ends inside it."""
    table = table_of(tmp_path / "t", [8] * 512, row_group_size=8)
    read, load = [], Table.load
    monkeypatch.setattr(Table, "load", lambda self, group, *_: read.append(group) or load(self, group))
    for lanes, all_replicas in ((32, (1, 2, 4)), (24, (3, 6))):
        assert SampleReader(table, 8, 0, lanes=lanes).lanes == lanes
        for replicas in all_replicas:
            read.clear()
            for replica in range(replicas):
                reader = SampleReader(table, 8, 0, lanes=lanes)
                for _ in Loader(reader, BatchPlan(replicas, replica, 1, 2), 512):
                    pass
            assert set(read) == set(range(64))
            assert len(read) < 64 + lanes


def test_small_tables_have_fewer_lanes():
    assert [lanes_for(groups, 10**6) for groups in (1, 5, 16, 10**6)] == [1, 4, 16, 32]
    assert [lanes_for(groups, 10**6, 48) for groups in (1, 5, 16, 10**6)] == [1, 3, 12, 48]
    assert lanes_for(100, 3) == 2


def test_no_more_row_groups_are_held_than_lanes_need(tmp_path):
    reader = SampleReader(table_of(tmp_path / "t", [8] * 2000, row_group_size=4), 8, 0)
    assert reader.lanes == order.LANES
    most = 0
    for _ in Loader(reader, BatchPlan(1, 0, 1, 8), 2000):
        most = max(most, len(reader._loaded))
    assert most <= 2 * reader.lanes + 2


def test_a_stage_decodes_what_it_needs(tmp_path, monkeypatch):
    labels = [[i + 500] * 8 for i in range(16)]
    table = table_of(tmp_path / "t", [8] * 16, labels=labels)
    whole = SampleReader(table, 8, 0)
    asked, decode = set(), pq.ParquetFile.read_row_group

    def read(self, index, columns, **options):
        asked.add(tuple(columns))
        return decode(self, index, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    first, last = whole.for_stage(ids=True, labels=False), whole.for_stage(ids=False, labels=True)
    for index in range(16):
        assert read_sample(first, index).input_ids.tolist() == read_sample(whole, index).input_ids.tolist()
        assert read_sample(last, index).labels.tolist() == read_sample(whole, index).labels.tolist()
    assert asked == {("input_ids",), ("labels",), ("input_ids", "labels")}


def test_another_order_is_not_resumed(tmp_path):
    table = table_of(tmp_path / "t", [8] * 16)
    loader = Loader(SampleReader(table, 8, 0), BatchPlan(1, 0, 1, 2), 16)
    next(iter(loader))
    state = loader.state_dict()
    assert (state["epoch"], state["samples"]) == (0, 2)
    for change in ({"seed": 1}, {"seq_len": 4}, {"pack": "best-fit"}, {"lanes": 2}):
        other = SampleReader(table, **{"seq_len": 8, "seed": 0, **change})
        with pytest.raises(UserError, match=f"the data's {next(iter(change))} is .* give the same tables"):
            Loader(other, BatchPlan(1, 0, 1, 2), 16).load_state_dict(state)
    changed = SampleReader(table_of(tmp_path / "u", [8] * 15 + [9]), 8, 0)
    with pytest.raises(UserError, match="fingerprint"):
        Loader(changed, BatchPlan(1, 0, 1, 2), 16).load_state_dict(state)


def positions(groups, rows):
    """Where the rows of a table, in its own order, come in an epoch."""
    sizes = np.full(groups, rows)
    order = EpochOrder(sizes, seed=1, epoch=0, step=1, lanes=lanes_for(groups, groups * rows))
    at = np.empty(groups * rows, dtype=np.int64)
    for index, ((group, start, _),) in enumerate(order.spans(np.arange(groups * rows))):
        at[group * rows + order.row_order(group, rows)[start]] = index
    return at


def test_the_shuffle_leaves_no_trace_of_the_tables_order():
    at = positions(groups=256, rows=64)
    n = len(at)
    assert sorted(at.tolist()) == list(range(n))
    # The rank correlation of n independent pairs has a standard deviation of 1 / sqrt(n), and row groups move as one.
    assert abs(np.corrcoef(np.arange(n), at)[0, 1]) < 3 / np.sqrt(256)
    # Neighbours of the table: inside a lane's stretch of 8 row groups, so up to 32 * 64 apart; a permutation has n / 3.
    apart = np.abs(np.diff(at))
    assert np.median(apart) > 32 * 64 / 5
    assert np.mean(apart < 32) < 0.05
