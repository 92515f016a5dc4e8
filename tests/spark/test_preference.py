"""Preferences through the jobs: pairs stay together, whole, and are told from all other tables."""

import itertools
import json

import pytest
from transformers import AutoTokenizer

from fft.corpus.local import table_of, text_input
from fft.data.manifest import read_manifest
from fft.errors import UserError
from spark.chat_templates import save_chat_tokenizer
from spark.helpers import rows_of, write_foreign
from spark_jobs import repartition_table, shuffle_tables, tokenize, tokenize_table

MAX_LEN = 640


def record_of(number: int) -> dict:
    turns = [{"role": "user", "content": f"Question {number}? " + "please " * (number % 9)}]
    sides = {name: [{"role": "assistant", "content": f"{name} {number}"}] for name in ("chosen", "rejected")}
    if number % 2:
        return {"id": number, "prompt": turns, **sides}
    return {"id": number, **{name: turns + side for name, side in sides.items()}}


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "qwen2.5")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "pairs.jsonl"
    path.write_text("".join(json.dumps(record_of(number)) + "\n" for number in range(80)))
    return path


@pytest.fixture(scope="module")
def table(spark, records, chat_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "pairs"
    tokenize_table(records, folder, chat_tokenizer, task="preference", max_len=MAX_LEN)
    return folder


def pairs_in(folder) -> dict[str, list[tuple[list[int], list[int]]]]:
    """By id, ids and labels of the two documents; every pair is there once, and together."""
    found = {}
    for row in rows_of(folder):
        bounds = row["cu_seqlens"]
        documents = [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in itertools.pairwise(bounds)]
        for number in range(0, len(documents), 2):
            name, same = row["doc_ids"][number : number + 2]
            assert name == same
            assert name not in found
            found[name] = documents[number : number + 2]
    return found


def test_ids_and_manifest_of_the_table(table, chat_tokenizer):
    peer, found = AutoTokenizer.from_pretrained(chat_tokenizer), pairs_in(table)
    for number in range(80):
        record = record_of(number)
        for name, (ids, labels) in zip(("chosen", "rejected"), found[str(number)], strict=True):
            turns = [*record.get("prompt", ()), *record[name]]
            assert ids == peer.apply_chat_template(turns, tokenize=True)["input_ids"]
            assert peer.decode([i for i in labels if i != -100]) == f"{name} {number}<|im_end|>"
    manifest = read_manifest(table)
    assert manifest.pairs
    assert manifest.seq_len is None
    counts = manifest.lineage["counts"]
    assert (counts["read_as_conversations"], counts["read_as_completions"]) == (40, 40)
    assert counts["documents_in"] == counts["documents_out"] == manifest.rows == 80


def test_shuffle_holds_out_pairs_and_repartition_packs_them(table, spark, tmp_path):
    before = pairs_in(table)
    made = shuffle_tables(table, tmp_path / "shuffled", holdout=0.2, num_block=2)
    assert all(manifest.pairs for manifest in made.values())
    packed = repartition_table(tmp_path / "shuffled", tmp_path / "packed", max_len=MAX_LEN, num_partition=1)
    assert all(manifest.pairs and manifest.seq_len == MAX_LEN for manifest in packed.values())
    after = {}
    for name in ("train", "validation"):
        own = pairs_in(tmp_path / "packed" / name)
        assert own.keys() == pairs_in(tmp_path / "shuffled" / name).keys()
        after |= own
    assert after == before
    rows = rows_of(tmp_path / "packed" / "train")
    assert max(len(row["input_ids"]) for row in rows) <= MAX_LEN
    assert max(len(row["cu_seqlens"]) for row in rows) > 3  # several pairs a row
    kept = repartition_table(table, tmp_path / "rows", max_len=MAX_LEN, pack="none", num_partition=1)
    assert kept[""].rows == 80


def test_what_would_part_a_pair_is_refused(table, chat_tokenizer, records, spark, tmp_path):
    longest = max(len(row["input_ids"]) for row in rows_of(table))
    with pytest.raises(UserError, match=f"preferences of {longest} tokens \\(document .*\\) would be cut to `max_len`"):
        repartition_table(table, tmp_path / "a", max_len=longest - 1)
    with pytest.raises(UserError, match=r"`pack` concat cuts anywhere, but .* has preferences"):
        repartition_table(table, tmp_path / "b", max_len=MAX_LEN, pack="concat")
    with pytest.raises(UserError, match=r"has preferences, .* has none: give tables of one kind"):
        shuffle_tables([table, write_foreign(tmp_path / "other", [[1, 2, 3]])], tmp_path / "c")
    with pytest.raises(UserError, match="a DataFrame cannot say that its rows are pairs"):
        tokenize(chat_tokenizer, task="preference")
    with pytest.raises(UserError, match='`image_path` is for `task="chat"`: preferences have no images'):
        tokenize_table(table, tmp_path / "d", chat_tokenizer, task="preference", image_path=tmp_path)
    with pytest.raises(UserError, match=r"80 are empty \(80 longer than `max_len`\) and 0 malformed"):
        table_of(text_input(records, chat_tokenizer, 8), tmp_path / "e")


def test_a_file_of_pairs_is_the_same_table_without_spark(table, records, chat_tokenizer, tmp_path):
    made = table_of(text_input(records, chat_tokenizer, MAX_LEN), tmp_path)
    assert rows_of(made) == rows_of(table)
    assert read_manifest(made).pairs
