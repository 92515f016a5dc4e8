"""--writer spark and names of catalog tables: the rows of part files, a manifest, and nothing lost."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, read_manifest
from fft.data.table import Table
from fft.errors import UserError
from spark.helpers import rows_of
from spark_jobs import repartition_table, shuffle_tables, tokenize_table
from spark_jobs.token_table.catalog import PROPERTY, describe_table, of_property

#: All jobs on Sail, into tables of its catalog and folders.
ON_SAIL = """
import sys
from fft.errors import UserError
from spark_jobs import get_session, repartition_table, shuffle_tables, tokenize_table
corpus, tokenizer, out = sys.argv[1:]
spark = get_session("writer")
spark.sql("create database lake")
tokenize_table(corpus, "lake.tokens", tokenizer)
shuffle_tables("lake.tokens", f"{out}/shuffled", holdout=0.1, num_block=4, writer="spark")
repartition_table(f"{out}/shuffled/train", "lake.packed", max_len=256, num_partition=3)
shuffle_tables(["lake.packed"], f"{out}/again")
try:
    tokenize_table(corpus, "lake.tokens", tokenizer, overwrite=True)
except UserError as error:
    print(error, file=sys.stderr)
print(spark.table("lake.packed").inputFiles()[0], spark.sql("show tables in lake").count())
"""


def as_set(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def read(folder):
    return rows_of(Path(folder))


@pytest.fixture
def lake(spark):
    spark.sql("create database lake")
    yield lambda name: Path(describe_table(spark, f"lake.{name}")["Location"].removeprefix("file:"))
    spark.sql("drop database lake cascade")
    shutil.rmtree("spark-warehouse/lake.db", ignore_errors=True)


def counts(manifest, *without):
    """What a manifest counts, but for what depends on files and clocks."""
    found = manifest.lineage["counts"]
    return {name: found[name] for name in found if name not in ("bytes", "seconds", *without)}


def test_all_jobs_through_a_catalog(spark, corpus, tokenizer, tokens, shuffled, lake, tmp_path):
    made = tokenize_table(corpus, "lake.tokens", tokenizer)
    assert as_set(read(lake("tokens"))) == as_set(rows_of(tokens))
    assert counts(made) == counts(read_manifest(tokens))
    assert made.tokenizer == read_manifest(tokens).tokenizer
    assert Table.open(lake("tokens")).manifest == made

    split = shuffle_tables("lake.tokens", "lake.mixed", holdout=0.1, num_block=4)
    for name in ("train", "validation"):
        assert read(lake(f"mixed_{name}")) == rows_of(shuffled / name)
        assert counts(split[name]) == counts(read_manifest(shuffled / name))

    repartition_table("lake.mixed_train", "lake.packed", max_len=256, num_partition=3)
    job = repartition_table(shuffled / "train", tmp_path / "packed", max_len=256, num_partition=3)[""]
    assert read(lake("packed")) == rows_of(tmp_path / "packed")
    packed = Table.open(lake("packed"))
    assert (packed.manifest.seq_len, packed.manifest.tokenizer) == (256, made.tokenizer)
    assert counts(packed.manifest) == counts(job)
    assert packed.manifest.lineage["inputs"] == ["lake.mixed_train"]
    with pytest.raises(UserError, match=r"lake\.packed does not exist.*location"):
        Table.open("lake.packed")


def test_folders_by_spark_are_replaced_in_one_step(spark, corpus, tokenizer, tokens, tmp_path):
    out = tmp_path / "out"
    first = tokenize_table(corpus, out, tokenizer, writer="spark")
    assert as_set(read(out)) == as_set(rows_of(tokens))
    assert Table.open(out).manifest == first
    with pytest.raises(UserError, match="exists: give `overwrite=True`"):
        tokenize_table(corpus, out, tokenizer, writer="spark")

    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: not valid JSON: .*: mend it; Spark's own writer"):
        tokenize_table(tmp_path / "bad.jsonl", out, tokenizer, writer="spark", overwrite=True)
    assert Table.open(out).manifest == first
    assert not (out / WRITING_NAME).exists()

    second = tokenize_table(corpus, out, tokenizer, writer="spark", overwrite=True, max_len=100)
    assert second.rows > first.rows
    assert Table.open(out).manifest == second
    assert {path.name for path in out.glob("*.parquet")} == {file.path for file in second.files}

    stray = pq.read_table(out / second.files[0].path)
    (tmp_path / "foreign").mkdir()
    pq.write_table(stray, tmp_path / "foreign" / "part-0.parquet")
    with pytest.raises(UserError, match="holds a table without a manifest"):
        tokenize_table(corpus, tmp_path / "foreign", tokenizer, writer="spark", overwrite=True)


def test_a_job_that_died_is_done_again(spark, corpus, tokenizer, tokens, tmp_path):
    """What a killed job leaves: its mark, and some of its files."""
    out = tmp_path / "out"
    tokenize_table(corpus, out, tokenizer, writer="spark")
    (out / MANIFEST_NAME).rename(out / WRITING_NAME)
    with pytest.raises(UserError, match="unfinished"):
        Table.open(out)
    tokenize_table(corpus, out, tokenizer, writer="spark")
    assert as_set(read(out)) == as_set(rows_of(tokens))
    assert Table.open(out).rows == len(rows_of(tokens))


def test_a_catalog_table_stays_until_its_successor_is_whole(spark, corpus, tokenizer, lake, tmp_path):
    first = tokenize_table(corpus, "lake.tokens", tokenizer)
    with pytest.raises(UserError, match=r"lake\.tokens exists: give `overwrite=True`"):
        tokenize_table(corpus, "lake.tokens", tokenizer)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: not valid JSON"):
        tokenize_table(tmp_path / "bad.jsonl", "lake.tokens", tokenizer, overwrite=True)
    assert Table.open(lake("tokens")).manifest == first
    with pytest.raises(UserError, match="not valid JSON"):
        tokenize_table(tmp_path / "bad.jsonl", "lake.fresh", tokenizer)
    (tmp_path / "bad.jsonl").write_text('{"text": "mended"}\n')
    assert tokenize_table(tmp_path / "bad.jsonl", "lake.fresh", tokenizer).rows == 1
    second = tokenize_table(corpus, "lake.tokens", tokenizer, overwrite=True, max_len=100)
    assert second.rows > first.rows
    assert Table.open(lake("tokens")).manifest == second
    assert spark.table("lake.tokens").count() == second.rows
    assert [row["tableName"] for row in spark.sql("show tables in lake").collect()] == ["fresh", "tokens"]


def test_a_manifest_is_a_property_where_files_cannot_be_reached(spark, corpus, tokenizer, lake, monkeypatch, capsys):
    monkeypatch.setattr("spark_jobs.token_table.catalog.table_storage", lambda location: None)
    made = tokenize_table(corpus, "lake.tokens", tokenizer)
    text = {row[0]: row[1] for row in spark.sql("show tblproperties lake.tokens").collect()}[PROPERTY]
    assert of_property(text, "the property") == made
    assert [(file.path, file.rows) for file in made.files] == [("lake.tokens", made.rows)]
    monkeypatch.setattr("spark_jobs.token_table.engine_table.table_storage", lambda location: None)
    again = shuffle_tables("lake.tokens", "lake.mixed")[""]
    assert again.tokenizer == made.tokenizer
    assert "its manifest is the table's property" in capsys.readouterr().err
    spark.sql("insert into lake.tokens select * from lake.tokens limit 1")
    assert shuffle_tables("lake.tokens", "lake.more")[""].tokenizer is None
    assert "it was changed since" in capsys.readouterr().err


@pytest.mark.thorough
def test_on_sail_all_jobs_write_by_the_engine(launch, corpus, tokenizer, tokens, shuffled, tmp_path):
    done = launch(sys.executable, "-c", ON_SAIL, corpus, tokenizer, tmp_path, env={"FFT_ENGINE": "sail"})
    assert done.returncode == 0, done.stderr
    file, tables = done.stdout.split()
    warehouse = Path(file.removeprefix("file://")).parent
    assert "cannot write lake.tokens" in done.stderr  # whose engine does not rename tables: both are as they were
    assert tables == "2"
    assert as_set(read(tmp_path / "shuffled" / "train")) == as_set(rows_of(shuffled / "train"))
    assert Table.open(tmp_path / "shuffled" / "train").manifest.lineage["counts"]["rows_in"] == len(rows_of(tokens))
    assert Table.open(warehouse).manifest.seq_len == 256
    assert as_set(read(tmp_path / "again")) == as_set(read(warehouse))
    assert "they are made twice" in done.stderr
    shutil.rmtree(warehouse.parent)


def test_what_cannot_be_written_is_one_sentence(spark, corpus, tokenizer, tokens, lake, tmp_path):
    spark.sql("create view lake.seen as select 1 as one")
    cases = [
        (
            lambda: tokenize_table(corpus, "nowhere.tokens", tokenizer),
            r"\(for a folder, give \./nowhere.tokens\): .*SCHEMA",
        ),
        (lambda: tokenize_table(corpus, "lake.tokens", tokenizer, writer="parts"), "names a table of a catalog"),
        (lambda: tokenize_table(corpus, "lake.d", tokenizer, format="delta"), "does not have this format"),
        (lambda: tokenize_table(corpus, "lake.seen", tokenizer, overwrite=True), "is a view"),
        (lambda: tokenize_table(corpus, "lake.tokens", tokenizer, on_error="quarantine"), "has none: leave it out"),
        (lambda: tokenize_table(corpus, tmp_path / "o", tokenizer, writer="spark", format="delta"), "catalog's"),
        (lambda: shuffle_tables("lake.none", tmp_path / "o"), "no table of Spark's"),
        (lambda: shuffle_tables("lake.seen", tmp_path / "o"), "has no column input_ids"),
        (lambda: shuffle_tables(tokens, tokens / "below", writer="spark"), "overlap"),
        (lambda: repartition_table("lake.seen", max_len=8, overwrite=True), "give another place with `output`"),
        (lambda: tokenize_table(corpus, "lake.t", tokenizer, writer="both"), "`writer` is 'both'"),
    ]
    for call, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            call()
    assert [row["tableName"] for row in spark.sql("show tables in lake").collect()] == ["seen"]
    assert not (tmp_path / "o").exists()
