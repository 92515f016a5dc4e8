"""Shuffled rows keep their labels and boundaries, packed rows stay whole, batches are the same in any hands."""

import itertools

import numpy as np
import pytest
from conftest import write_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import read_sample

from fft.data.batches import BatchPlan, micro_batch, step_batches
from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.table import IGNORE, Table

#: A new folder of the same test serves many examples.
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


#: For every row the lengths of its documents; rows have 1 to 12 tokens.
packed_rows = st.lists(
    st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda row: sum(row) <= 12), min_size=1, max_size=9
)


def write(folder, rows, seq_len=None, row_group_size=2):
    """Every token is its own number; its label is the number plus 1000, or IGNORE for every third."""
    ends = np.cumsum([sum(row) for row in rows])
    ids = [np.arange(end - sum(row), end, dtype=np.int32) for row, end in zip(rows, ends, strict=True)]
    labels = [np.where(x % 3 == 0, IGNORE, x + 1000).astype(np.int32) for x in ids]
    bounds = [[0, *np.cumsum(row).tolist()] for row in rows]
    for old in folder.glob("*"):
        old.unlink()
    write_table(
        folder, ids, files=2 if len(rows) > 1 else 1, row_group_size=row_group_size, labels=labels, cu_seqlens=bounds
    )
    if seq_len:
        files = tuple(FileInfo(p.name, 0, 0, p.stat().st_size) for p in folder.glob("*.parquet"))
        commit(folder, Manifest(files, len(rows), int(ends[-1]), seq_len=seq_len))
    document_of = np.repeat(np.arange(sum(map(len, rows))), [length for row in rows for length in row])
    return Table.open(folder), document_of


def check(sample, document_of, filled):
    """Documents hold tokens of one document in order; labels are the table's, moved one to the left inside it."""
    assert sample.cu_seqlens[0] == 0
    assert sample.cu_seqlens[-1] == len(sample.input_ids)
    for a, b in itertools.pairwise(sample.cu_seqlens):
        ids, labels = sample.input_ids[a:b], sample.labels[a:b]
        if a >= filled:
            assert (labels == IGNORE).all()
            continue
        assert ids.tolist() == list(range(ids[0], ids[0] + len(ids)))
        assert len(set(document_of[ids])) == 1
        assert labels.tolist() == [*np.where(ids[1:] % 3 == 0, IGNORE, ids[1:] + 1000), IGNORE]


@EXAMPLES
@given(packed_rows, st.integers(0, 3), st.booleans())
def test_packed_rows_stay_whole(tmp_path, rows, seed, shuffle):
    table, document_of = write(tmp_path / "t", rows, seq_len=12)
    reader = SampleReader(table, 12, seed, shuffle=shuffle)
    assert reader.samples_per_epoch == len(rows)
    whole = sorted(
        tuple(range(end - sum(row), end)) for row, end in zip(rows, np.cumsum([*map(sum, rows)]), strict=True)
    )
    lengths = {row[0]: len(row) for row in whole}
    for epoch in range(2):
        samples = [read_sample(reader, epoch * len(rows) + i) for i in range(len(rows))]
        seen = [tuple(s.input_ids[: lengths[int(s.input_ids[0])]].tolist()) for s in samples]
        assert sorted(seen) == whole
        for sample, row in zip(samples, seen, strict=True):
            check(sample, document_of, filled=len(row))


@EXAMPLES
@given(packed_rows, st.integers(2, 17), st.integers(0, 3))
def test_rows_cut_to_another_length_keep_labels_and_boundaries(tmp_path, rows, seq_len, seed):
    """A table packed to one length, or to none, is cut to any other; nothing is lost but labels at the cuts."""
    table, document_of = write(tmp_path / "t", rows)
    reader, total = SampleReader(table, seq_len, seed), sum(map(sum, rows))
    indices = range(reader.samples_per_epoch, 2 * reader.samples_per_epoch)
    seen = []
    for index in indices:
        sample, filled = read_sample(reader, index), sum(piece.stop - piece.start for piece in reader.spans_of(index))
        check(sample, document_of, filled)
        seen += sample.input_ids[:filled].tolist()
    assert sorted(seen) == list(range(total))


@EXAMPLES
@given(
    packed_rows,
    st.sampled_from([(12, "cut"), (None, "cut"), (None, "best-fit")]),
    st.integers(0, 20),
    st.integers(1, 4),
    st.integers(0, 24),
    st.sampled_from([1, 4, 5, 16, 64]),
)
def test_ragged_micro_batches_hold_the_same_documents(tmp_path, rows, made, first, size, total, multiple):
    table, _ = write(tmp_path / "t", rows, seq_len=made[0])
    reader, indices = SampleReader(table, 12, seed=0, pack=made[1]), range(first, first + size)
    fixed, ragged = (micro_batch(reader, indices, total, *m) for m in ((), (multiple,)))
    used = sum(piece.stop - piece.start for index in indices if index < total for piece in reader.spans_of(index))
    tokens = len(ragged.labels)
    assert tokens == min(12 * size, max(multiple, -(-used // multiple) * multiple))
    assert (ragged.input_ids.shape, ragged.cu_seqlens.shape) == ((1, tokens), (tokens + 1,))
    assert ragged.trained == fixed.trained
    assert ragged.cu_seqlens[-1] == used
    assert (ragged.labels[used:] == IGNORE).all()
    ours, theirs = (
        [(b.input_ids[0, i:j].tolist(), b.labels[i:j].tolist()) for i, j in itertools.pairwise(np.unique(b.cu_seqlens))]
        for b in (ragged, fixed)
    )
    # Token 0, when it is a document of its own, looks like what is left over.
    assert [d for d in ours if any(d[0])] == [d for d in theirs if any(d[0])]
    for ids, labels in ((True, False), (False, True)):  # stages that read one of the two agree about the rest
        own = micro_batch(reader.for_stage(ids, labels), indices, total, multiple)
        assert own.cu_seqlens.tolist() == ragged.cu_seqlens.tolist()
        assert ids or own.labels.tolist() == ragged.labels.tolist()


def test_tokens_have_the_same_numbers_however_samples_are_dealt(ragged_table):
    """By sample and place in it, in micro-batches of any size, ragged or not; other steps have others."""
    reader = SampleReader(Table.open(ragged_table), 32, seed=0, pack="best-fit")
    plans = [BatchPlan(1, 0, 8, 1, draws=5), BatchPlan(1, 0, 2, 4, draws=5), BatchPlan(1, 0, 2, 4, 1, draws=5)]
    alone, together, ragged = ([*step_batches(reader, plan, 8, 100)] for plan in plans)
    numbers = np.concatenate([b.draws for b in alone])
    assert len(set(numbers.tolist())) == 8 * 32
    np.testing.assert_array_equal(np.concatenate([b.draws for b in together]), numbers)
    rows = [sum(p.stop - p.start for p in reader.spans_of(index)) for index in range(8, 16)]
    assert min(rows) < 32
    kept = np.concatenate([b.draws[:used] for b, used in zip(alone, rows, strict=True)])
    np.testing.assert_array_equal(np.concatenate([b.draws for b in ragged]), kept)
    later = np.concatenate([b.draws for b in step_batches(reader, plans[0], 16, 100)])
    assert not set(later.tolist()) & set(numbers.tolist())


@EXAMPLES
@given(packed_rows, st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_samples_do_not_depend_on_what_was_read_before(tmp_path, rows, indices):
    table, _ = write(tmp_path / "t", rows)
    reader = SampleReader(table, 5, seed=1)
    for index in indices:
        ours, fresh = read_sample(reader, index), read_sample(SampleReader(table, 5, seed=1), index)
        for name in ("input_ids", "labels", "cu_seqlens"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(fresh, name))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 100))
def test_replicas_and_steps_tile_the_samples(replicas, micro_batches, size, first):
    plans = [BatchPlan(replicas, r, micro_batches, size) for r in range(replicas)]
    dealt = [[list(part) for part in plan.indices(first)] for plan in plans]
    assert sorted(i for own in dealt for part in own for i in part) == list(range(first, first + plans[0].global_batch))
    assert all(len(part) == size for own in dealt for part in own)
    assert all(i % replicas == r for r, own in enumerate(dealt) for part in own for i in part)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_past_the_last_sample_trains_on_what_is_left(ragged_table, replicas):
    reader = SampleReader(Table.open(ragged_table), 32, seed=0)
    dealt = [step_batches(reader, BatchPlan(replicas, r, 4 // replicas, 2), 8, 11) for r in range(replicas)]
    samples = [read_sample(reader, i) for i in range(8, 11)]  # 5 of the 8 are blank
    assert sum(b.trained for own in dealt for b in own) == sum(int((s.labels != IGNORE).sum()) for s in samples)
    assert all(batch.input_ids.shape == (1, 64) and batch.cu_seqlens.shape == (65,) for own in dealt for batch in own)
    last = dealt[-1][-1]
    assert last.trained == 0
    assert last.cu_seqlens.tolist() == [0, 32] + [64] * 63
    ragged = step_batches(reader, BatchPlan(replicas, replicas - 1, 4 // replicas, 2, multiple=16), 8, 11)[-1]
    assert (ragged.trained, ragged.cu_seqlens.tolist()) == (0, [0] * 17)
