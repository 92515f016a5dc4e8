"""Packing on its own: no Spark, any documents, any lengths."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.data.packing import best_fit, concat, cut_documents, cut_rows, gather_tokens, permute_rows
from fft.errors import UserError
from spark_jobs.token_table.pack_rows import Packer

LENGTHS = st.lists(st.integers(0, 60), max_size=60)
MAX_LEN = st.integers(1, 25)


def pieces_of(pieces):
    """(document, start, length) of all pieces, by row."""
    rows, begin = [], 0
    for end in pieces.row_ends.tolist():
        part = slice(begin, end)
        columns = (pieces.document[part], pieces.start[part], pieces.length[part])
        rows.append(list(zip(*(column.tolist() for column in columns), strict=True)))
        begin = end
    assert begin == len(pieces.document)
    return rows


def covered(rows):
    return sorted((d, position) for row in rows for d, start, n in row for position in range(start, start + n))


@given(LENGTHS, MAX_LEN, st.sampled_from([best_fit, concat]))
def test_every_token_is_in_exactly_one_row(lengths, max_len, method):
    rows = pieces_of(method(lengths, max_len))
    assert covered(rows) == [(d, position) for d, n in enumerate(lengths) for position in range(n)]
    assert all(1 <= sum(n for _, _, n in row) <= max_len for row in rows)
    assert all(n > 0 for row in rows for _, _, n in row)


@given(LENGTHS, MAX_LEN)
def test_best_fit_cuts_only_documents_longer_than_a_row(lengths, max_len):
    rows = pieces_of(best_fit(lengths, max_len))
    pieces = np.bincount([d for row in rows for d, _, _ in row], minlength=len(lengths))
    assert pieces.tolist() == [-(-n // max_len) for n in lengths]


@given(LENGTHS, MAX_LEN)
def test_best_fit_never_leaves_two_rows_that_fit_in_one(lengths, max_len):
    sizes = sorted(sum(n for _, _, n in row) for row in pieces_of(best_fit(lengths, max_len)))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > max_len


@given(LENGTHS, MAX_LEN)
def test_concat_fills_every_row_but_the_last_and_keeps_the_order(lengths, max_len):
    rows = pieces_of(concat(lengths, max_len))
    assert all(sum(n for _, _, n in row) == max_len for row in rows[:-1])
    flat = [(d, start) for row in rows for d, start, _ in row]
    assert flat == sorted(flat)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5), max_size=20), MAX_LEN)
def test_rows_that_fit_are_left_alone(groups, max_len):
    lengths = [n for group in groups for n in group]
    ends = np.cumsum([len(group) for group in groups], dtype=np.int64)
    rows = pieces_of(cut_rows(lengths, ends, max_len))
    assert covered(rows) == [(d, position) for d, n in enumerate(lengths) for position in range(n)]
    expected = [size for group in groups for size in cut_documents([sum(group)], max_len)[2].tolist()]
    assert [sum(n for _, _, n in row) for row in rows] == expected


@given(LENGTHS, MAX_LEN, st.integers(0, 2**32))
def test_permuting_moves_whole_rows(lengths, max_len, seed):
    pieces = best_fit(lengths, max_len)
    order = np.random.default_rng(seed).permutation(len(pieces.row_ends))
    before, after = pieces_of(pieces), pieces_of(permute_rows(pieces, order))
    assert after == [before[row] for row in order]


def test_best_fit_leaves_less_than_half_a_percent_unused():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(int) + 1
    for max_len in (512, 2048):
        rows = len(best_fit(lengths, max_len).row_ends)
        assert 1 - lengths.sum() / (rows * max_len) < 0.005


def test_gather_takes_the_tokens_of_the_pieces():
    lengths = [5, 0, 13, 2]
    values, offsets = np.arange(20, dtype=np.int32), np.concatenate(([0], np.cumsum(lengths)))
    pieces = best_fit(lengths, 6)
    expected = [offsets[d] + start + i for row in pieces_of(pieces) for d, start, n in row for i in range(n)]
    assert gather_tokens(values, offsets, pieces).tolist() == expected


def blobs(lists):
    return pa.array([np.array(values, np.int32).tobytes() for values in lists], pa.binary())


def pack(documents, batch, **packer):
    """Run documents (lists of ids) through a Packer in batches; label = -id."""
    names = [[f"doc{d}"] for d in range(len(documents))]
    batches = []
    for at in range(0, len(documents), batch):
        part = documents[at : at + batch]
        columns = {
            "part": pa.array([3] * len(part), pa.int32()),
            "doc_ids": pa.array(names[at : at + batch], pa.list_(pa.string())),
            "input_ids": blobs(part),
            "labels": blobs([[-i for i in document] for document in part]),
        }
        batches.append(pa.RecordBatch.from_arrays(list(columns.values()), list(columns)))
    return [row for out in Packer(**packer)(iter(batches)) for row in out.to_pylist()]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), max_size=40),
    MAX_LEN,
    st.sampled_from(["best-fit", "concat", "none"]),
    st.integers(1, 9),
    st.integers(1, 200),
)
def test_a_stream_of_documents_becomes_rows_window_by_window(lengths, max_len, method, batch, window):
    ends = np.cumsum([0, *lengths])
    documents = [list(range(a, b)) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spark_jobs.token_table.pack_rows._STEP_ROWS", 4)
        rows, same = (pack(documents, b, max_len=max_len, method=method, seed=1, window=window) for b in (batch, 7))
    assert rows == same  # however an engine cuts its batches
    found = []
    for row in rows:
        bounds, ids = row["cu_seqlens"], row["input_ids"]
        assert bounds[0] == 0
        assert bounds[-1] == len(ids) <= max_len
        assert row["labels"] == [-i for i in ids]
        assert len(row["doc_ids"]) == len(bounds) - 1
        for name, a, b in zip(row["doc_ids"], bounds[:-1], bounds[1:], strict=True):
            assert a < b
            found.append((int(name[3:]), ids[a:b]))
    assert sorted(i for _, ids in found for i in ids) == list(range(ends[-1]))
    for document, ids in found:
        assert set(ids) <= set(documents[document])
        assert ids == list(range(ids[0], ids[-1] + 1))
    if method == "concat":
        short = [row for row in rows if len(row["input_ids"]) < max_len]
        assert len(short) <= 1


def test_best_fit_rows_are_not_in_the_order_of_their_lengths():
    documents = [[0] * n for n in range(100, 600)]
    sizes = [row["cu_seqlens"][1] for row in pack(documents, 50, max_len=600, method="best-fit", seed=0, window=10**6)]
    assert abs(np.corrcoef(sizes, range(len(sizes)))[0, 1]) < 0.2


def test_boundaries_that_do_not_fit_their_row_are_refused():
    columns = {
        "part": pa.array([0], pa.int32()),
        "doc_ids": pa.array([["a"]], pa.list_(pa.string())),
        "input_ids": blobs([[1, 2, 3]]),
        "cu_seqlens": blobs([[0, 4]]),
    }
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    with pytest.raises(UserError, match="cu_seqlens must rise"):
        list(Packer(8, "best-fit", 0, 100)(iter([batch])))
