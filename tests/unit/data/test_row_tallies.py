"""What jobs count as trained is what the trainer counts, token by token."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_table
from hypothesis import given, settings
from hypothesis import strategies as st

from fft.data.batches import micro_batch
from fft.data.commits import commit
from fft.data.known import IGNORE
from fft.data.lengths import document_lengths
from fft.data.manifest import FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.row_tallies import TRAINED, row_tally_names, tally_rows
from fft.data.table import Table
from fft.text.shown import summary_of

#: For every row, the documents' labels: 0 for what is not trained on.
ROWS = st.lists(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=3), min_size=1)


@settings(deadline=None, max_examples=40)
@given(ROWS, st.booleans(), st.booleans())
def test_trained_is_what_the_trainer_counts(tmp_path_factory, rows, packed, labelled):
    rows = rows if packed else [[[*chain.from_iterable(row)]] for row in rows]
    flags = [np.array([*chain.from_iterable(row)], bool) for row in rows]
    columns = {}
    if packed:
        columns["cu_seqlens"] = [np.cumsum([0, *map(len, row)]).tolist() for row in rows]
    if labelled:
        columns["labels"] = [np.where(own, 7, IGNORE) for own in flags]
    folder = write_table(tmp_path_factory.mktemp("t") / "t", [np.arange(len(own)) for own in flags], 1, **columns)
    table = Table.open(folder)
    written = pa.concat_tables([table.load(group) for group in range(len(table.row_groups))])
    tallies = tally_rows(written)
    assert set(tallies) <= set(row_tally_names(False))
    longest = max(map(len, flags))
    files = tuple(FileInfo(p.name, 0, 0, p.stat().st_size) for p in folder.glob("*.parquet"))
    commit(folder, Manifest(files, 0, 0, seq_len=longest))
    reader = SampleReader(Table.open(folder), longest, seed=0, pack="best-fit")
    samples = reader.samples_per_epoch
    assert micro_batch(reader, range(samples), samples).trained == tallies[TRAINED]


def test_a_row_without_tokens_or_without_trained_ones_counts_none():
    empty = pa.table({"input_ids": pa.array([[], [3]], pa.list_(pa.int32()))})
    assert tally_rows(empty) == {TRAINED: 0, "length 1": 1}
    assert document_lengths(empty).tolist() == [0, 1]


@pytest.mark.parametrize(("counts", "told"), [({}, "unknown"), ({"trained_tokens": 0}, "0 trained, 5 not")])
def test_what_nobody_has_counted_is_unknown_and_not_zero(tmp_path, counts, told):
    folder = write_table(tmp_path / "t", [np.arange(5)], 1)
    size = (folder / "part-00000.parquet").stat().st_size
    lineage = {"job": "tokenize", "counts": counts}
    commit(folder, Manifest((FileInfo("part-00000.parquet", 1, 5, size),), 1, 5, lineage=lineage))
    assert told in summary_of(Table.open(folder))
