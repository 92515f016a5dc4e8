"""Delta tables, with nothing but ``deltalake``: versions, one commit for all, and what is refused."""

import deltalake
import pyarrow as pa
import pytest
from delta_logs import delete_rows, write_with_features

from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.errors import UserError
from spark.helpers import rows_of
from spark_jobs import repartition_table, shuffle_tables, tokenize_table
from spark_jobs.cli import run_tokenize as main


def ids_of(folder, version=None) -> list:
    return sorted(deltalake.DeltaTable(str(folder), version=version).to_pyarrow_table().column("input_ids").to_pylist())


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A Delta table of texts with two versions: one document, then three."""
    folder = tmp_path_factory.mktemp("raw") / "texts"
    table = pa.table({"id": ["a"], "text": ["first"]})
    deltalake.write_deltalake(str(folder), table)
    deltalake.write_deltalake(str(folder), pa.table({"id": ["b", "c"], "text": ["two", "three"]}), mode="append")
    return folder


def test_texts_of_a_version(spark, raw, tokenizer, tmp_path):
    latest = tokenize_table(raw, tmp_path / "latest", tokenizer)
    assert latest.lineage["inputs"] == [f"{raw}@v1"]
    assert {row["doc_ids"][0] for row in rows_of(tmp_path / "latest")} == {"a", "b", "c"}
    tokenize_table(f"{raw}@v0", tmp_path / "first", tokenizer)
    assert [row["doc_ids"] for row in rows_of(tmp_path / "first")] == [["a"]]
    with pytest.raises(UserError, match="@v9"):
        tokenize_table(f"{raw}@v9", tmp_path / "none", tokenizer)


def test_the_whole_way_in_delta(spark, corpus, tokenizer, tokens, shuffled, tmp_path):
    tokenize_table(corpus, tmp_path / "t", tokenizer, format="delta")
    assert ids_of(tmp_path / "t") == sorted(row["input_ids"] for row in rows_of(tokens))
    made = shuffle_tables(tmp_path / "t", tmp_path / "s", holdout=0.1, num_block=4, format="delta")
    assert made["train"].lineage["inputs"] == [f"{tmp_path / 't'}@v0"]
    assert ids_of(tmp_path / "s" / "train") == sorted(row["input_ids"] for row in rows_of(shuffled / "train"))
    (packed, _) = repartition_table(tmp_path / "s", tmp_path / "p", max_len=128, format="delta").values()
    table = Table.open(tmp_path / "p" / "train")
    assert (table.version, table.manifest, table.tokens) == (0, packed, packed.tokens)
    assert SampleReader(table, 128, seed=0).samples_per_epoch == packed.rows  # rows are samples: the manifest is known


def test_overwrite_is_a_new_version_and_the_old_one_stays(spark, corpus, tokenizer, tmp_path):
    folder = tmp_path / "t"
    old = tokenize_table(corpus, folder, tokenizer, format="delta")
    with pytest.raises(UserError, match="exists: give `overwrite=True` to add a version"):
        tokenize_table(corpus, folder, tokenizer, format="delta")
    with pytest.raises(UserError, match='is a Delta table: give `format="delta"`'):
        tokenize_table(corpus, folder, tokenizer, overwrite=True)
    before = ids_of(folder)
    new = tokenize_table(corpus, folder, tokenizer, max_len=100, format="delta", overwrite=True)
    assert new.rows > old.rows
    assert ids_of(folder, 0) == before != ids_of(folder, 1)
    assert Table.open(folder).manifest == new
    assert Table.open(f"{folder}@v0").manifest == old
    assert Table.open(f"{folder}@v0").source == f"{folder}@v0"


def test_until_the_commit_the_old_version_stands(spark, corpus, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "t"
    tokenize_table(corpus, folder, tokenizer, format="delta")
    before = ids_of(folder)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spark_jobs.token_table.output.commit_delta", dies)
        with pytest.raises(KeyboardInterrupt):
            tokenize_table(corpus, folder, tokenizer, max_len=50, format="delta", overwrite=True)
    assert ids_of(folder) == before
    assert Table.open(folder).version == 0
    tokenize_table(corpus, folder, tokenizer, max_len=50, format="delta", overwrite=True)
    assert Table.open(folder).version == 1


def test_an_appended_table_is_foreign(spark, corpus, tokenizer, tmp_path):
    folder = tmp_path / "t"
    manifest = tokenize_table(corpus, folder, tokenizer, format="delta")
    more = pa.table({"input_ids": pa.array([[1, 2, 3]], pa.list_(pa.int32())), "doc_ids": [["more"]]})
    deltalake.write_deltalake(str(folder), more, mode="append")
    table = Table.open(folder)
    assert (table.version, table.manifest, table.tokens) == (1, None, manifest.tokens + 3)


def test_what_cannot_be_read_is_refused(spark, raw, tokenizer, tmp_path):
    with pytest.raises(UserError, match="is no Delta table"):
        Table.open(f"{tmp_path}@v3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists and is no Delta table"):
        main(["-i", str(raw), "-o", str(tmp_path / "full"), "--tokenizer", str(tokenizer), "--format", "delta"])
    deleted = write_with_features(tmp_path / "deleted", pa.table({"input_ids": [[1], [2]]}), "deletionVectors")
    delete_rows(deleted, [0])
    with pytest.raises(UserError, match="uses deletion vectors"):
        shuffle_tables(deleted, tmp_path / "none")


def test_in_place_is_a_new_version(spark, tokenizer, raw, tmp_path):
    tokenize_table(raw, tmp_path / "t", tokenizer, format="delta")
    before = ids_of(tmp_path / "t")
    repartition_table(tmp_path / "t", max_len=64, num_partition=1, overwrite=True)
    assert ids_of(tmp_path / "t", 0) == before
    assert len(ids_of(tmp_path / "t")) == 1
    assert Table.open(tmp_path / "t").manifest.lineage["inputs"] == [f"{tmp_path / 't'}@v0"]
