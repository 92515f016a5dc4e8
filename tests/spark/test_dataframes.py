"""Inputs that only the engine can read: DataFrames, catalog tables, URLs."""

import json

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta_logs import delete_rows, write_with_features

from fft.data.lakes import EngineOnly
from fft.errors import UserError
from spark.helpers import files_of, rows_of
from spark_jobs import tokenize_table

TEXTS = [f"document {i}: " + "def f(x):\n    return x\n" * (i % 7) for i in range(300)]


def ids_by_name(table):
    return {row["doc_ids"][0]: row["input_ids"] for row in rows_of(table)}


@pytest.fixture
def frame(spark):
    return spark.createDataFrame([(f"d{i}", text) for i, text in enumerate(TEXTS)], "id string, text string")


@pytest.fixture
def expected(tokenizer, tmp_path):
    path = tmp_path / "expected.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    tokenize_table(path, tmp_path / "expected", tokenizer)
    return ids_by_name(tmp_path / "expected")


def test_a_dataframe_gives_the_same_rows_however_it_is_cut(frame, expected, tokenizer, tmp_path):
    manifest = tokenize_table(frame.repartition(7), tmp_path / "a", tokenizer)
    tokenize_table(frame.orderBy("text").coalesce(2), tmp_path / "b", tokenizer)
    assert ids_by_name(tmp_path / "a") == expected
    assert [f.read_bytes() for f in files_of(tmp_path / "a")] == [f.read_bytes() for f in files_of(tmp_path / "b")]
    assert manifest.lineage["counts"]["datasets"]["DataFrame"]["rows"] == len(TEXTS)


def test_a_catalog_table_and_a_file_together(frame, spark, expected, tokenizer, tmp_path):
    spark.sql("create database if not exists lake")
    frame.where("id < 'd2'").write.mode("overwrite").option("path", str(tmp_path / "warehouse")).saveAsTable(
        "lake.docs"
    )
    rest = frame.where("id >= 'd2'").toPandas().to_dict("records")
    (tmp_path / "rest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest))
    try:
        manifest = tokenize_table([tmp_path / "rest.jsonl", "lake.docs"], tmp_path / "out", tokenizer)
    finally:
        spark.sql("drop table lake.docs")
        spark.sql("drop database lake")
    assert ids_by_name(tmp_path / "out") == expected
    counts = manifest.lineage["counts"]
    assert counts["documents_in"] == len(TEXTS)
    assert counts["datasets"]["lake.docs"]["rows"] == len(TEXTS) - len(rest)
    assert sum(counts["lengths"].values()) == len(TEXTS)


def test_what_only_the_engine_reaches_is_read_by_it(spark, expected, tokenizer, tmp_path, monkeypatch, capsys):
    """A folder by the kinds of its files, and no Delta table as loose files."""
    lake = tmp_path / "lake"
    (lake / "deep" / "er").mkdir(parents=True)
    records = [json.loads(line) for line in (tmp_path / "expected.jsonl").read_text().splitlines()]
    (lake / "a.csv").write_text("a,b")
    (lake / "deep" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:100]))
    pq.write_table(pa.Table.from_pylist(records[100:]), lake / "deep" / "er" / "b.parquet")
    unread = EngineOnly(f"file://{lake}", "", None, "")
    monkeypatch.setattr("spark_jobs.tokenize_job.by_reader", lambda inputs: ([unread], []))
    tokenize_table("", tmp_path / "out", tokenizer)
    assert ids_by_name(tmp_path / "out") == expected
    assert "1 .csv files" in capsys.readouterr().err
    deltalake.write_deltalake(str(lake / "deep" / "er"), pa.table({"id": ["new"], "text": ["new"]}))
    with pytest.raises(UserError, match="lake/deep/er is a Delta table whose log is not readable here"):
        tokenize_table("", tmp_path / "none", tokenizer)


def test_a_table_of_a_format_that_the_engine_lacks_is_refused_by_name(spark, tokenizer, tmp_path):
    table = write_with_features(tmp_path / "dv", pa.table({"text": ["a", "b"]}), "deletionVectors")
    delete_rows(table, [0])
    with pytest.raises(UserError, match="dv uses deletion vectors, which is not read here: have Spark read it"):
        tokenize_table(table, tmp_path / "none", tokenizer)


def test_chats_of_a_table(spark, tokenizer, tmp_path):
    (tmp_path / "t").mkdir()
    for file in tokenizer.iterdir():
        (tmp_path / "t" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}] for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    frame = spark.createDataFrame([(chat,) for chat in chats], "messages array<struct<role string, content string>>")
    tokenize_table(tmp_path / "chats.jsonl", tmp_path / "a", tmp_path / "t", task="chat")
    tokenize_table(frame, tmp_path / "b", tmp_path / "t", task="chat")
    as_set = [{(tuple(r["input_ids"]), tuple(r["labels"])) for r in rows_of(tmp_path / name)} for name in "ab"]
    assert as_set[0] == as_set[1]
    assert len(as_set[0]) == len(chats)


def test_what_cannot_be_read_is_named(spark, frame, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"`inputs` lake\.none is no existing path, and no table or URL"):
        tokenize_table("lake.none", tmp_path / "out", tokenizer)
    with pytest.raises(
        UserError, match=r"s3://bucket/a\.jsonl is no existing path, .* can read: Spark lacks what knows"
    ):
        tokenize_table("s3://bucket/a.jsonl", tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match=r"`inputs` DataFrame has no column content .* `text_key`"):
        tokenize_table(frame, tmp_path / "out", tokenizer, text_key="content")
    nulls = spark.createDataFrame([("a", "x"), ("b", None)], "id string, text string")
    with pytest.raises(UserError, match='DataFrame, id b: text is null: mend it, or give `on_error="quarantine"`'):
        tokenize_table(nulls, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    counts = tokenize_table(nulls, tmp_path / "out", tokenizer, on_error="quarantine").lineage["counts"]
    assert (counts["documents_out"], counts["quarantined"]) == (1, 1)
