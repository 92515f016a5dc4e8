"""Tables that other programs wrote: columns that shift others, padding, labels of nothing; read right, or refused."""

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_table

from fft.data.commits import commit
from fft.data.known import REFUSED
from fft.data.manifest import FileInfo, Manifest
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.errors import UserError

INTS = pa.list_(pa.int32())
IDS = pa.array([[1, 2, 3], [4, 5]], INTS)


def table_of(folder, statistics=True, **columns) -> Table:
    pq.write_table(pa.table({**columns, "input_ids": IDS}), folder / "part.parquet", write_statistics=statistics)
    return Table.open(folder)


def refusal(function) -> str:
    with pytest.raises(UserError) as raised:
        function()
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


BEFORE = {
    "input_ids.length": pa.array([3, 2]),
    "input_ids.list": pa.array([[0] * 9, [1]]),
    "struct": pa.array([{"input_ids": [1], "b": {"c": 1.0}}, None]),
    "map": pa.array([[("a", [1, 2])], []], pa.map_(pa.string(), pa.list_(pa.int64()))),
    "lists": pa.array([[[1, 2], [3]], None]),
    "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "nothing": pa.nulls(2),
}


@pytest.mark.parametrize("before", [*([name] for name in BEFORE), list(BEFORE)], ids=str)
def test_columns_before_the_ids_do_not_shift_them(before, tmp_path):
    table = table_of(tmp_path, **{name: BEFORE[name] for name in before})
    (group,) = table.row_groups
    assert (group.rows, group.tokens) == (2, 5)
    assert SampleReader(table, 2, seed=0).samples_per_epoch == 3
    assert table.read(0).input_ids.tolist() == [1, 2, 3, 4, 5]
    assert table.unread.files == {f"column {name}": 1 for name in before}


def test_two_columns_of_one_name_are_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([IDS, IDS], ["input_ids", "input_ids"]), tmp_path / "part.parquet")
    assert "part.parquet has more than one column input_ids: rename" in refusal(lambda: Table.open(tmp_path))


@pytest.mark.parametrize("name", REFUSED)
def test_what_says_something_else_about_tokens_is_refused(name, tmp_path):
    said = refusal(lambda: table_of(tmp_path, **{name: IDS}))
    assert f"part.parquet has a column {name}, which is not read: {REFUSED[name]}." in said


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.bool_()], ids=str)
def test_a_mask_of_ones_is_no_padding(kind, statistics, tmp_path):
    mask = pa.array([[1] * 3, [1] * 2]).cast(pa.list_(kind))
    table = table_of(tmp_path, statistics, attention_mask=mask)
    table.check_trainable()
    assert not table.unread.files
    assert table.read(0).input_ids.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.bool_()], ids=str)
def test_padding_is_refused_with_what_to_do(kind, tmp_path):
    table = table_of(tmp_path, attention_mask=pa.array([[1, 1, 0], [1, 1]]).cast(pa.list_(kind)))
    assert "part.parquet, row group 0: attention_mask says that some tokens are padding" in refusal(
        table.check_trainable
    )
    assert "spark_jobs/repartition.py" in refusal(lambda: table.read(0))
    blind = table_of(tmp_path, False, attention_mask=pa.array([[1, 1, 0], [1, 1]]).cast(pa.list_(kind)))
    blind.check_trainable()  # the footer does not tell
    assert "some tokens are padding" in refusal(lambda: blind.read(0))
    assert "some tokens are padding" in refusal(lambda: blind.read(0, labels=False))


@pytest.mark.parametrize("statistics", [True, False])
def test_a_mask_of_another_length_is_refused(statistics, tmp_path):
    table = table_of(tmp_path, statistics, attention_mask=pa.array([[1, 1], [1, 1]]))
    assert "attention_mask and input_ids differ in length" in refusal(lambda: table.read(0))


@pytest.mark.parametrize("statistics", [True, False])
def test_a_mask_with_nulls_is_refused(statistics, tmp_path):
    table = table_of(tmp_path, statistics, attention_mask=pa.array([[1, None, 1], [1, 1]]))
    assert "column attention_mask holds nulls" in refusal(lambda: table.read(0))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.int64()], ids=str)
def test_a_mask_that_is_none_is_refused(kind, tmp_path):
    said = refusal(lambda: table_of(tmp_path, attention_mask=pa.nulls(2, kind)))
    assert "column attention_mask is" in said
    assert "must be a list of integers: drop or rename it" in said


def test_labels_of_nothing_are_refused(tmp_path):
    table = table_of(tmp_path, labels=pa.array([[-100] * 3, [-100] * 2], INTS))
    assert "nothing is trained on, since all labels are -100" in refusal(table.check_trainable)
    table_of(tmp_path, labels=pa.array([[-100] * 3, [-100, 7]], INTS)).check_trainable()
    table_of(tmp_path, False, labels=pa.array([[-100] * 3, [-100] * 2], INTS)).check_trainable()  # no footer tells


def test_documents_of_one_token_are_refused(tmp_path):
    write_table(tmp_path / "t", [np.array([7], np.int32)] * 5)
    assert "every document is one token" in refusal(Table.open(tmp_path / "t").check_trainable)
    packed = {"cu_seqlens": pa.array([[0, 1, 2, 3], [0, 1, 2]], INTS)}
    (tmp_path / "p").mkdir()
    table_of(tmp_path / "p", **packed).check_trainable()  # the footers do not tell
    size = (tmp_path / "p" / "part.parquet").stat().st_size
    counts = {"counts": {"lengths": {"1": 5}}}
    commit(tmp_path / "p", Manifest((FileInfo("part.parquet", 2, 5, size),), 2, 5, lineage=counts))
    assert "every document is one token" in refusal(Table.open(tmp_path / "p").check_trainable)


def test_a_file_without_row_groups(tmp_path):
    pq.ParquetWriter(tmp_path / "part.parquet", pa.schema([("input_ids", INTS)])).close()
    assert "holds no tokens" in refusal(lambda: Table.open(tmp_path))
    pq.write_table(pa.table({"input_ids": IDS}), tmp_path / "part-1.parquet")
    assert Table.open(tmp_path).tokens == 5


LAKES = {"Delta": "_delta_log/0.json", "Hudi": ".hoodie/properties", "Iceberg": "metadata/v1.metadata.json"}


def lake(folder, kind):
    """A table with a partition; its log says nothing, but it is there."""
    write_table(folder / "data" / "lang=en", [np.arange(5, dtype=np.int32)], files=1)
    (folder / LAKES[kind]).parent.mkdir()
    (folder / LAKES[kind]).touch()
    return folder


@pytest.mark.parametrize("kind", LAKES)
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_tables_with_a_log_are_not_read_as_loose_files(kind, prefix, tmp_path):
    deep = lake(tmp_path / "all" / "a" / "deep", kind)
    assert "all is a folder of tables (a/deep), not one" in refusal(lambda: Table.open(f"{prefix}{tmp_path}/all"))
    inside = f"lies in the {kind} table {deep}, of which it may be an older version: name the table"
    for below in ("data", "data/lang=en", "data/lang=en/part-00000.parquet"):
        assert inside in refusal(lambda below=below: Table.open(f"{prefix}{deep}/{below}"))
    if kind != "Delta":
        assert f"deep is of {kind}, whose folder also holds files of older" in refusal(lambda: Table.open(deep))
    deep.rename(deep.with_name("_attic"))  # is passed over
    write_table(tmp_path / "all" / "b", [np.arange(3, dtype=np.int32)], files=1)
    assert Table.open(tmp_path / "all").tokens == 3


def test_links_to_what_is_read_already_are_refused(tmp_path):
    write_table(tmp_path / "t", [np.arange(5, dtype=np.int32)], files=1)
    link = tmp_path / "t" / "part-1.parquet"
    link.symlink_to("part-00000.parquet")
    assert "part-1.parquet leads to a file that is read already: remove it" in refusal(lambda: Table.open(tmp_path))
    link.unlink()
    (tmp_path / "t" / "part-00000.parquet").rename(tmp_path / "t" / "blob")
    link.symlink_to("blob")  # as caches have it
    assert Table.open(tmp_path / "t").tokens == 5
    (tmp_path / "t" / "part-2.parquet").symlink_to("blob")
    assert "part-2.parquet leads to a file that is read already" in refusal(lambda: Table.open(tmp_path))
    (tmp_path / "t" / "part-2.parquet").unlink()
    (tmp_path / "t" / "blob").rename(tmp_path / "t" / "part-00000.parquet")
    link.unlink()
    link.symlink_to("gone.parquet")
    assert "part-1.parquet leads to nothing that can be read" in refusal(lambda: Table.open(tmp_path))
    link.unlink()
    write_table(tmp_path / "u", [np.arange(2, dtype=np.int32)], files=1)
    link.with_name("more").symlink_to(tmp_path / "u")
    for name in ("notes.csv", "more.CSV", "packed.csv.gz"):
        (tmp_path / "t" / name).touch()
    table = Table.open(tmp_path / "t")
    assert (table.tokens, table.unread.files) == (7, {".csv files": 2, ".csv.gz files": 1})


def test_partition_columns_are_told(tmp_path):
    rows = {"input_ids": IDS, "id": ["a b", "c"], "lang": ["en", "en"]}
    deltalake.write_deltalake(str(tmp_path / "d"), pa.table(rows), partition_by=["id"])
    for name in ("id=a%20b", "id=c"):
        write_table(tmp_path / "h" / name, [np.arange(3, dtype=np.int32)], files=1)
    assert Table.open(tmp_path / "d").unread.files == {"partition column id": 2, "column lang": 2}
    assert Table.open(tmp_path / "h").unread.files == {"partition column id": 2}
