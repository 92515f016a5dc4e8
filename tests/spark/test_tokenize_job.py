"""The tokenize job: exact ids, every kind of input, honest accounts."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fft.data.manifest import read_manifest
from fft.data.table import Table
from fft.errors import UserError
from fft.text import encoder
from spark.helpers import END, rows_of, save_tokenizer, write_lines
from spark_jobs import tokenize_table
from spark_jobs.cli import run_tokenize as main


def ids_by_name(table):
    return {row["doc_ids"][0]: row["input_ids"] for row in rows_of(table)}


def test_ids_equal_those_of_transformers(tokens, documents, tokenizer):
    peer = AutoTokenizer.from_pretrained(tokenizer)
    expected = {d["id"]: [*peer(d["text"])["input_ids"], peer.eos_token_id] for d in documents}
    assert ids_by_name(tokens) == expected


def test_the_manifest_says_what_was_done(tokens, documents, tokenizer, corpus):
    manifest = read_manifest(tokens)
    counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
    assert manifest.lineage["job"] == "tokenize"
    assert manifest.lineage["inputs"] == [str(corpus)]
    assert manifest.lineage["parameters"]["eos"] == "auto"
    assert counts["documents_in"] == counts["documents_out"] == manifest.rows == len(documents)
    assert counts["checked"] > 0
    assert timing["tokens_per_second"] > 0
    assert manifest.lineage["engine"] == "fastokens"
    assert manifest.tokens == sum(f.tokens for f in manifest.files) == sum(len(r["input_ids"]) for r in rows_of(tokens))
    assert manifest.tokenizer.eos_token_id == 0
    assert manifest.tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(tokenizer))
    assert Table.open(tokens).tokens == manifest.tokens
    assert pq.read_schema(next(tokens.glob("*.parquet"))).field("input_ids").type == pa.list_(
        pa.field("element", pa.int32())
    )


def test_special_token_strings_are_text_unless_asked_for(spark, tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"id": "x", "text": f"before {END} after"})
    peer = AutoTokenizer.from_pretrained(tokenizer)
    for flag in (False, True):
        tokenize_table(path, tmp_path / str(flag), tokenizer, parse_special_tokens=flag, eos="never")
        (row,) = rows_of(tmp_path / str(flag))
        assert row["input_ids"] == peer(f"before {END} after", split_special_tokens=not flag)["input_ids"]
        assert (peer.eos_token_id in row["input_ids"]) == flag


def test_a_beginning_token_comes_from_the_post_processor(spark, documents, tmp_path):
    folder = save_tokenizer(tmp_path / "tok", [documents[0]["text"]], begin="<s>")
    path = write_lines(tmp_path / "a.jsonl", {"id": "x", "text": "def f(): pass"})
    tokenize_table(path, tmp_path / "out", folder, max_len=1000)
    peer = AutoTokenizer.from_pretrained(folder)
    (row,) = rows_of(tmp_path / "out")
    assert row["input_ids"] == [*peer("def f(): pass")["input_ids"], peer.eos_token_id]
    assert row["input_ids"][0] == peer.bos_token_id
    assert read_manifest(tmp_path / "out").seq_len == 1000


def test_a_tokenizer_that_fastokens_cannot_load_is_used_through_hugging_face(spark, tmp_path, capsys):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "tok")
    path = write_lines(tmp_path / "a.jsonl", {"text": "a b a"}, {"text": "b c"})
    manifest = tokenize_table(path, tmp_path / "out", tmp_path / "tok")
    assert [row["input_ids"] for row in rows_of(tmp_path / "out")] == [[1, 2, 1], [2, 0]]
    assert manifest.lineage["engine"].startswith("tokenizers: fastokens cannot load")
    assert capsys.readouterr().err.count("warning:") == 1


def test_ids_do_not_depend_on_how_texts_are_dealt_to_tasks(spark, tmp_path):
    pattern = r"[^\r\n\p{L}\p{N}]?+\p{L}+| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    model = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    model.pre_tokenizer = pre_tokenizers.Sequence(splits)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        ["a  b   c"] * 9, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path / "tok")
    texts = [f"a  \u180e{i}" if i % 5 == 3 else f"plain  {i}" for i in range(40)]
    lines = [{"id": i, "text": text} for i, text in enumerate(texts)]
    one = write_lines(tmp_path / "one.jsonl", *lines)
    many = [write_lines(tmp_path / f"{i}.jsonl", line) for i, line in enumerate(lines)]
    peer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    for name, inputs in {"one": one, "many": many, "frame": spark.createDataFrame(lines).repartition(7)}.items():
        manifest = tokenize_table(inputs, tmp_path / name, tmp_path / "tok")
        found = {int(row["doc_ids"][0]): row["input_ids"] for row in rows_of(tmp_path / name)}
        assert found == {i: peer.encode(text) for i, text in enumerate(texts)}
        assert manifest.lineage["engine"] == "fastokens"


def test_surround():
    ids, offsets = encoder.surround(np.array([5, 6, 7], np.int32), np.array([0, 2, 2, 3]), (1, 2), (9,))
    assert ids.tolist() == [1, 2, 5, 6, 9, 1, 2, 9, 1, 2, 7, 9]
    assert offsets.tolist() == [0, 5, 8, 12]


def test_all_kinds_of_files(spark, tokenizer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    line = json.dumps({"id": "gz", "text": "zipped"}).encode() + b"\n"
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(line))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(line.replace(b"gz", b"zst")))
    (folder / "c.txt").write_bytes(b"one\nstill one\n\ntwo\n\n\n\nthree\r\n \r\nfour\n")
    pq.write_table(pa.table({"id": [7, 8], "text": ["seven", "eight"]}), folder / "d.parquet")
    (folder / "README.md").write_text("not data")
    manifest = tokenize_table(folder, tmp_path / "out", tokenizer)
    peer = AutoTokenizer.from_pretrained(tokenizer)
    found = {peer.decode(row["input_ids"][:-1]): row["doc_ids"][0] for row in rows_of(tmp_path / "out")}
    assert set(found) == {"zipped", "one\nstill one", "two", "three", "four", "seven", "eight"}
    assert found["seven"] == "7"
    assert len(found["two"]) == 32  # a hash of the text
    assert manifest.lineage["counts"]["documents_in"] == 8


def test_documents_without_id_get_the_same_hash_everywhere(spark, tokenizer, tmp_path):
    for name in ("a", "b"):
        tokenize_table(write_lines(tmp_path / f"{name}.jsonl", {"text": "same"}), tmp_path / name, tokenizer)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


BAD_LINES = {
    "not json": "not valid JSON",
    '{"txt": "a"}': "key text is missing",
    '{"text": 5}': "key text is int, not a string",
    '["text"]': "not a JSON object but list",
    '{"text": "\\ud800"}': "a lone surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_malformed_line_is_named(spark, tokenizer, tmp_path, line):
    path = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(UserError, match=f"a.jsonl, line 3: {BAD_LINES[line]}.*`on_error=.quarantine.`"):
        tokenize_table(path, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_malformed_records_are_set_aside_and_every_record_is_accounted_for(spark, tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": ""}, *BAD_LINES, {"text": "two"})
    with open(path, "ab") as stream:
        stream.write(b'{"text": "\xff"}\n')
    pq.write_table(pa.table({"text": ["x", None, ""]}), tmp_path / "b.parquet")
    inputs = [path, tmp_path / "b.parquet"]
    with pytest.raises(UserError, match=r"a\.jsonl, line 3"):
        tokenize_table(path, tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match=r"b\.parquet, row 2: text is null"):
        tokenize_table(inputs[1], tmp_path / "out", tokenizer)
    manifest = tokenize_table(inputs, tmp_path / "out", tokenizer, on_error="quarantine")
    counts = manifest.lineage["counts"]
    assert (counts["documents_in"], counts["documents_out"], counts["empty"], counts["quarantined"]) == (12, 3, 2, 7)
    lines = [json.loads(x) for f in (tmp_path / "out/_quarantine").glob("*.json") for x in f.read_text().splitlines()]
    assert len(lines) == 7
    assert any("not valid UTF-8 at byte 10" in line["reason"] for line in lines)
    assert {line["record"] for line in lines} >= {"not json", '{"text": 5}'}
    assert Table.open(tmp_path / "out").rows == 3


def test_what_is_longer_than_a_document_may_be_is_named_and_taken_where_more_may(spark, tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("short\n\n" + "a line\n" * 20)
    lines = write_lines(tmp_path / "a.jsonl", {"text": "short"}, {"text": "a line " * 20}, "not json")
    told = r"a\.(txt|jsonl) has a document of 100 bytes or more, which begins at byte \d+ of .* with a larger {}\.$"
    for path in (tmp_path / "a.txt", lines):
        with pytest.raises(UserError, match=told.format("`max_document_bytes`")):
            tokenize_table(path, tmp_path / "out", tokenizer, max_document_bytes=100, on_error="quarantine")
        given = ["-i", path, "-o", tmp_path / "out", "--max_document_bytes", 100, "--tokenizer", tokenizer]
        with pytest.raises(UserError, match=told.format("--max_document_bytes")):
            main(list(map(str, given)))
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not valid JSON"):  # found again by the driver
        tokenize_table(lines, tmp_path / "out", tokenizer, max_document_bytes=200)
    assert tokenize_table(tmp_path / "a.txt", tmp_path / "out", tokenizer, max_document_bytes=2**63 - 1).rows == 2


def test_long_documents_are_cut_only_when_asked(spark, tokenizer, documents, tmp_path):
    longest = max(documents, key=lambda d: len(d["text"]))
    path = write_lines(tmp_path / "a.jsonl", longest)
    tokenize_table(path, tmp_path / "whole", tokenizer)
    (whole,) = rows_of(tmp_path / "whole")
    manifest = tokenize_table(path, tmp_path / "cut", tokenizer, max_len=100)
    rows = rows_of(tmp_path / "cut")
    assert [i for row in rows for i in row["input_ids"]] == whole["input_ids"]
    assert {len(row["input_ids"]) for row in rows[:-1]} == {100}
    assert {row["doc_ids"][0] for row in rows} == {longest["id"]}
    assert manifest.lineage["counts"]["documents_out"] == 1


def test_what_is_no_input_is_refused_in_one_sentence(spark, tokenizer, corpus, tmp_path):
    def fails(match, *args, path=corpus, output=tmp_path / "out", tok=tokenizer):
        with pytest.raises(UserError, match=match):
            main(["-i", str(path), "-o", str(output), "--tokenizer", str(tok), *args])
        assert not (tmp_path / "out").exists()

    fails("missing.jsonl does not exist", path=tmp_path / "missing.jsonl")
    fails("is not a folder", tok=tmp_path / "none")
    (tmp_path / "hollow").mkdir()
    fails("holds no tokenizer", tok=tmp_path / "hollow")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{}")
    fails("cannot be loaded", tok=tmp_path / "broken")
    fails("holds no documents: no file there", path=tmp_path / "hollow")
    fails("0 are empty and 0 malformed", path=write_lines(tmp_path / "blank.jsonl", "", ""))
    fails("2 are empty and 0 malformed", path=write_lines(tmp_path / "e.jsonl", {"text": ""}, {"text": ""}))
    (tmp_path / "x.csv").write_text("a")
    fails("is of no known kind", path=tmp_path / "x.csv")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "n.parquet")
    fails("column text is int64", path=tmp_path / "n.parquet")
    fails("has no column body", "--text_key", "body", path=tmp_path / "n.parquet")
    fails("overlap", output=corpus.parent)


def test_files_that_are_not_whole_are_named(spark, tokenizer, corpus, tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes())[:5000])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 garbage PAR1")
    for name in ("cut.jsonl.gz", "bad.parquet"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            tokenize_table(tmp_path / name, tmp_path / "out", tokenizer)
        assert not (tmp_path / "out").exists()


def test_flags_of_images_that_mean_nothing_are_refused_by_name(tokenizer, corpus, tmp_path):
    flags = ["-i", str(corpus), "-o", str(tmp_path / "o"), "--tokenizer", str(tokenizer)]
    for more, reason in (
        (["--image_path", str(tmp_path)], "--image_path is for --task chat: texts have no images"),
        (["--max_pixels", "9"], "--max_pixels is a limit of images: give --image_path"),
        (["--task", "chat", "--image_path", str(tmp_path / "none")], "none is no folder: give the one in which"),
    ):
        with pytest.raises(UserError, match=reason):
            main([*flags, *more])
