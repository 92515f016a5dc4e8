"""Datasets keep their names, and documents other columns, from the records to packed rows."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fft.data.manifest import read_manifest
from fft.data.reader import SampleReader
from fft.data.table import Table
from fft.data.trace import documents_of_step, steps_of_document
from fft.errors import UserError
from spark.helpers import rows_of, write_foreign
from spark_jobs import pack, repartition_table, shuffle, shuffle_tables, tokenize_table
from spark_jobs.cli import run_shuffle, run_tokenize


def by_document(rows, *columns):
    """What the columns say of each document of packed rows, and how many tokens it has."""
    found = {}
    for row in rows:
        bounds = row.get("cu_seqlens") or [0, len(row["input_ids"])]
        lists = [row[column] for column in columns]
        assert {len(own) for own in (row["doc_ids"], *lists)} == {len(bounds) - 1}
        for name, *own in zip(row["doc_ids"], *lists, strict=True):
            assert found.setdefault(name, own) == own
    return found


@pytest.fixture(scope="module")
def mixed(spark, tmp_path_factory):
    """Two tables in one mixture, by names of their own."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, count in (("a", 40), ("b", 25)):
        rows = [[number, number + 1, number + 2][: 1 + number % 3] for number in range(count)]
        write_foreign(folder / name, rows, doc_ids=[[f"{name}{number}"] for number in range(count)])
    run_shuffle(["-i", f"web={folder / 'a'}", f"books={folder / 'b'}", "-o", str(folder / "mixed"), "-n", "2"])
    return folder


def expected_of(name):
    return ["web" if name[0] == "a" else "books"]


def test_a_mixture_is_packed_with_its_names(spark, mixed, tmp_path):
    rows = rows_of(mixed / "mixed")
    named = by_document(rows, "dataset")
    assert len(named) == 65
    assert all(own == [expected_of(name)[0]] for name, own in named.items())
    column = pq.ParquetFile(next((mixed / "mixed").glob("*.parquet"))).metadata.row_group(0).column(2)
    assert "dataset" in column.path_in_schema
    assert "RLE_DICTIONARY" in column.encodings
    manifests = repartition_table(mixed / "mixed", tmp_path / "packed", max_len=16, num_partition=2)
    packed = rows_of(tmp_path / "packed")
    assert by_document(packed, "dataset") == named
    tokens = Counter(expected_of(row["doc_ids"][0])[0] for row in rows for _ in row["input_ids"])
    counted = manifests[""].lineage["counts"]["datasets"]
    assert {name: own["tokens"] for name, own in counted.items()} == dict(tokens)
    assert {name: own["rows"] for name, own in counted.items()} == Counter(
        d for row in packed for d in {*row["dataset"]}
    )
    table = Table.open(tmp_path / "packed")
    assert not table.unread.files  # it is no column that nobody knows
    reader = SampleReader(table, 16, seed=0)
    for seen in documents_of_step(reader, 1, reader.samples_per_epoch):
        assert [seen.dataset] == expected_of(seen.doc_id)
        assert seen.table == str(tmp_path / "packed")
    assert {seen.dataset for seen in steps_of_document(reader, "b3", 4, 1)} == {"books"}


def test_names_outlive_another_shuffle_and_spark_s_own_writer_counts_them(spark, mixed, tmp_path):
    extra = write_foreign(tmp_path / "code", [[1, 2], [3, 4]], doc_ids=[["c0"], ["c1"]])
    inputs = {"old": mixed / "mixed", "new": extra}
    made = shuffle_tables(inputs, tmp_path / "out", weights={"old": 1.0}, num_block=2)[""]
    by_spark = shuffle_tables(inputs, tmp_path / "spark", num_block=2, writer="spark")[""]
    found = by_document(rows_of(tmp_path / "out"), "dataset")
    assert {name: own for name, own in found.items() if name[0] != "c"} == by_document(
        rows_of(mixed / "mixed"), "dataset"
    )
    assert found["c0"] == found["c1"] == ["new"]
    counts = made.lineage["counts"]["datasets"]
    assert counts == by_spark.lineage["counts"]["datasets"]
    assert {name: own["rows"] for name, own in counts.items()} == {"web": 40, "books": 25, "new": 2}
    assert sorted(map(str, rows_of(tmp_path / "spark"))) == sorted(map(str, rows_of(tmp_path / "out")))
    rows = spark.read.parquet(str(tmp_path / "out")).transform(shuffle(seed=1)).transform(pack(16)).collect()
    assert by_document([row.asDict() for row in rows], "dataset") == found


def test_names_are_told_apart_or_refused(spark, mixed, tmp_path):
    def fails(match, inputs, **options):
        with pytest.raises(UserError, match=match):
            shuffle_tables(inputs, tmp_path / "out", **options)

    a, b = mixed / "a", mixed / "b"
    fails("`inputs` has two tables called x", [f"x={a}", f"x={b}"])
    fails("`inputs` has two tables called b", [f"b={a}", b])
    fails(r"`inputs` x=.* holds 3 tables", [f"x={mixed}"])
    fails("`inputs` names a table 'a b'", {"a b": a})
    fails("`keep` names url, which no table has", a, keep=["url"])
    fails("`keep` names doc_ids, which is always kept", a, keep=["doc_ids"])
    fails("`keep` is 'url'", a, keep="url")


@pytest.fixture(scope="module")
def records():
    texts = [f"text number {number} " * (1 + number % 5) for number in range(60)]
    extra = [
        {"url": f"http://x/{n}", "year": 1990 + n, "tags": ["a", n]} | ({"lang": "de"} if n % 2 else {})
        for n in range(60)
    ]
    return [{"id": f"d{n}", "text": text, **more} for n, (text, more) in enumerate(zip(texts, extra, strict=True))]


def test_other_columns_go_along_where_asked(spark, records, tokenizer, tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(
        pa.table({name: [r.get(name) for r in records] for name in ("id", "text", "url", "year")}),
        tmp_path / "b.parquet",
    )
    keep, flags = ["url", "year", "tags", "lang"], ["--tokenizer", str(tokenizer), "--max_len", "8"]
    run_tokenize(["-i", str(source), "-o", str(tmp_path / "tokens"), "--keep", ",".join(keep), *flags, "--show", "1"])
    told = capsys.readouterr().err
    assert "of 60 documents, 30 have no lang to keep" in told
    assert "row 0, document 0 d0: tokens 0 to 5, 4 trained" in told
    assert "⟦" in told
    expected = {r["id"]: [r["url"], str(r["year"]), json.dumps(r["tags"]), r.get("lang")] for r in records}
    rows = rows_of(tmp_path / "tokens")
    assert len(rows) > 60  # every row of a document that is cut has them
    assert by_document(rows, *keep) == expected
    assert read_manifest(tmp_path / "tokens").lineage["counts"]["unused_keys"] == {}
    plain = tmp_path / "plain"
    tokenize_table(source, plain, tokenizer, max_len=8)
    assert [{k: row[k] for k in ("input_ids", "doc_ids")} for row in rows] == rows_of(plain)
    shuffle_tables(tmp_path / "tokens", tmp_path / "shuffled", keep=["url", "lang"], holdout=0.2)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not read of tokens")]
    assert {word for word in ("url", "year", "tags", "lang") if f"column {word} " in told} == {"year", "tags"}
    repartition_table(tmp_path / "shuffled", tmp_path / "packed", max_len=32, num_partition=1)
    found = {}
    for split in ("train", "validation"):
        rows = rows_of(tmp_path / "packed" / split)
        assert set(rows[0]) == {"input_ids", "cu_seqlens", "doc_ids", "dataset", "url", "lang"}
        found |= by_document(rows, "url", "lang", "dataset")
    assert found == {name: [own[0], own[3], "tokens"] for name, own in expected.items()}
    tokenize_table([tmp_path / "b.parquet"], tmp_path / "of_rows", tokenizer, keep=["url", "year"], writer="spark")
    assert by_document(rows_of(tmp_path / "of_rows"), "url", "year") == {n: own[:2] for n, own in expected.items()}


def test_what_cannot_be_kept_is_refused_by_name(spark, tokenizer, tmp_path):
    pq.write_table(pa.table({"text": ["a"], "tags": [["b"]]}), tmp_path / "a.parquet")

    def fails(match, *keep):
        with pytest.raises(UserError, match=match):
            tokenize_table(tmp_path / "a.parquet", tmp_path / "out", tokenizer, keep=list(keep))
        assert not (tmp_path / "out").exists()

    fails(r"a\.parquet: column tags is list<.*>, which `keep` does not carry", "tags")
    fails("has no column url", "url")
    fails("`keep` names labels, a column that token tables use themselves", "labels")
    fails("different names of columns", "text", "text")


def test_a_key_may_name_the_dataset(spark, tokenizer, tmp_path):
    lines = [{"text": f"a text {n}", "dataset": "web" if n % 2 else "books"} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize_table(tmp_path / "a.jsonl", tmp_path / "tokens", tokenizer, keep=["dataset"])
    made = shuffle_tables(tmp_path / "tokens", tmp_path / "out", num_block=1)[""]
    assert {name: own["rows"] for name, own in made.lineage["counts"]["datasets"].items()} == {"books": 5, "web": 5}
