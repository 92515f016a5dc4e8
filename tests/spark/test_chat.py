"""The chat task through Spark: inputs of every form, honest accounts, and labels that survive the other jobs."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from fft.data.manifest import read_manifest
from fft.data.table import Table
from fft.errors import UserError
from spark.chat_templates import STYLES, save_chat_tokenizer
from spark.helpers import hashes_of, rows_of, write_lines
from spark_jobs import repartition_table, shuffle_tables, tokenize, tokenize_table
from spark_jobs.cli import run_tokenize as main

END = "<|im_end|>"


def messages_of(number: int) -> list[dict]:
    """A conversation of one to three rounds, no two alike."""
    found = [{"role": "system", "content": f"You are number {number}."}]
    for turn in range(number % 3 + 1):
        found.append({"role": "user", "content": f"Question {turn}? " + "please " * (number % 7)})
        found.append({"role": "assistant", "content": f"Answer {turn}. " + "é word\n" * (number % 11) + "Done"})
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("chat-tokenizer"), "qwen2.5")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """60 conversations in one file, a third in each form."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with open(path, "w") as stream:
        for number in range(60):
            messages = messages_of(number)
            pairs = [{m["role"]: m["content"]} for m in messages]
            forms = [{"id": str(number), "messages": messages}, {"id": number, "conversation": pairs}, pairs]
            stream.write(json.dumps(forms[number % 3]) + "\n")
    return path


@pytest.fixture(scope="module")
def table(spark, chats, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "chats"
    main(["--task", "chat", "-i", str(chats), "-o", str(folder), "--tokenizer", str(tokenizer)])
    return folder


def trained_text(peer, row):
    return peer.decode([i for i in row["labels"] if i != -100])


def test_ids_and_labels_of_all_forms(table, tokenizer):
    peer = AutoTokenizer.from_pretrained(tokenizer)
    rows = rows_of(table)
    assert len(rows) == 60
    by_ids = {tuple(row["input_ids"]): row for row in rows}
    for number in range(60):
        messages = messages_of(number)
        row = by_ids[tuple(peer.apply_chat_template(messages, tokenize=True)["input_ids"])]
        answers = [m["content"] + END for m in messages if m["role"] == "assistant"]
        assert trained_text(peer, row) == "".join(answers)
        assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))
        if number % 3 < 2:
            assert row["doc_ids"] == [str(number)]
        else:
            assert len(row["doc_ids"][0]) == 32


def test_the_manifest_counts_what_is_trained_on(table):
    manifest = read_manifest(table)
    counts = manifest.lineage["counts"]
    rows = rows_of(table)
    assert manifest.lineage["parameters"]["task"] == "chat"
    assert manifest.lineage["engine"] == "fastokens"
    assert counts["documents_in"] == counts["documents_out"] == counts["rows"] == 60
    assert counts["trained_tokens"] == sum(i != -100 for row in rows for i in row["labels"])
    assert (counts["cut_conversations"], counts["dropped_tokens"], counts["with_special_strings"]) == (0, 0, 0)
    assert counts["checked"] > 0
    assert Table.open(table).columns >= {"input_ids", "labels", "doc_ids"}
    assert pq.read_schema(next(table.glob("*.parquet"))).field("labels").type.value_type == pa.int32()


def test_parquet_with_nested_columns_gives_the_same_rows(spark, table, tokenizer, tmp_path):
    pairs = [[{m["role"]: m["content"]} for m in messages_of(n)] for n in range(60)]  # absent roles become null
    whole = [messages_of(n) for n in range(60)]
    pq.write_table(pa.table({"id": list(range(60)), "messages": whole}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"conversation": pairs}), tmp_path / "b.parquet")
    expected = Counter(tuple(row["labels"]) for row in rows_of(table))
    for name in ("a", "b"):
        tokenize_table(tmp_path / f"{name}.parquet", tmp_path / name, tokenizer, task="chat")
        assert Counter(tuple(row["labels"]) for row in rows_of(tmp_path / name)) == expected
    assert {row["doc_ids"][0] for row in rows_of(tmp_path / "a")} == {str(n) for n in range(60)}


def test_the_same_conversation_has_the_same_hash_in_every_form(spark, tokenizer, tmp_path):
    messages = messages_of(1)
    path = write_lines(tmp_path / "a.jsonl", [{m["role"]: m["content"]} for m in messages], {"messages": messages})
    pq.write_table(pa.table({"messages": [messages]}), tmp_path / "b.parquet")
    tokenize_table([path, tmp_path / "b.parquet"], tmp_path / "out", tokenizer, task="chat")
    first, *others = rows_of(tmp_path / "out")
    assert others == [first, first]


def test_other_formats_are_read_by_all_readers_and_told(spark, tokenizer, tmp_path, capsys):
    pairs = [(f"Question {i}?", f"Answer {i}.") for i in range(3)]
    plain = write_lines(tmp_path / "plain.jsonl", *[[{"user": q}, {"assistant": a}] for q, a in pairs])
    sharegpt = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in pairs]
    lines = write_lines(tmp_path / "sharegpt.jsonl", *[{"conversations": turns} for turns in sharegpt])
    alpaca = {"instruction": [q for q, _ in pairs], "input": [""] * 3, "output": [a for _, a in pairs]}
    pq.write_table(pa.table(alpaca), tmp_path / "alpaca.parquet")
    frame = spark.createDataFrame(pairs, "prompt string, completion string")
    tokenize_table(plain, tmp_path / "plain", tokenizer, task="chat")
    expected = sorted(rows_of(tmp_path / "plain"), key=str)
    capsys.readouterr()
    inputs = [lines, tmp_path / "alpaca.parquet", frame]
    manifest = tokenize_table(inputs, tmp_path / "out", tokenizer, task="chat")
    assert sorted(rows_of(tmp_path / "out"), key=str) == sorted(expected * 3, key=str)
    told = "read as ShareGPT: 3 records, as Alpaca: 3 records, as prompt/completion: 3 records."
    assert told in " ".join(capsys.readouterr().err.split())
    counts = manifest.lineage["counts"]
    read = [counts[f"read_as_{name}"] for name in ("messages", "sharegpt", "alpaca", "prompt_completion")]
    assert read == [0, 3, 3, 3]
    rows = frame.transform(tokenize(tokenizer, task="chat")).collect()
    assert sorted((row.asDict() for row in rows), key=str) == expected


BAD = {
    '[{"user": "a"}, {"bot": "b"}]': "turn 2 has the unknown role 'bot'",
    '[{"user": "a"}]': "no assistant turn",
    '[{"user": 5}, {"assistant": "b"}]': r"the content of turn 1 \(user\) is int, not a string",
    "{": "not valid JSON",
}


@pytest.mark.parametrize("line", BAD)
def test_a_malformed_line_is_named(spark, tokenizer, tmp_path, line):
    path = write_lines(tmp_path / "a.jsonl", messages_of(0), line)
    with pytest.raises(UserError, match=f"a.jsonl, line 2: {BAD[line]}.*`on_error=.quarantine.`"):
        tokenize_table(path, tmp_path / "out", tokenizer, task="chat")
    assert not (tmp_path / "out").exists()


def test_a_malformed_parquet_row_is_named(spark, tokenizer, tmp_path):
    chats = [messages_of(0), [{"role": "user", "content": "a"}], None]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: no assistant turn"):
        tokenize_table(tmp_path / "a.parquet", tmp_path / "out", tokenizer, task="chat")


def test_malformed_and_empty_conversations_are_accounted_for(spark, tmp_path):
    tokenizer = save_chat_tokenizer(tmp_path / "tok", "mistral")
    twice = [{"user": "a"}, {"user": "b"}, {"assistant": "c"}]
    path = write_lines(tmp_path / "a.jsonl", [{"user": "a"}, {"assistant": "b"}], [], {"messages": []}, twice, *BAD)
    manifest = tokenize_table(path, tmp_path / "out", tokenizer, task="chat", on_error="quarantine")
    counts = manifest.lineage["counts"]
    assert (counts["documents_in"], counts["documents_out"], counts["empty"], counts["quarantined"]) == (8, 1, 2, 5)
    lines = [json.loads(x) for f in (tmp_path / "out/_quarantine").glob("*.json") for x in f.read_text().splitlines()]
    (refused,) = [line for line in lines if json.loads(line["record"] if line["record"] != "{" else "0") == twice]
    assert "the chat template refuses it: roles must alternate" in refused["reason"]


def test_long_chats_are_cut_between_turns_and_counted(spark, table, chats, tokenizer, tmp_path, capsys):
    peer = AutoTokenizer.from_pretrained(tokenizer)
    max_len = max(len(peer.apply_chat_template(messages_of(n)[:3])["input_ids"]) for n in range(60))  # any one round
    manifest = tokenize_table(chats, tmp_path / "out", tokenizer, task="chat", max_len=max_len)
    counts, rows, whole = manifest.lineage["counts"], rows_of(tmp_path / "out"), rows_of(table)
    longer = [row for row in whole if len(row["input_ids"]) > max_len]
    assert manifest.seq_len == max_len
    assert counts["documents_out"] == 60 < counts["rows"]
    assert counts["cut_conversations"] == len(longer) > 0
    assert counts["tokens"] + counts["dropped_tokens"] == read_manifest(table).tokens
    assert counts["trained_tokens"] == read_manifest(table).lineage["counts"]["trained_tokens"]
    assert "were cut" in capsys.readouterr().err
    starts = Counter(peer.decode(row["input_ids"][:9]).split("\n")[0] for row in rows)
    assert set(starts) == {"<|im_start|>system", "<|im_start|>user"}
    assert counts["dropped_tokens"] == 0
    for row in rows:
        assert len(row["input_ids"]) <= max_len
        assert any(label != -100 for label in row["labels"])
        assert trained_text(peer, row).endswith(END)


def pieces_of(rows):
    """(doc id, ids, labels) of every document of packed or plain rows, as a multiset."""
    found = Counter()
    for row in rows:
        bounds = row.get("cu_seqlens") or [0, len(row["input_ids"])]
        assert len(row["doc_ids"]) == len(bounds) - 1
        for name, a, b in zip(row["doc_ids"], bounds[:-1], bounds[1:], strict=True):
            found[name, tuple(row["input_ids"][a:b]), tuple(row["labels"][a:b])] += 1
    return found


def test_labels_survive_shuffling_and_packing(spark, table, tmp_path):
    expected = pieces_of(rows_of(table))
    shuffle_tables(table, tmp_path / "shuffled", num_block=2)
    assert pieces_of(rows_of(tmp_path / "shuffled")) == expected
    longest = max(len(row["input_ids"]) for row in rows_of(table))
    repartition_table(tmp_path / "shuffled", tmp_path / "packed", max_len=longest, num_partition=2)
    packed = rows_of(tmp_path / "packed")
    assert len(packed) < 60
    assert pieces_of(packed) == expected
    repartition_table(tmp_path / "shuffled", tmp_path / "concat", max_len=64, num_partition=2, pack="concat")
    whole = {name: (ids, labels) for name, ids, labels in expected}
    for name, ids, labels in pieces_of(rows_of(tmp_path / "concat")):
        at = next(i for i in range(len(whole[name][0])) if whole[name][0][i : i + len(ids)] == ids)
        assert any(
            whole[name][0][i : i + len(ids)] == ids and whole[name][1][i : i + len(ids)] == labels
            for i in range(at, len(whole[name][0]))
        )


def test_a_chat_and_a_text_table_mix(spark, table, tmp_path, tokenizer):
    text = write_lines(tmp_path / "a.jsonl", {"id": "t", "text": "plain text"})
    tokenize_table(text, tmp_path / "text", tokenizer)
    shuffle_tables([table, tmp_path / "text"], tmp_path / "out", num_block=1)
    (row,) = [row for row in rows_of(tmp_path / "out") if row["doc_ids"] == ["t"]]
    assert row["labels"] == row["input_ids"]


def test_the_same_chats_give_the_same_files(spark, chats, tokenizer, table, tmp_path):
    tokenize_table(chats, tmp_path / "again", tokenizer, task="chat")
    assert hashes_of(tmp_path / "again") == hashes_of(table)


def test_flags_and_files_of_the_other_task_are_refused(spark, chats, tokenizer, tmp_path):
    def fails(match, path=chats, **options):
        with pytest.raises(UserError, match=match):
            tokenize_table(path, tmp_path / "out", tokenizer, task="chat", **options)
        assert not (tmp_path / "out").exists()

    fails('`eos` is for `task="pretrain"`', eos="never")
    fails('`text_key` is for `task="pretrain"`', text_key="body")
    fails('`parse_special_tokens` is for `task="pretrain"`', parse_special_tokens=True)
    (tmp_path / "a.txt").write_text("text")
    fails("holds plain text", tmp_path / "a.txt")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    fails("has no column messages or conversation", tmp_path / "a.parquet")
    pq.write_table(pa.table({"messages": ["a"]}), tmp_path / "b.parquet")
    fails("column messages is string, it must be an array", tmp_path / "b.parquet")


@pytest.fixture(scope="module")
def python_tokenizer(tmp_path_factory):
    """A tokenizer of transformers without tokenizer.json: one id a byte."""
    folder = tmp_path_factory.mktemp("byt5")
    style = STYLES["qwen2.5"]
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=list(style.special))
    tokenizer.chat_template = style.template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_written_in_python_encodes_texts(spark, python_tokenizer, tmp_path, capsys):
    texts = ["plain", f"é {END} </s> x", ""]
    path = write_lines(tmp_path / "a.jsonl", *({"id": str(i), "text": text} for i, text in enumerate(texts)))
    peer = AutoTokenizer.from_pretrained(python_tokenizer)
    assert not peer.is_fast
    for flag in (False, True):
        manifest = tokenize_table(path, tmp_path / f"{flag}", python_tokenizer, parse_special_tokens=flag)
        found = {row["doc_ids"][0]: row["input_ids"] for row in rows_of(tmp_path / f"{flag}")}
        assert found == {
            str(i): peer(text, split_special_tokens=not flag)["input_ids"] for i, text in enumerate(texts[:2])
        }
        assert manifest.lineage["engine"].startswith("transformers")
        assert manifest.lineage["counts"]["empty"] == 1
        assert manifest.tokenizer.vocab_size == len(peer)
    assert "warning: ids were made by Hugging Face transformers" in capsys.readouterr().err


def test_a_tokenizer_written_in_python_encodes_chats(spark, python_tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *(messages_of(n) for n in range(6)))
    tokenize_table(path, tmp_path / "out", python_tokenizer, task="chat")
    peer = AutoTokenizer.from_pretrained(python_tokenizer)
    rows = {tuple(row["input_ids"]): row for row in rows_of(tmp_path / "out")}
    for number in range(6):
        row = rows[tuple(peer.apply_chat_template(messages_of(number))["input_ids"])]
        answers = [m["content"] + END for m in messages_of(number) if m["role"] == "assistant"]
        assert trained_text(peer, row) == "".join(answers)
