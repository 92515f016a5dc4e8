"""Order, samples and batches: exactly once, on any number of replicas, from any starting point."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import read_sample

from fft.data.batches import BatchPlan, micro_batch, step_batches
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.data.order import EpochOrder, permutation
from fft.data.reader import SampleReader
from fft.data.table import IGNORE, Table
from fft.errors import UserError


def make_table(lengths, files=2, row_group_size=3, **columns) -> Table:
    """Rows of consecutive numbers: every token of the table is unique."""
    bounds = np.cumsum([0, *lengths])
    rows = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(bounds)]
    with tempfile.TemporaryDirectory() as folder:
        table = Table.open(write_table(Path(folder) / "t", rows, files, row_group_size, **columns))
        held = {group: table.load(group) for group in range(len(table.row_groups))}
    object.__setattr__(table, "load", lambda group, *_, **__: held[group])
    return table


lengths_ = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(lengths_, st.integers(2, 40), st.integers(0, 3))
def test_every_token_once_an_epoch(lengths, seq_len, seed):
    reader = SampleReader(make_table(lengths), seq_len, seed)
    total = sum(lengths)
    for epoch in range(2):
        indices = [epoch * reader.samples_per_epoch + i for i in range(reader.samples_per_epoch)]
        samples = [read_sample(reader, i) for i in indices]
        assert all(len(s.input_ids) == seq_len and s.cu_seqlens[-1] == seq_len for s in samples)
        filled = [sum(piece.stop - piece.start for piece in reader.spans_of(i)) for i in indices]
        assert sum(n < seq_len for n in filled) <= 1  # only one sample is filled up
        ids = np.concatenate([s.input_ids[:n] for s, n in zip(samples, filled, strict=True)])
        assert sorted(ids.tolist()) == list(range(total))


@settings(max_examples=40, deadline=None)
@given(lengths_, st.integers(2, 40), st.integers(0, 3))
def test_labels_predict_the_next_token_of_the_same_document(lengths, seq_len, seed):
    reader = SampleReader(make_table(lengths), seq_len, seed)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for index in range(reader.samples_per_epoch):
        sample = read_sample(reader, index)
        filled = sum(piece.stop - piece.start for piece in reader.spans_of(index))
        ids, labels, bounds = sample.input_ids, sample.labels, sample.cu_seqlens
        for a, b in itertools.pairwise(bounds):
            if a >= filled:
                assert (labels[a:b] == IGNORE).all()
                continue
            assert len(set(document_of[ids[a:b]])) == 1
            assert labels[b - 1] == IGNORE
            assert labels[a : b - 1].tolist() == ids[a + 1 : b].tolist()


@settings(max_examples=30, deadline=None)
@given(lengths_, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 5))
def test_global_batches_do_not_depend_on_the_replicas(lengths, replicas, size, step):
    reader = SampleReader(make_table(lengths), 8, seed=1)
    micro_batches = 8 // (replicas * size)
    plans = [BatchPlan(replicas, r, micro_batches, size) for r in range(replicas)]
    first = 8 * step
    dealt = [step_batches(reader, plan, first, 10**6) for plan in plans]
    own = [[row.tolist() for batch in replica for row in batch.input_ids.reshape(-1, 8)] for replica in dealt]
    alone = step_batches(reader, BatchPlan(1, 0, 8, 1), first, 10**6)
    assert [own[i % replicas][i // replicas] for i in range(8)] == [batch.input_ids[0].tolist() for batch in alone]
    assert sum(b.trained for own in dealt for b in own) == sum(b.trained for b in alone)


def test_reading_from_the_middle_is_reading_on():
    table = make_table([13, 5, 40, 7, 21, 2, 9, 30])
    straight = SampleReader(table, 16, seed=3)
    sequence = [read_sample(straight, i) for i in range(30)]
    for start in (0, 1, 7, 8, 29):
        resumed = read_sample(SampleReader(table, 16, seed=3), start)
        np.testing.assert_array_equal(resumed.input_ids, sequence[start].input_ids)
        np.testing.assert_array_equal(resumed.cu_seqlens, sequence[start].cu_seqlens)


def test_epochs_and_seeds_differ_and_evaluation_keeps_the_order():
    table = make_table([4] * 32)
    orders = {
        (seed, epoch): tuple(read_sample(SampleReader(table, 4, seed), epoch * 32 + i).input_ids[0] for i in range(32))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    plain = SampleReader(table, 4, 0, shuffle=False)
    assert [read_sample(plain, i).input_ids[0] for i in range(32)] == list(range(0, 128, 4))


def test_rows_packed_to_the_length_are_taken_whole(tmp_path):
    rows = [np.arange(i * 10, i * 10 + n, dtype=np.int32) for i, n in enumerate([8, 6, 8, 7])]
    folder = write_table(tmp_path / "t", rows, cu_seqlens=[[0, 3, 8], [0, 6], [0, 8], [0, 1, 7]])
    files = tuple(
        FileInfo(p.name, 2, n, p.stat().st_size) for p, n in zip(sorted(folder.glob("*")), (14, 15), strict=True)
    )
    commit(folder, Manifest(files, 4, 29, None, 8, 0, {}))
    reader = SampleReader(Table.open(folder), 8, seed=0, shuffle=False)
    assert reader.samples_per_epoch == 4
    assert read_sample(reader, 0).cu_seqlens.tolist() == [0, 3, 8]
    filled = read_sample(reader, 3)
    assert filled.cu_seqlens.tolist() == [0, 1, 7, 8]
    assert filled.labels.tolist() == [IGNORE, 32, 33, 34, 35, 36, IGNORE, IGNORE]
    batch = micro_batch(reader, [0, 3], 4)
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 9, 15, 16] + [16] * 11
    assert batch.trained == 6 + 5


def test_labels_of_the_table_are_used(tmp_path):
    ids = [np.arange(6, dtype=np.int32)]
    folder = write_table(tmp_path / "t", ids, files=1, labels=[[-100, -100, 2, 3, -100, 5]])
    sample = read_sample(SampleReader(Table.open(folder), 6, seed=0), 0)
    assert sample.labels.tolist() == [IGNORE, 2, 3, IGNORE, 5, IGNORE]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"input_ids": [[1, 2], [200, 3]]}, "holds token id 200, outside the model's vocabulary of 100"),
        ({"input_ids": [[1, 2], [-7, 3]]}, "holds token id -7, outside"),
        ({"input_ids": [[1, 2], None]}, "holds nulls"),
        ({"input_ids": [[1, 2], [3, None]]}, "holds nulls"),
        ({"input_ids": [[1, 2], []]}, "holds 1 empty row(s)"),
        ({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3, 4]]}, "labels and input_ids differ in length"),
        ({"input_ids": [[1, 2], [3]], "cu_seqlens": [[0, 2], [0, 2]]}, "row 1: cu_seqlens must rise from 0"),
        ({"input_ids": [[1, 2], [3]], "cu_seqlens": [[0, 2, 1, 2], [0, 1]]}, "row 0: cu_seqlens must rise from 0"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, columns, sentence):
    data = {name: pa.array(rows, pa.list_(pa.int32())) for name, rows in columns.items()}
    pq.write_table(pa.table(data), tmp_path / "part.parquet")
    with pytest.raises(UserError) as raised:
        Table.open(tmp_path).read(0, vocab_size=100)
    assert f"{tmp_path / 'part.parquet'}, row group 0" in str(raised.value)
    assert sentence in str(raised.value)


def test_a_table_cut_to_a_length_is_not_packed(tmp_path):
    """Rows without boundaries are documents, most of them shorter than what they were cut to: samples are filled."""
    write_table(tmp_path, rows := [np.arange(n, dtype=np.int32) for n in (3, 8, 1, 5, 8, 2)])
    files = sorted(tmp_path.glob("*.parquet"))
    tables = [pq.read_table(file) for file in files]
    facts = zip(files, tables, strict=True)
    infos = [
        FileInfo(f.name, len(t), len(t["input_ids"].combine_chunks().flatten()), f.stat().st_size) for f, t in facts
    ]
    commit(tmp_path, Manifest(tuple(infos), len(rows), 27, None, 8, None, {}))
    reader = SampleReader(Table.open(tmp_path), 8, seed=0)
    assert (reader.pack, reader.samples_per_epoch) == ("cut", 4)
    filled = [sum(span.stop - span.start for span in reader.spans_of(i)) for i in range(4)]
    assert sorted(filled) == [3, 8, 8, 8]


def slow_order(sizes, seed, epoch, lanes):
    """The order as fft/data/order.py describes it, a row at a time: (row group, row) of every sample of one row."""
    stretch = [(g, r) for g in permutation(len(sizes), seed, epoch).tolist() for r in range(sizes[g])]
    rows = {g: permutation(sizes[g], seed, epoch, g).tolist() for g in range(len(sizes))}
    each, longer = divmod(len(stretch), lanes)
    bounds = np.cumsum([0, *(each + (lane < longer) for lane in range(lanes))])
    lanes_of = [stretch[a:b] for a, b in itertools.pairwise(bounds)]
    return [(g, rows[g][r]) for turn in itertools.zip_longest(*lanes_of) for g, r in filter(None, turn)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 9), st.integers(0, 2), st.integers(1, 8))
def test_the_order_is_the_one_that_is_described(sizes, seed, epoch, lanes):
    lanes = min(lanes, sum(sizes))
    order = EpochOrder(np.array(sizes), seed, epoch, 1, lanes)
    found = [(g, int(order.row_order(g, sizes[g])[a])) for ((g, a, _),) in order.spans(np.arange(sum(sizes)))]
    assert found == slow_order(sizes, seed, epoch, lanes)


def test_a_reader_reads_rows_in_that_order():
    """Seeds, epochs and row groups have orders of their own, and as many lanes as the table is large enough for."""
    table = make_table([4] * 96, files=3, row_group_size=3)
    sizes = [group.rows for group in table.row_groups]
    seen = set()
    for seed in range(3):
        reader = SampleReader(table, 4, seed)
        assert reader.lanes == 4
        for epoch in range(2):
            found = [read_sample(reader, epoch * 96 + i).input_ids[0] // 4 for i in range(96)]
            starts = np.cumsum([0, *sizes])
            assert found == [starts[g] + r for g, r in slow_order(sizes, seed, epoch, 4)]
            seen.add(tuple(found))
    assert len(seen) == 6


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "part.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"part\.parquet is no readable parquet file"):
        Table.open(tmp_path)


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 5))
def test_permutations(n, seed, epoch):
    drawn = permutation(n, seed, epoch)
    assert sorted(drawn.tolist()) == list(range(n))
    assert drawn.tolist() == permutation(n, seed, epoch).tolist()


def test_the_permutation_never_changes():
    """Resuming an old run with a new numpy must find the old order."""
    assert permutation(10, 7, 1).tolist() == [7, 9, 6, 1, 4, 8, 3, 2, 5, 0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.data())
def test_spans_tile_the_epoch(sizes, data):
    step, lanes = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 64))
    order = EpochOrder(np.array(sizes), seed=1, epoch=0, step=step, lanes=min(lanes, -(-sum(sizes) // step)))
    seen = [set() for _ in sizes]
    for index in range(order.samples):
        assert order.index(order.position(index)) == index
        (spans,) = order.spans(np.array([index]))
        assert sum(last - first for _, first, last in spans) == step or order.position(index) == order.samples - 1
        for group, first, last in spans:
            assert not seen[group].intersection(range(first, last))
            seen[group].update(range(first, last))
    assert [len(s) for s in seen] == sizes
