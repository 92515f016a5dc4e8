"""Token rows of records that come in many batches, without Spark."""

import json
from collections import Counter

import pyarrow as pa
import pytest
from spark.helpers import END, save_tokenizer
from transformers import AutoTokenizer

from fft.corpus.files import find_sources, spans_of
from fft.corpus.splits import deal
from fft.text.pretrain import load_pretrain
from fft.text.records import Keys
from spark_jobs.runtime.counting import TALLIES, Tallied, tally_names
from spark_jobs.token_rows import EncodeRows, EncodeSplits

DOCUMENTS = [{"id": f"d{i}", "text": "x " * (i % 9)} for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("texts"), ["plain text x"])


@pytest.fixture(scope="module")
def expected(tokenizer):
    """Ids of each document that has some, by transformers."""
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    end = theirs.convert_tokens_to_ids(END)
    return {one["id"]: [*theirs(one["text"])["input_ids"], end] for one in DOCUMENTS if one["text"]}


def check(batches, expected):
    """All rows, and what was counted of them."""
    rows = [row for batch in batches for row in batch.to_pylist()]
    *rows, last = rows
    assert {row["doc_ids"][0]: row["input_ids"] for row in rows} == expected
    assert len(rows) == len(expected)
    return last[TALLIES]


@pytest.mark.parametrize("size", [1, 7, 50])
def test_no_batch_of_a_split_is_lost(tokenizer, expected, size, tmp_path, monkeypatch):
    monkeypatch.setattr("fft.corpus.records._BATCH_RECORDS", size)
    encoder, _ = load_pretrain(tokenizer, Keys(), None, "auto", False)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    splits = deal(spans_of(find_sources([tmp_path / "a.jsonl"]), encoder), 1 << 20)
    tasks = pa.RecordBatch.from_pylist([vars(split) for split in splits])
    names = tally_names(["documents_in", "documents_out", "empty"], False)
    tallies = check(Tallied(EncodeSplits(encoder), names)(iter([tasks])), expected)
    counted = Counter(dict(zip(names, tallies, strict=True)))
    assert [counted[n] for n in ("rows", "documents_in", "documents_out")] == [len(expected), 50, len(expected)]
    assert counted["tokens"] == sum(map(len, expected.values()))
    assert sum(counted[name] for name in names if name.startswith("length ")) == len(expected)


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("fail", [True, False])
def test_no_batch_of_a_frame_is_lost(tokenizer, expected, size, fail):
    encoder, _ = load_pretrain(tokenizer, Keys(), None, "auto", False)
    records = [*DOCUMENTS, *([] if fail else [{"id": "bad", "text": None}])]
    table = pa.Table.from_pylist(records).select(["text", "id"])
    work = EncodeRows(encoder, fail, "DataFrame", "parquet", ("text", "id"))
    rows = [row for batch in work(iter(table.to_batches(max_chunksize=size))) for row in batch.to_pylist()]
    good = [row for row in rows if row["input_ids"] is not None]
    assert {row["doc_ids"][0]: row["input_ids"] for row in good} == expected
    assert [row["error"] for row in rows if row["input_ids"] is None] == ([] if fail else ["text is null"])
