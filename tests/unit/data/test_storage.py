"""Tables by URL: what an object store would give, from pyarrow's file system for file://."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_table
from samples import read_sample

from fft.data.manifest import MANIFEST_NAME, FileInfo, Manifest, begin_writing, commit
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.errors import UserError

ROWS = [np.arange(n, dtype=np.int32) for n in (3, 8, 5, 1, 8, 2)]


@pytest.fixture
def folder(tmp_path):
    return write_table(tmp_path / "t", ROWS, files=2, row_group_size=2)


def with_manifest(folder):
    files = tuple(FileInfo(p.name, 3, 0, p.stat().st_size) for p in sorted(folder.glob("*.parquet")))
    commit(folder, Manifest(files, 6, 27))


@pytest.mark.parametrize("finished", [False, True])
def test_a_table_by_url_is_the_table(folder, finished):
    if finished:
        with_manifest(folder)
    local, remote = Table.open(folder), Table.open(f"file://{folder}/")
    sizes = [[(g.index, g.rows, g.tokens) for g in table.row_groups] for table in (remote, local)]
    assert sizes[0] == sizes[1]
    assert remote.source == f"file://{folder}"
    assert (remote.manifest is None) == (not finished)
    ours, theirs = SampleReader(remote, 8, 1), SampleReader(local, 8, 1)
    for index in range(2 * theirs.samples_per_epoch):
        assert read_sample(ours, index).input_ids.tolist() == read_sample(theirs, index).input_ids.tolist()


def refused(folder, sentence):
    with pytest.raises(UserError, match=sentence):
        Table.open(f"file://{folder}")


def test_what_is_no_table_is_named(folder, tmp_path):
    refused(tmp_path / "none", r"file://.*none cannot be listed \(.*\): check the address")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no parquet files")
    with pytest.raises(UserError, match="cannot be listed"):
        Table.open("nosuch://bucket/table")
    begin_writing(folder, {})
    refused(folder, "is unfinished")


def test_a_changed_table_is_named(folder):
    with_manifest(folder)
    pq.write_table(pa.table({"input_ids": pa.array([[1]], pa.list_(pa.int32()))}), folder / "stray.parquet")
    refused(folder, r"stray\.parquet is not in the table's manifest")
    (folder / "stray.parquet").rename(folder / "part-00001.parquet")
    refused(folder, r"part-00001\.parquet has \d+ bytes, its manifest says")
    (folder / "part-00001.parquet").unlink()
    refused(folder, r"part-00001\.parquet has no bytes")
    (folder / MANIFEST_NAME).write_bytes(b"\xff")
    refused(folder, "not a manifest|is no manifest|JSON")


def test_a_version_of_what_is_no_delta_table_is_refused(folder):
    with pytest.raises(UserError, match="is no Delta table: leave out @v3"):
        Table.open(f"file://{folder}@v3")
