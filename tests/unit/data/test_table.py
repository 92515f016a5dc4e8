"""Opening a token table: every spelling of a good one, and one sentence for each that is not what it should be."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_table
from samples import read_sample

from fft.data.commits import begin_writing, commit
from fft.data.manifest import MANIFEST_NAME, FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.errors import UserError

ROWS = [np.arange(n, dtype=np.int32) for n in (3, 1, 7, 2)]


def finished(folder, rows=ROWS, **facts):
    """A table as a job of ours leaves it."""
    write_table(folder, rows)
    files = tuple(FileInfo(p.name, 2, 0, p.stat().st_size) for p in sorted(folder.glob("*.parquet")))
    commit(folder, Manifest(files, len(rows), sum(map(len, rows)), **facts))
    return folder


def refusal(path, group=None) -> str:
    with pytest.raises(UserError) as raised:
        Table.open(path) if group is None else Table.open(path).read(group)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


@pytest.mark.parametrize("make", [write_table, finished])
def test_facts_come_from_the_footers(make, tmp_path):
    table = Table.open(make(tmp_path / "t", ROWS))
    assert (table.rows, table.tokens, table.columns) == (4, 13, {"input_ids"})
    assert (table.manifest is None) == (make is write_table)
    np.testing.assert_array_equal(table.read(0).input_ids, np.concatenate(ROWS[:2]))
    np.testing.assert_array_equal(table.read(1).offsets, [0, 7, 9])


def test_what_an_older_table_was_made_from_is_kept_by_name(tmp_path):
    older = Table.open(finished(tmp_path / "older", lineage={"job": "tokenize", "inputs": ["lake@v3", "b.jsonl"]}))
    assert older.origin["made_from"] == [{"input": "lake@v3"}, {"input": "b.jsonl"}]
    newer = Table.open(finished(tmp_path / "newer", lineage={"inputs": ["a"], "made_from": [older.origin]}))
    assert newer.origin["made_from"] == [older.origin]
    assert Table.open(write_table(tmp_path / "foreign", ROWS)).origin["made_from"] == []


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.list_(pa.int64()), pa.list_(pa.uint32()), pa.large_list(pa.uint16())], ids=str
)
def test_integers_of_any_width(kind, tmp_path):
    pq.write_table(pa.table({"input_ids": pa.array([[1, 2], [3]], kind)}), tmp_path / "part.parquet")
    assert Table.open(tmp_path).read(0, vocab_size=4).input_ids.tolist() == [1, 2, 3]
    assert read_sample(SampleReader(Table.open(tmp_path), 4, seed=0, shuffle=False), 0).labels.tolist() == [
        2,
        -100,
        -100,
        -100,
    ]


@pytest.mark.parametrize("leaf", [b"element", b"item", b"unheard"])
def test_writers_name_the_leaves_of_a_list_as_they_like(leaf, tmp_path):
    """The name lies in the footer only; one of the same length is put in its place."""
    file = tmp_path / "part.parquet"
    compliant = leaf != b"item"
    column = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": column}), file, store_schema=False, use_compliant_nested_type=compliant)
    file.write_bytes(file.read_bytes().replace(b"element", leaf))
    table = Table.open(tmp_path)
    assert table.tokens == 3
    assert table.read(0).offsets.tolist() == [0, 2, 3]


def test_files_in_subfolders_and_folders_named_like_files(tmp_path):
    """``df.write.partitionBy(...)`` nests; Spark users call the folder of a table ``corpus.parquet``."""
    write_table(tmp_path / "lang=en" / "corpus.parquet", ROWS[:2], files=1)
    write_table(tmp_path / "lang=fr", ROWS[2:], files=1)
    write_table(tmp_path / "_attic", ROWS, files=1)
    write_table(tmp_path / ".cache", ROWS, files=1)
    table = Table.open(tmp_path)
    assert table.tokens == 13
    assert [group.path for group in table.row_groups] == sorted(group.path for group in table.row_groups)
    assert Table.open(tmp_path / "lang=en" / "corpus.parquet").tokens == 4


def test_empty_files_among_others_do_not_count(tmp_path):
    write_table(tmp_path / "t", ROWS, files=2)
    write_table(tmp_path / "u", [], files=1)
    (tmp_path / "u" / "part-00000.parquet").rename(tmp_path / "t" / "part-00000-empty.parquet")
    assert Table.open(tmp_path / "t").tokens == 13


def test_a_folder_of_tables_is_not_a_table(tmp_path):
    """Training on a folder that holds train and validation would train on the held-out rows."""
    finished(tmp_path / "packed" / "train")
    finished(tmp_path / "packed" / "validation")
    assert "is a folder of tables (train, validation), not one table: name one" in refusal(tmp_path / "packed")


def test_a_folder_with_an_unfinished_table_below_is_not_a_table(tmp_path):
    write_table(tmp_path / "packed" / "train", ROWS)
    begin_writing(tmp_path / "packed" / "train", {})
    assert "is a folder of tables (train)" in refusal(tmp_path / "packed")
    assert "is unfinished" in refusal(tmp_path / "packed" / "train")


def test_spark_left_in_mid_write(tmp_path):
    write_table(tmp_path / "t", ROWS)
    (tmp_path / "t" / "_temporary").mkdir()
    assert f"{tmp_path / 't'} is unfinished" in refusal(tmp_path / "t")


def test_files_that_came_later_are_named(tmp_path):
    table = finished(tmp_path / "t")
    write_table(tmp_path / "more", ROWS, files=1)
    (tmp_path / "more" / "part-00000.parquet").rename(table / "part-00009.parquet")
    assert "part-00009.parquet is not in the manifest of" in refusal(table)


def test_files_of_another_size_are_named(tmp_path):
    table = finished(tmp_path / "t")
    write_table(tmp_path / "other", [np.arange(1000, dtype=np.int32)], files=1)
    (tmp_path / "other" / "part-00000.parquet").replace(table / "part-00001.parquet")
    said = refusal(table)
    assert "part-00001.parquet has " in said
    assert "the table was changed after it was written" in said


def test_a_manifest_that_is_none_is_named(tmp_path):
    table = finished(tmp_path / "t")
    (table / MANIFEST_NAME).write_bytes(b"\xff\xfe")
    assert f"{MANIFEST_NAME} is not a manifest" in refusal(table)


def test_rows_longer_than_the_manifest_says_are_named(tmp_path):
    table = finished(tmp_path / "t", seq_len=6)
    said = refusal(table, group=1)
    assert "part-00001.parquet, row group 0, row 0 has 7 tokens" in said
    assert "packed to 6" in said


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint32()])
def test_boundaries_that_fall_are_named_whatever_their_type(kind, tmp_path):
    columns = {"input_ids": pa.array([[1, 2, 3]], pa.list_(pa.int32()))}
    columns["cu_seqlens"] = pa.array([[0, 2, 1, 3]], pa.list_(kind))
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    assert "part.parquet, row group 0, row 0: cu_seqlens must rise from 0" in refusal(tmp_path, group=0)


@pytest.mark.parametrize("column", ["labels", "cu_seqlens"])
def test_nulls_of_optional_columns_are_named(column, tmp_path):
    pq.write_table(
        pa.table({"input_ids": [[1, 2]], column: pa.array([None], pa.list_(pa.int32()))}), tmp_path / "part.parquet"
    )
    assert f"part.parquet, row group 0: column {column} holds nulls" in refusal(tmp_path, group=0)


@pytest.mark.parametrize("change", ["other ids", "fewer row groups", "no ids", "gone"])
def test_a_file_that_changes_under_a_run_is_named(change, tmp_path):
    """Also where rows and tokens stay the same; a table with a manifest would not be opened again."""
    folder = write_table(tmp_path / "t", [np.arange(64, dtype=np.int32)] * 4, files=1, row_group_size=2)
    table, file = Table.open(folder), folder / "part-00000.parquet"
    if change == "gone":
        file.unlink()
    elif change == "no ids":
        pq.write_table(pa.table({"text": ["a"] * 4}), file, row_group_size=2)
    else:
        other = 7 * np.arange(64, dtype=np.int32) % 60
        write_table(folder, [other] * 4, files=1, row_group_size=2 if change == "other ids" else 4)
    with pytest.raises(UserError) as raised:
        read_sample(SampleReader(table, 64, seed=0, shuffle=False), 3)
    expected = "cannot be read" if change == "gone" else "was changed after the run had read its footer"
    assert f"part-00000.parquet, row group 1 {expected}" in str(raised.value)
    if change == "other ids":  # nor would a run that stopped go on with it
        again = Table.open(folder)
        assert (again.rows, again.tokens) == (table.rows, table.tokens)
        assert again.fingerprint != table.fingerprint


def test_a_damaged_row_group_is_named(tmp_path):
    """Opened from footers alone, a table may turn out broken only when it is read."""
    file = write_table(tmp_path / "t", ROWS, files=1) / "part-00000.parquet"
    content = bytearray(file.read_bytes())
    content[4:30] = b"\xff" * 26  # the first page's header
    file.write_bytes(content)
    assert "part-00000.parquet, row group 0 cannot be read" in refusal(tmp_path / "t", group=0)
