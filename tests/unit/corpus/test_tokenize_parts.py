"""Records of files to parts, without Spark: every form of a record reads alike, and each is accounted for."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spark.chat_templates import save_chat_tokenizer
from spark.helpers import save_tokenizer
from transformers import AutoTokenizer

from fft.corpus.accounts import document_counts, finished_manifest, lineage_of, notes_on
from fft.corpus.files import find_sources, spans_of
from fft.corpus.splits import deal
from fft.corpus.tokenize_parts import PartTokenizer
from fft.data.part_files import PartFile, PartFolder, RejectFile
from fft.data.worker_notes import WorkerNotes
from fft.errors import UserError
from fft.text.chat import load_chat
from fft.text.encoder import Encoder
from fft.text.pretrain import load_pretrain
from fft.text.records import Keys

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BROKEN = b"\xff\xfe"


@pytest.fixture(scope="module")
def terse(tmp_path_factory):
    """The chat task by a template that renders tools."""
    folder = save_chat_tokenizer(tmp_path_factory.mktemp("terse"), "terse")
    return load_chat(folder, "id", None)[0], AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The pretrain task."""
    folder = save_tokenizer(tmp_path_factory.mktemp("texts"), ["plain text"])
    return load_pretrain(folder, Keys(), None, "auto", False)[0]


def tokenize(path: Path, encoder, folder: Path, quarantine: bool = True):
    """(rows, counts, notes, records set aside) of one file as one part."""
    folder.mkdir()
    (folder / "_quarantine").mkdir()
    target = PartFolder(folder, WorkerNotes(str(folder)))
    splits = deal(spans_of(find_sources([path]), encoder))
    with PartFile(target, 0) as sink, RejectFile(target, 0) as rejects:
        part = PartTokenizer(encoder, Encoder(encoder.recipe), sink, rejects if quarantine else None)
        for split in splits:
            part.add_split(split)
        done = part.finish(rejects.finish())
    counts = document_counts(part.tallies, [str(path)], encoder)
    lineage = {**lineage_of("tokenize", [{"input": str(path)}], {}), "engine": "fastokens"}
    manifest = finished_manifest([done], lineage, counts, {"seconds": 1.0}, None, None)
    rows = pq.read_table(folder / done.name).to_pylist() if done.name else []
    aside = [json.loads(line) for file in (folder / "_quarantine").iterdir() for line in file.read_text().splitlines()]
    return rows, counts, notes_on(manifest, encoder), aside


def invalid(*values: bytes) -> pa.StringArray:
    """A string column with bytes that are no UTF-8, as some writers leave them."""
    data = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(data), data.buffers()[1], data.buffers()[2])


def chats_of(contents: pa.Array) -> pa.ListArray:
    """A question and an answer per content, which is both."""
    doubled = contents.take(pa.array([i for i in range(len(contents)) for _ in range(2)]))
    turns = pa.StructArray.from_arrays([pa.array(["user", "assistant"] * len(contents)), doubled], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(0, 2 * len(contents) + 1, 2), pa.int32()), turns)


def test_a_column_of_tools_is_read_as_in_json_lines(terse, tmp_path):
    chat, peer = terse
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}, {"type": "g"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS, "tools": tools}) + "\n")
    pq.write_table(pa.table({"messages": [TURNS], "tools": [tools]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"messages": [TURNS], "tools": [json.dumps(tools)]}), tmp_path / "c.parquet")
    expected = peer.apply_chat_template(TURNS, tools=tools)["input_ids"]
    found = [tokenize(tmp_path / name, chat, tmp_path / name[0])[0] for name in ("a.jsonl", "b.parquet", "c.parquet")]
    assert [rows[0]["input_ids"] for rows in found] == [expected] * 3
    assert found[0] == found[1] == found[2]


CALL = {"function": {"name": "f", "arguments": {"a": 1}}, "type": "function", "id": "1"}
FORMATS = {
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": None},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}], "system": "e"},
    ],
    "alpaca": [
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "text": "no key of it"},
        {"instruction": "a", "input": None, "output": "c", "history": None, "text": None},
    ],
    "prompt and completion": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}],
    "their turns": [{"prompt": TURNS, "completion": TURNS[-1:]}],
    "parts": [{"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]}],
    "two of them": [
        {"messages": TURNS, "instruction": None, "output": None},
        {"messages": None, "instruction": "a", "output": "b"},
    ],
    "calls": [
        {"messages": [*TURNS[:-1], {"role": "assistant", "content": None, "tool_calls": [CALL]}, TURNS[-1]]},
        {"messages": TURNS},
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_all_formats_are_read_as_in_json_lines(name, tmp_path):
    folder = save_chat_tokenizer(tmp_path / "tokenizer", "hermes")
    chat = load_chat(folder, "id", None)[0]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in FORMATS[name]))
    pq.write_table(pa.Table.from_pylist(FORMATS[name]), tmp_path / "b.parquet")
    lines, columns = (tokenize(tmp_path / file, chat, tmp_path / file[0]) for file in ("a.jsonl", "b.parquet"))
    assert lines[0] == columns[0]
    assert len(lines[0]) == len(FORMATS[name])
    read = {key: count for key, count in columns[1].items() if key.startswith("read_as") and count}
    assert sum(read.values()) == len(FORMATS[name])
    assert read == {key: count for key, count in lines[1].items() if key.startswith("read_as") and count}
    assert any(note.startswith("note: read as ") for note in columns[2])
    assert ("text" in columns[1]["unused_keys"]) is (name == "alpaca")


def test_columns_of_no_format_say_what_makes_one(terse, tmp_path):
    pq.write_table(pa.table({"instruction": ["a"], "the answer": ["b"], "response": ["c"]}), tmp_path / "a.parquet")
    said = r'no column messages or .*: df.selectExpr\("instruction AS prompt", "response AS completion"\) makes one'
    with pytest.raises(UserError, match=said):
        tokenize(tmp_path / "a.parquet", terse[0], tmp_path / "out")


def test_maps_read_as_objects(terse, tmp_path):
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    maps = pa.array([[list(turn.items()) for turn in TURNS], [[("user", "a"), ("user", "b")]]], kind)
    pq.write_table(pa.table({"messages": maps}), tmp_path / "a.parquet")
    (row,), counts, _, aside = tokenize(tmp_path / "a.parquet", terse[0], tmp_path / "out")
    assert row["input_ids"] == terse[1].apply_chat_template(TURNS)["input_ids"]
    assert counts["quarantined"] == 1
    assert aside[0]["reason"].startswith("turn 1 is list")


def test_contents_that_are_no_text_are_refused_by_name(terse, tmp_path):
    turns = [{"role": "user", "content": b"a"}, {"role": "assistant", "content": b"b"}]
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column messages\.content is binary, which is no text: cast it"):
        tokenize(tmp_path / "a.parquet", terse[0], tmp_path / "out")


def test_bytes_that_are_no_utf8_make_a_record_malformed_wherever_they_are(terse, texts, tmp_path):
    pq.write_table(pa.table({"messages": chats_of(invalid(b"a", BROKEN, b"\xc3\xa9"))}), tmp_path / "a.parquet")
    rows, counts, _, aside = tokenize(tmp_path / "a.parquet", terse[0], tmp_path / "chats")
    assert [terse[1].decode([i for i in row["labels"] if i >= 0]) for row in rows] == ["a<|im_end|>", "é<|im_end|>"]
    assert counts["quarantined"] == 1
    assert aside[0]["reason"].startswith("not valid UTF-8 at byte")
    table = {"id": invalid(b"1", BROKEN, b"3"), "text": invalid(b"one", b"two", BROKEN)}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    rows, counts, _, aside = tokenize(tmp_path / "b.parquet", texts, tmp_path / "texts")
    assert [row["doc_ids"] for row in rows] == [["1"]]
    assert [line["reason"].split(" at ")[0] for line in aside] == ["its id is not valid UTF-8", "not valid UTF-8"]
    with pytest.raises(UserError, match="malformed record"):
        tokenize(tmp_path / "b.parquet", texts, tmp_path / "fails", quarantine=False)
    with PartFile(PartFolder(tmp_path, WorkerNotes(str(tmp_path))), 0) as sink:
        part = PartTokenizer(texts, Encoder(texts.recipe), sink, None)
        with pytest.raises(UserError, match=r"a DataFrame, id \\udcff\\udcfe: its id is not valid UTF-8") as raised:
            part.add(list(texts.rows(pa.record_batch(table))), "parquet", "a DataFrame", "a DataFrame", numbered=False)
    str(raised.value).encode()


def test_two_columns_of_one_name_are_refused(terse, texts, tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has more than one column text: rename"):
        tokenize(tmp_path / "a.parquet", texts, tmp_path / "out")


def test_keys_and_columns_that_nothing_uses_are_told(terse, texts, tmp_path):
    lines = [{"text": "a", "id": 1, "url": "u"}, {"text": "b", "url": None, "lang": "en"}, {"text": "c", "url": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts, notes = tokenize(tmp_path / "a.jsonl", texts, tmp_path / "a")[1:3]
    assert counts["unused_keys"] == {"lang": 1, "url": 2}
    assert any("lang (1), url (2)" in note for note in notes)
    pq.write_table(pa.table({"text": ["a", "b"], "url": ["u", None]}), tmp_path / "b.parquet")
    assert tokenize(tmp_path / "b.parquet", texts, tmp_path / "b")[1]["unused_keys"] == {"url": 2}
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": TURNS, "source": "web"}) + "\n")
    assert tokenize(tmp_path / "c.jsonl", terse[0], tmp_path / "c")[1]["unused_keys"] == {"source": 1}


def test_a_byte_order_mark_is_dropped_from_texts_and_json_lines_alike(texts, tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffplain\n\ntext", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "plain"}\n{"text": "text"}\n', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "plain"}\n{"text": "text"}\n', encoding="utf-8")
    found = [tokenize(tmp_path / name, texts, tmp_path / name[0])[0] for name in ("a.txt", "b.jsonl", "c.jsonl")]
    assert found[0] == found[1] == found[2]
