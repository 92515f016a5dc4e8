"""Several tables as one: exact shares, every sample of each in turn, replicas that share the work."""

from collections import Counter

import numpy as np
import pytest
from conftest import write_table
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.data import order
from fft.data.blend import Blend, Mixture, parse_tables
from fft.data.loader import IGNORE, BatchPlan, Loader, SampleReader
from fft.data.table import Table
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
    for table, earlier in zip(tables.tolist(), before.tolist(), strict=True):
        assert earlier == counts[table]
        counts[table] += 1
    assert all(counts[number] == mixture.count(number, start + 200) for number in range(len(weights)))


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
    drawn = [blend.part(index) for index in range(2000)]
    for number, reader in enumerate(readers):
        own = sorted(index for part, index in drawn if part.table is reader.table)
        assert abs(len(own) - 2000 * weights[number] / sum(weights)) <= 3 * blend.lanes
        # Its samples 0, 1, 2, ..., none twice, none left out but where a lane is a few samples behind the others.
        assert len(set(own)) == len(own)
        assert not own or own[-1] < len(own) + 6 * blend.lanes


def test_labels_where_only_some_tables_have_them(readers):
    blend = Blend(readers, [1, 1, 1])
    for index in range(60):
        part, own = blend.part(index)
        ours, alone = Loader(blend, BatchPlan(1, 0, 1, 1), 60), part.sample(own)
        ours.load_state_dict({**ours.state_dict(), "samples": index})
        (batch,) = next(iter(ours))
        assert batch.input_ids[0].tolist() == alone.input_ids.tolist()
        masked = part.table is readers[1].table
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


def test_a_step_is_traced_to_its_tables(readers):
    blend = Blend(readers, [1, 2, 3])
    for step in (1, 5):
        expected = [blend.part(i)[0].table.path for i in range((step - 1) * 8, step * 8)]
        assert [seen.dataset for seen in documents_of_step(blend, step, 8)] == expected


def test_flags():
    assert parse_tables("a:0.7 b:0.3", "train_data") == [("a", 0.7), ("b", 0.3)]
    assert parse_tables("a b@v3:2", "train_data") == [("a", 1.0), ("b@v3", 2.0)]
    assert parse_tables("s3://x/y s3://x/z:2", "train_data") == [("s3://x/y", 1.0), ("s3://x/z", 2.0)]
    with pytest.raises(UserError, match="--train_data a:b: 'b' is no weight"):
        parse_tables("a:b", "train_data")
    with pytest.raises(UserError, match="a weight lies between"):
        parse_tables("a:0", "train_data")
