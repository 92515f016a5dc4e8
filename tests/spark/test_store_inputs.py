"""Inputs in an object store: tasks read them there, and the table is that of a local copy, byte for byte."""

import json
import sys

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from thorough import thorough

from fft.data.manifest import read_manifest
from spark.helpers import files_of, rows_of
from spark_jobs import tokenize_table


@pytest.fixture(scope="module")
def raw(documents, tmp_path_factory):
    """A folder with files of every kind, some under names that a URL would have to escape."""
    folder = tmp_path_factory.mktemp("raw") / "a b"
    (folder / "100%41" / "id=one").mkdir(parents=True)
    lines = [json.dumps(document) + "\n" for document in documents]
    (folder / "a.jsonl").write_text("".join(lines[:60]))
    (folder / "100%41" / "b.jsonl").write_text("".join(lines[60:90]))
    (folder / "c.txt").write_text("\n\n".join(document["text"].replace("\n\n", "\n") for document in documents[90:100]))
    pq.write_table(pa.Table.from_pylist(documents[100:110]), folder / "d.parquet", row_group_size=3)
    pq.write_table(pa.table({"text": ["of a partition"]}), folder / "100%41" / "id=one" / "e.parquet")
    (folder / "f.csv").write_text("a,b")
    deltalake.write_deltalake(str(folder / "lake"), pa.Table.from_pylist(documents[:50]))
    deltalake.write_deltalake(str(folder / "lake"), pa.Table.from_pylist(documents[110:]), mode="overwrite")
    return folder


@pytest.fixture
def url(store, raw):
    fs.copy_files(str(raw), "lake/raw/a b", fs.LocalFileSystem(), store)
    return "s3a://lake/raw/a b"


@pytest.fixture
def tokenize(launch, tokenizer, tmp_path):
    """The job in a process of its own, whose workers have the environment of the store."""

    def run(engine, given, name):
        flags = ("-i", given, "-o", tmp_path / name, "--tokenizer", tokenizer)
        return launch(sys.executable, "spark_jobs/tokenize.py", *flags, env={"FFT_ENGINE": engine})

    return run


@pytest.mark.parametrize("engine", [thorough("spark"), "sail"])
def test_the_table_of_a_store_is_that_of_a_local_copy(engine, spark, tokenize, url, raw, tokenizer, tmp_path):
    local = tokenize_table(raw, tmp_path / "local", tokenizer)
    done = tokenize(engine, url, "out")
    assert done.returncode == 0, done.stderr
    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "local")
    assert [(file.name, file.read_bytes()) for file in ours] == [(file.name, file.read_bytes()) for file in theirs]
    assert ["one"] in [row["doc_ids"] for row in rows_of(tmp_path / "out")]
    lineage = read_manifest(tmp_path / "out").lineage
    assert lineage["inputs"] == [f"{url}/lake@v1", url]
    assert lineage["not_read"] == local.lineage["not_read"] == {".csv files": {"files": 1, "bytes": 3}}
    facts = [[one["fingerprint"] for one in told["made_from"]] for told in (lineage, local.lineage)]
    assert facts[0] == facts[1]


def test_a_malformed_line_of_a_store_is_named(store, tokenize):
    with store.open_output_stream("lake/malformed/a b.jsonl") as stream:
        stream.write(b'{"text": "fine"}\nnot json\n')
    done = tokenize("sail", "s3://lake/malformed", "out")
    assert done.returncode == 2
    assert "s3://lake/malformed/a b.jsonl, line 2: not valid JSON" in done.stderr
