"""The unigram baseline: what a model would lose that knows how often each token occurs and nothing else."""

import numpy as np

from fft.data.table import Rows, Table


def unigram_counts(table: Table, vocab_size: int) -> np.ndarray:
    """How often each token id occurs in the table: int64 [vocab_size]. Reads one row group at a time."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for group in range(len(table.row_groups)):
        counts += np.bincount(table.read(group, vocab_size).input_ids, minlength=vocab_size)
    return counts


def predicted_counts(table: Table, vocab_size: int) -> np.ndarray:
    """As :func:`unigram_counts`, of the tokens that a trainer predicts: all but the first of each document in a row."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for group in range(len(table.row_groups)):
        rows = table.read(group, vocab_size)
        counts += np.bincount(rows.input_ids, minlength=vocab_size)
        counts -= np.bincount(rows.input_ids[_first_positions(rows)], minlength=vocab_size)
    return counts


def unigram_cross_entropy(train: np.ndarray, evaluated: np.ndarray) -> float:
    """Mean negative log-probability, in nats a token, of ``evaluated`` counts under the ``train`` distribution.

    Both are counts by token id, [vocab_size]; the distribution is smoothed by one count a token, so that no token of
    the vocabulary is impossible.
    """
    log_probability = np.log(train + 1.0) - np.log(train.sum() + float(len(train)))
    return float(-(evaluated * log_probability).sum() / evaluated.sum())


def _first_positions(rows: Rows) -> np.ndarray:
    """Where the documents of a row group begin in their rows, empty ones left out."""
    if rows.ends is None or rows.end_offsets is None:
        return rows.offsets[:-1]
    per_row = np.diff(rows.end_offsets)
    starts = np.concatenate(([0], rows.ends[:-1]))
    starts[rows.end_offsets[:-1]] = 0
    return starts + np.repeat(rows.offsets[:-1], per_row)
