"""Converted tokenizers give the ids of the libraries that the published ones are made with: tiktoken, sentencepiece."""

import base64
import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from originals import PATTERN, strings, write_config, write_pieces, write_ranks
from sentencepiece import sentencepiece_model_pb2

from fft.errors import UserError
from fft.serve.prompts import load_model_tokenizer
from fft.text import convert_tokenizer
from fft.text.chat_template import load_chat_template
from fft.text.encoder import load_tokenizer

#: 10,000 in each case were compared once.
STRINGS = 600


def converted(original: Path, folder: Path):
    convert_tokenizer.main([str(original), str(folder)])
    return load_tokenizer(folder)


def pieces_ids(original: Path, texts: list[str]) -> list[list[int]]:
    return sentencepiece.SentencePieceProcessor(model_file=str(original / "tokenizer.model")).encode(texts)


def as_text(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts in which special tokens have no meaning."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def same(ours: list, theirs: list, texts: list[str]) -> None:
    wrong = [(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not wrong, (len(wrong), wrong[:3])


RESERVED = ["<reserved_106>", "<reserved_107>"]
KINDS = {
    "plain": {"add_dummy_prefix": False},
    "space": {"add_dummy_prefix": True},
    "unknown": {"add_dummy_prefix": False, "byte_fallback": False},
    "unknown-space": {"add_dummy_prefix": True, "byte_fallback": False},
    "defined": {
        "add_dummy_prefix": False,
        "user_defined_symbols": [*RESERVED, "def", "  ", "▁▁▁"],
    },
    "defined-space": {
        "add_dummy_prefix": True,
        "user_defined_symbols": [*RESERVED, "))(", "▁▁"],
    },
    "control": {"add_dummy_prefix": False, "control_symbols": ["<reserved_106>", "<pad>"]},
    "split-digits": {"add_dummy_prefix": False, "split_digits": True, "allow_whitespace_only_pieces": True},
    "whole-lines": {"add_dummy_prefix": True, "split_by_whitespace": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_sentencepiece(tmp_path, kind):
    original = write_pieces(tmp_path / "original", "BaichuanTokenizer", **KINDS[kind])
    tokenizer = converted(original, tmp_path / "out")
    names = [] if kind == "defined-space" else ["<s>", "</s>", "<unk>", "<0x0A>"]
    texts = strings(STRINGS, 1, [*RESERVED, "))(", "def", *names])
    theirs = pieces_ids(original, texts)
    same(as_text(tokenizer, texts), theirs, texts)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(original / "tokenizer.model"))
    if KINDS[kind].get("byte_fallback", True):
        same(tokenizer.batch_decode(theirs, skip_special_tokens=False), processor.decode(theirs), texts)


def test_a_piece_that_is_a_nul_is_never_found_as_in_sentencepiece(tmp_path):
    """InternLM2 has one."""
    original = write_pieces(tmp_path / "original", "InternLM2Tokenizer", add_dummy_prefix=False)
    model = sentencepiece_model_pb2.ModelProto.FromString((original / "tokenizer.model").read_bytes())
    piece = model.pieces.add()
    piece.piece, piece.score, piece.type = "\0", -5000.0, 1
    (original / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer = converted(original, tmp_path / "out")
    assert len(tokenizer) == 1201
    texts = ["a\0b", "\0\0", "\\0", *strings(100, 4, ["\0"])]
    same(as_text(tokenizer, texts), pieces_ids(original, texts), texts)


def test_ranks_have_the_ids_of_tiktoken(tmp_path):
    original = write_ranks(tmp_path / "original")
    tokenizer = converted(original, tmp_path / "out")
    lines = (original / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {"<|endoftext|>": 1500, "<|im_start|>": 1501, "<|im_end|>": 1502, "<|extra_204|>": 1707}
    theirs = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    texts = strings(STRINGS, 2, [*special, "<|im_start", "|>"])
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    same(as_text(tokenizer, texts), [theirs.encode(text, disallowed_special=()) for text in normal], texts)
    parsed = tokenizer(texts, add_special_tokens=False)["input_ids"]
    same(parsed, [theirs.encode(text, allowed_special="all") for text in normal], texts)
    same(tokenizer.batch_decode(parsed), normal, texts)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 1500 + 208


def test_tokens_that_a_config_renames_have_their_new_names(tmp_path):
    unused = [f"[UNUSED_TOKEN_{i}]" for i in range(4)]
    original = write_pieces(
        tmp_path / "original", "InternLM2Tokenizer", add_dummy_prefix=False, user_defined_symbols=unused
    )
    names = {"3": "<|plugin|>", "4": "<|im_end|>", "5": "<|im_start|>"}
    special = {i: {"content": name, "special": True} for i, name in names.items()}
    write_config(original, {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": special})
    tokenizer = converted(original, tmp_path / "out")
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [1, 5, *pieces_ids(original, ["a"])[0], 4]
    assert tokenizer.convert_ids_to_tokens([3, 6]) == ["<|plugin|>", "[UNUSED_TOKEN_3]"]
    texts = [text for text in strings(STRINGS, 3, ["<|im_start|>", "[UNUSED_TOKEN_3]"]) if "<|" not in text]
    same(as_text(tokenizer, texts), pieces_ids(original, texts), texts)


def test_two_tokens_of_one_name_are_refused(tmp_path):
    named = {"added_tokens_decoder": {"300": {"content": "</s>", "special": True}}}
    original = write_pieces(tmp_path / "original", "InternLM2Tokenizer", config=named)
    with pytest.raises(UserError, match="have one name"):
        convert_tokenizer.convert_tokenizer(original)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": ["<s>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "x"}}}),
        ("tokenizer_config.json", {"eos_token": "<nowhere>"}),
        ("added_tokens.json", {"<new>": 9000}),
        ("added_tokens.json", {"<new>": "last"}),
        ("generation_config.json", {"user_token_id": "two"}),
        ("generation_config.json", [1]),
    ],
)
def test_settings_of_other_forms_are_refused(tmp_path, file, settings):
    original = write_pieces(tmp_path / "original", "BaichuanTokenizer", size=700)
    given = settings if file != "tokenizer_config.json" else {"tokenizer_class": "BaichuanTokenizer", **settings}
    (original / file).write_text(json.dumps(given))
    with pytest.raises(UserError):
        convert_tokenizer.convert_tokenizer(original)


def test_tokens_that_are_added_behind_the_vocabulary_are_kept(tmp_path):
    original = write_pieces(tmp_path / "original", "BaichuanTokenizer", size=700, add_dummy_prefix=False)
    (original / "added_tokens.json").write_text(json.dumps({"<new>": 700, "<newer>": 701}))
    tokenizer = converted(original, tmp_path / "out")
    assert tokenizer("<newer>a<new>", add_special_tokens=False).input_ids == [701, *pieces_ids(original, ["a"])[0], 700]


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def test_a_family_s_chat_template_is_supplied_where_none_is_published(tmp_path):
    qwen = converted(write_ranks(tmp_path / "qwen"), tmp_path / "1")
    said = qwen.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turns = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    assert said == system + turns + "<|im_start|>assistant\n"
    reserved = [f"<reserved_{i}>" for i in range(3)]
    original = write_pieces(
        tmp_path / "b",
        "BaichuanTokenizer",
        add_dummy_prefix=False,
        user_defined_symbols=reserved,
        config={"add_bos_token": False},
    )
    (original / "generation_config.json").write_text(json.dumps({"user_token_id": 4, "assistant_token_id": 5}))
    baichuan = converted(original, tmp_path / "2")
    ids = baichuan.apply_chat_template(
        [{"role": "system", "content": "s"}, *TALK], add_generation_prompt=True, return_dict=False
    )
    s, a, b, c = pieces_ids(original, ["s", "a", "b", "c"])
    assert ids == [*s, 4, *a, 5, *b, 2, 4, *c, 5]
    with pytest.raises(Exception, match="a system message must be the first"):
        baichuan.apply_chat_template([*TALK, {"role": "system", "content": "s"}])
    # What of a conversation is trained on is found in them.
    for tokenizer in (qwen, baichuan):
        found = load_chat_template(tokenizer, "given").locate([*TALK, {"role": "assistant", "content": "d"}])
        end = "<|im_end|>" if tokenizer is qwen else "</s>"
        assert [found.text[turn.start : turn.end] for turn in found.turns] == [f"b{end}", f"d{end}"]
    intern = converted(write_pieces(tmp_path / "i", "InternLM2Tokenizer", add_dummy_prefix=False), tmp_path / "3")
    assert intern.apply_chat_template(TALK, tokenize=False) == "<s>" + turns


def test_a_published_chat_template_is_kept(tmp_path):
    original = write_ranks(tmp_path / "original")
    write_config(original, {"tokenizer_class": "QWenTokenizer", "chat_template": "{{ messages[0]['content'] }}"})
    assert converted(original, tmp_path / "out").apply_chat_template(TALK, tokenize=False) == "a"


REFUSED = {
    "has a normalizer other than identity": {"normalization_rule_name": "nmt_nfkc"},
    "removes extra spaces": {"remove_extra_whitespaces": True},
    "is no BPE": {"model_type": "unigram"},
    "puts spaces behind words": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_exactly_is_refused(tmp_path, what):
    original = write_pieces(tmp_path / "original", "BaichuanTokenizer", **REFUSED[what])
    with pytest.raises(UserError, match=what):
        convert_tokenizer.main([str(original), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_who_reads_a_tokenizer_says_that_it_is_to_be_converted(tmp_path):
    original = write_ranks(tmp_path / "original")
    for read, flag in ((load_tokenizer, "`tokenizer`"), (load_model_tokenizer, "--model")):
        with pytest.raises(UserError, match=f"{flag} .*convert it by python -m fft.text.convert_tokenizer"):
            read(original)


def test_files_that_are_damaged_are_refused_or_read(tmp_path):
    draw, counts = random.Random(0), Counter()
    originals = [write_ranks(tmp_path / "r", 300), write_pieces(tmp_path / "p", "InternLM2Tokenizer", size=700)]
    files = [originals[0] / "qwen.tiktoken", originals[1] / "tokenizer.model"]
    for _ in range(150):
        for original, file in zip(originals, files, strict=True):
            whole = file.read_bytes()
            damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
            for _ in range(draw.randint(1, 3)):
                damaged[draw.randrange(min(len(damaged), 400) or 1) :][:1] = b""
                if damaged:
                    damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            file.write_bytes(damaged)
            try:
                convert_tokenizer.convert_tokenizer(original)
                counts["read"] += 1
            except UserError:
                counts["refused"] += 1
            file.write_bytes(whole)
    assert counts["refused"] > 50
