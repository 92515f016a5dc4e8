"""A .jsonl that a trainer tokenizes by itself becomes the very table that the job makes of it."""

import json

import pytest
from conversations import write_chats

from fft.corpus.local import table_of, text_input
from fft.data.manifest import read_manifest
from fft.data.table import Table
from spark.chat_templates import save_chat_tokenizer
from spark.helpers import files_of
from spark_jobs import tokenize_table


def facts(folder):
    """What a manifest says, but for when and how fast."""
    raw = json.loads(read_manifest(folder).to_json())
    raw["lineage"].pop("timing")
    raw["lineage"]["counts"].pop("seconds")
    return raw


@pytest.mark.parametrize("max_len", [4096, 40])
@pytest.mark.parametrize("style", ["qwen3", "llama3"])
def test_chats(style, max_len, spark, tmp_path):
    tokenizer = save_chat_tokenizer(tmp_path / style, style)
    chats = write_chats(tmp_path / "chats.jsonl", 300)
    tokenize_table(chats, tmp_path / "job", tokenizer, task="chat", max_len=max_len)
    compare(chats, tokenizer, tmp_path, max_len)


def test_texts(spark, corpus, tokenizer, tmp_path):
    tokenize_table(corpus, tmp_path / "job", tokenizer)
    compare(corpus, tokenizer, tmp_path, 512)


def compare(path, tokenizer, tmp_path, max_len):
    ours, job = table_of(text_input(path, tokenizer, max_len), tmp_path / "cache"), tmp_path / "job"
    assert [file.name for file in files_of(ours)] == [file.name for file in files_of(job)]
    for mine, theirs in zip(files_of(ours), files_of(job), strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert facts(ours) == facts(job)
    assert Table.open(ours).fingerprint == Table.open(job).fingerprint  # so it trains in the same order
