"""Foreign tables and inputs by version, through the jobs: all is read, or left out and told, or refused."""

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data.table import Table
from fft.errors import UserError
from spark.helpers import rows_of, write_foreign
from spark_jobs import repartition_table, shuffle_tables, tokenize_table

ROWS = [[i + 1, i + 2, i + 3] for i in range(40)]


def test_a_column_of_one_id_a_row_is_kept(spark, tmp_path):
    table = write_foreign(tmp_path / "t", ROWS, doc_ids=[f"d{i}" for i in range(40)])
    shuffle_tables(table, tmp_path / "out")
    assert {row["doc_ids"][0]: row["input_ids"] for row in rows_of(tmp_path / "out")} == {
        f"d{i}": row for i, row in enumerate(ROWS)
    }


@pytest.mark.parametrize("statistics", [True, False])
def test_padding_is_left_out_and_told(statistics, spark, tmp_path, capsys):
    (tmp_path / "t").mkdir()
    columns = {"input_ids": [[*row, 0, 0] for row in ROWS], "attention_mask": [[1, 1, 1, 0, 0]] * 40, "url": ["u"] * 40}
    pq.write_table(pa.table(columns), tmp_path / "t" / "part.parquet", write_statistics=statistics)
    (packed,) = repartition_table(tmp_path / "t", tmp_path / "out", max_len=6).values()
    assert packed.tokens == 120
    assert Table.open(tmp_path / "out").columns >= {"cu_seqlens"}
    assert packed.lineage["not_read"] == {"t": {"column url": {"files": 1}}}
    said = capsys.readouterr().err
    assert "not read of t: column url (1 files)" in said
    assert "padding of t, where its attention_mask is 0, was left out" in said
    shuffle_tables(tmp_path / "t", tmp_path / "shuffled")
    assert sorted(row["input_ids"] for row in rows_of(tmp_path / "shuffled")) == ROWS


def test_empty_rows(spark, tmp_path, capsys):
    some = write_foreign(tmp_path / "some", [*ROWS, [], [], []])
    (packed,) = repartition_table(some, tmp_path / "out", max_len=6).values()
    assert (packed.tokens, packed.lineage["counts"]["rows_in"], packed.lineage["counts"]["empty"]) == (120, 43, 3)
    assert "3 rows without tokens were left out" in capsys.readouterr().err
    none = write_foreign(tmp_path / "none", [[], [], []])
    with pytest.raises(UserError, match=r"none holds no tokens: all of its 3 rows are empty"):
        repartition_table(none, tmp_path / "out2", max_len=6)
    with pytest.raises(UserError, match="`inputs` leaves no row for the output: all 3 are without tokens"):
        shuffle_tables(none, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_tables_in_partitions_are_tables_too(spark, tmp_path):
    for lang in ("en", "fr"):
        write_foreign(tmp_path / "all" / "web" / f"lang={lang}", ROWS[:10])
    write_foreign(tmp_path / "all" / "books", ROWS[10:20])
    (mixed,) = shuffle_tables(tmp_path / "all", tmp_path / "out").values()
    assert {name: own["rows"] for name, own in mixed.lineage["counts"]["datasets"].items()} == {"books": 10, "web": 20}


def test_what_a_table_was_made_from_stays_with_all_that_is_made_of_it(spark, tokenizer, tmp_path):
    for text in ("old", "new"):
        rows = pa.table({"id": [f"{text}{i}" for i in range(9)], "text": [text * 9] * 9})
        deltalake.write_deltalake(str(tmp_path / "raw"), rows, mode="overwrite")
    tokens = tokenize_table(f"{tmp_path}/raw@v0", tmp_path / "tokens", tokenizer)
    shuffle_tables(tmp_path / "tokens", tmp_path / "shuffled")
    repartition_table(tmp_path / "shuffled", tmp_path / "packed", max_len=64)
    (shuffled,) = Table.open(tmp_path / "packed").origin["made_from"]
    (tokenized,) = shuffled["made_from"]
    (raw,) = tokenized["made_from"]
    assert (shuffled["input"], tokenized["input"]) == (str(tmp_path / "shuffled"), str(tmp_path / "tokens"))
    assert tokenized["fingerprint"] == Table.open(tmp_path / "tokens").fingerprint
    assert raw == tokens.lineage["made_from"][0]
    assert (raw["input"], raw["files"]) == (f"{tmp_path}/raw@v0", 1)


def test_a_delta_table_by_url_is_read_by_its_log(spark, tokenizer, tmp_path):
    for text in ("old", "new"):
        rows = pa.table({"id": [text], "text": [text]})
        deltalake.write_deltalake(str(tmp_path / "lake" / "raw"), rows, mode="overwrite")
    (tmp_path / "lake" / "more.jsonl").write_text('{"id": "more", "text": "more"}\n')
    (tmp_path / "lake" / "more.csv").write_text("more")
    manifest = tokenize_table(f"file://{tmp_path}/lake", tmp_path / "out", tokenizer)
    assert sorted(row["doc_ids"] for row in rows_of(tmp_path / "out")) == [["more"], ["new"]]
    assert manifest.lineage["inputs"] == [f"{tmp_path}/lake/raw@v1", f"{tmp_path}/lake"]
    assert manifest.lineage["not_read"] == {".csv files": {"files": 1, "bytes": 4}}
    tokenize_table(f"file://{tmp_path}/lake/raw@v0", tmp_path / "first", tokenizer)
    assert [row["doc_ids"] for row in rows_of(tmp_path / "first")] == [["old"]]
    with pytest.raises(UserError, match=r"`inputs` gives .*/lake/.* twice, by "):
        tokenize_table([f"file://{tmp_path}/lake"] * 2, tmp_path / "twice", tokenizer)


def test_columns_of_a_dataframe_by_their_names_alone(spark, tokenizer, tmp_path):
    frame = spark.createDataFrame([("a", "one", ("no",))], "id string, `x.y` string, x struct<y: string>")
    tokenize_table(frame, tmp_path / "out", tokenizer, text_key="x.y")
    assert [row["doc_ids"] for row in rows_of(tmp_path / "out")] == [["a"]]
    with pytest.raises(UserError, match=r"`inputs` DataFrame has no column x\.z"):
        tokenize_table(frame, tmp_path / "none", tokenizer, text_key="x.z")
    twice = frame.selectExpr("id", "id as text", "`x.y` as text")
    with pytest.raises(UserError, match="DataFrame has more than one column text: rename all but one"):
        tokenize_table(twice, tmp_path / "none", tokenizer)
    alike = frame.selectExpr("id", "id as text", "`x.y` as Text")
    with pytest.raises(UserError, match="the columns text and Text, one to Spark"):
        tokenize_table(alike, tmp_path / "none", tokenizer)
    own = frame.selectExpr("id as sort_key", "`x.y` as part")
    tokenize_table(own, tmp_path / "own", tokenizer, text_key="part", id_key="sort_key")
    assert rows_of(tmp_path / "own") == rows_of(tmp_path / "out")
    odd = frame.selectExpr("id", "`x.y` as text", "make_ym_interval(1, 2) as span")
    tokenize_table(odd, tmp_path / "odd", tokenizer)
    assert [row["doc_ids"] for row in rows_of(tmp_path / "odd")] == [["a"]]


def test_parquet_without_row_groups(spark, tokenizer, tmp_path):
    (tmp_path / "t").mkdir()
    pq.ParquetWriter(tmp_path / "t" / "empty.parquet", pa.schema([("text", pa.string())])).close()
    with pytest.raises(UserError, match="t holds no documents: 0 are empty and 0 malformed"):
        tokenize_table(tmp_path / "t", tmp_path / "out", tokenizer)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t" / "one.parquet")
    assert tokenize_table(tmp_path / "t", tmp_path / "out", tokenizer).rows == 1
