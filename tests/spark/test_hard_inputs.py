"""Inputs that break other tools: broken files, a million empty rows, one giant row, equal ids, a full disk."""

import errno
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from fft.data.part_files import PartFile, PartFolder
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from spark.helpers import files_of, rows_of, write_foreign
from spark_jobs import repartition_table, shuffle_tables, tokenize_table


def test_a_broken_footer_is_named(spark, tokens, tokenizer, tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read .* Restore or remove it"):
        tokenize_table(tmp_path / "a.parquet", tmp_path / "out", tokenizer)
    broken = shutil.copytree(tokens, tmp_path / "tokens")
    (broken / "_fft_manifest.json").unlink()
    files_of(broken)[1].write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00001\.parquet is no readable parquet file"):
        shuffle_tables(broken, tmp_path / "out")


def test_a_file_that_breaks_in_the_middle_is_named_by_the_worker(spark, tokenizer, tmp_path):
    texts = pa.table({"text": [f"text {i} " * 200 for i in range(500)]})
    pq.write_table(texts, tmp_path / "a.parquet", row_group_size=100, compression="gzip")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[2000:2600] = bytes(600)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        tokenize_table(tmp_path / "a.parquet", tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_million_empty_rows(spark, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w") as stream:
        for _ in range(1000):
            stream.write('{"text": ""}\n' * 1000)
        stream.write('{"text": "the only one"}\n')
    manifest = tokenize_table(path, tmp_path / "out", tokenizer)
    counts = manifest.lineage["counts"]
    assert (counts["documents_in"], counts["documents_out"], counts["empty"]) == (1_000_001, 1, 1_000_000)
    assert manifest.rows == 1


def test_one_giant_row(spark, documents, tokenizer, tmp_path):
    text = "".join(document["text"] for document in documents) * 4
    assert len(text) > 8_000_000
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "giant", "text": text}) + "\n")
    manifest = tokenize_table(path, tmp_path / "out", tokenizer)
    assert manifest.rows == 1
    (row,) = rows_of(tmp_path / "out")
    peer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert row["input_ids"][:-1] == peer.encode(text, add_special_tokens=False).ids
    packed = repartition_table(tmp_path / "out", tmp_path / "packed", max_len=2048, num_partition=1)[""]
    assert packed.tokens == manifest.tokens
    assert packed.rows == -(-manifest.tokens // 2048)


def test_equal_ids_lose_nothing(spark, tmp_path):
    rows = [[i % 7, 1, 2] for i in range(300)]
    table = write_foreign(tmp_path / "t", rows, doc_ids=[["same"]] * 300)
    (manifest,) = shuffle_tables(table, tmp_path / "out").values()
    assert sorted(row["input_ids"] for row in rows_of(tmp_path / "out")) == sorted(rows)
    assert manifest.lineage["counts"]["rows_out"] == 300


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    ids = pa.array([[1, 2]], pa.list_(pa.int32()))
    with PartFile(PartFolder(tmp_path, WorkerNotes(str(tmp_path))), 0) as sink:
        sink.write(pa.RecordBatch.from_arrays([ids], ["input_ids"]))
        with pytest.raises(UserError, match=r"cannot be written to .*No space left on device.*: make room there"):
            sink.finish({})
    assert not list(tmp_path.iterdir())
