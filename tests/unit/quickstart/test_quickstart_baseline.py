import math

import numpy as np
import pytest
from conftest import VOCAB, write_table

from fft.data.batches import BatchPlan, step_batches
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.quickstart.baseline import predicted_counts, unigram_counts, unigram_cross_entropy


def test_cross_entropy_by_hand():
    # Four entries smoothed by one: probabilities 4/8, 2/8, 1/8, 1/8.
    train, evaluated = np.array([3, 1, 0, 0]), np.array([1, 1, 0, 2])
    bits = (1 + 2 + 3 + 3) / 4
    assert unigram_cross_entropy(train, evaluated) == pytest.approx(bits * math.log(2))


def test_counts_by_hand(tmp_path):
    rows = [np.array(r, dtype=np.int32) for r in ([5, 6, 6, 7], [5, 5], [8])]
    bounds = [[0, 1, 4], [0, 2, 2], [0, 1]]
    table = Table.open(write_table(tmp_path / "t", rows, files=1, row_group_size=2, cu_seqlens=bounds))
    assert unigram_counts(table, 10).tolist() == [0, 0, 0, 0, 0, 3, 2, 1, 1, 0]
    # Not predicted: 5 and the first 6 of the first row, the first 5 of the second, the 8.
    assert predicted_counts(table, 10).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]


def test_without_boundaries_a_row_is_a_document(tmp_path):
    rows = [np.array(r, dtype=np.int32) for r in ([1, 2], [2, 2, 2])]
    table = Table.open(write_table(tmp_path / "t", rows))
    assert predicted_counts(table, 4).tolist() == [0, 0, 3, 0]


def test_the_same_tokens_that_the_trainer_evaluates(tmp_path):
    rng = np.random.default_rng(1)
    rows, bounds = [], []
    for _ in range(60):
        lengths = rng.integers(1, 9, rng.integers(1, 5))
        bounds.append(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        rows.append(rng.integers(0, VOCAB, lengths.sum()).astype(np.int32))
    table = Table.open(write_table(tmp_path / "t", rows, cu_seqlens=bounds))
    # One sample that takes in the whole table, so that no document is cut.
    reader = SampleReader(table, table.tokens, 0, VOCAB, shuffle=False)
    labels = step_batches(reader, BatchPlan(1, 0, 1, 1), 0, 1)[0].labels
    counts = np.bincount(labels[labels >= 0], minlength=VOCAB)
    assert predicted_counts(table, VOCAB).tolist() == counts.tolist()
