"""Preferences as data sets write them, 200 random ones of each form, against transformers' template."""

import json
import random
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pytest
from spark.chat_oracle import labels_of, stretches
from spark.chat_templates import STYLES, save_chat_tokenizer
from transformers import AutoTokenizer

from fft.errors import UserError
from fft.text.encoder import Encoder
from fft.text.preference import PreferencePairs, load_preference, read_pair
from fft.text.records import Malformed

MANY = 200
WORDS = ("Paris", "42", "naïve", "\n", "<b>", "über", "x = {}", '"quoted"', "assistant", "Human:", "😀")


@lru_cache
def loaded(style: str, max_len: int | None = None) -> tuple[PreferencePairs, object]:
    with tempfile.TemporaryDirectory() as folder:
        save_chat_tokenizer(Path(folder), style)
        return load_preference(Path(folder), "id", max_len)[0], AutoTokenizer.from_pretrained(folder)


def encoded(pairs, records):
    documents = [pairs.parse("json", json.dumps(record).encode(), None) for record in records]
    batch, counts = pairs.token_rows(documents, Encoder(pairs.recipe))
    return batch.to_pylist(), counts


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6))).strip() or "x"


def prompt_of(rng, rounds=3):
    turns = [{"role": "system", "content": text(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, rounds)):
        turns += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
    return turns[:-1]


def answers_of(rng):
    """Two answers, of which one may go on, that differ at once."""
    chosen, rejected = ([{"role": "assistant", "content": f"{name} {text(rng)}"}] for name in ("yes", "no"))
    if rng.random() < 0.3:
        chosen += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
    return chosen, rejected


def two_conversations(rng):
    prompt, (chosen, rejected) = prompt_of(rng), answers_of(rng)
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}, prompt, chosen, rejected


def prompt_and_turns(rng):
    prompt, (chosen, rejected) = prompt_of(rng), answers_of(rng)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, prompt, chosen, rejected


def prompt_and_texts(rng):
    prompt = [{"role": "user", "content": text(rng)}]
    chosen, rejected = ([{"role": "assistant", "content": f"{name} {text(rng)}"}] for name in ("yes", "no"))
    texts = {"prompt": prompt[0]["content"], "chosen": chosen[0]["content"], "rejected": rejected[0]["content"]}
    if rng.random() < 0.5:
        prompt = [{"role": "system", "content": "Be brief."}, *prompt]
        texts["system"] = "Be brief."
    return texts, prompt, chosen, rejected


def ultrafeedback(rng):
    """The question stands beside both conversations, once more."""
    prompt = [{"role": "user", "content": text(rng)}]
    chosen, rejected = ([{"role": "assistant", "content": f"{name} {text(rng)}"}] for name in ("yes", "no"))
    record = {"prompt": prompt[0]["content"], "chosen": prompt + chosen, "rejected": prompt + rejected}
    return record | {"score_chosen": 8.0, "score_rejected": 2.0}, prompt, chosen, rejected


def hh(rng):
    prompt = [turn for turn in prompt_of(rng) if turn["role"] != "system"]
    chosen, rejected = ([{"role": "assistant", "content": f"{name} {text(rng)}"}] for name in ("yes", "no"))
    speaker = {"user": "Human", "assistant": "Assistant"}

    def dialogue(turns):
        return "".join(f"\n\n{speaker[turn['role']]}: {turn['content']}" for turn in turns)

    return {"chosen": dialogue(prompt + chosen), "rejected": dialogue(prompt + rejected)}, prompt, chosen, rejected


FORMS = {
    "two-conversations": (two_conversations, "read_as_conversations"),
    "prompt-and-turns": (prompt_and_turns, "read_as_completions"),
    "prompt-and-texts": (prompt_and_texts, "read_as_completions"),
    "ultrafeedback": (ultrafeedback, "read_as_conversations"),
    "hh": (hh, "read_as_dialogues"),
}


@pytest.mark.parametrize("form", FORMS)
def test_ids_and_labels_are_those_of_both_conversations(form):
    make, tally = FORMS[form]
    rng, style = random.Random(form), {"hh": "llama3", "ultrafeedback": "mistral"}.get(form, "qwen2.5")
    pairs, peer = loaded(style)
    made = [make(rng) for _ in range(MANY)]
    rows, counts = encoded(pairs, [record for record, *_ in made])
    assert len(rows) == counts["documents_out"] == counts[tally] == MANY
    assert counts["empty"] == 0
    for row, (_, prompt, chosen, rejected) in zip(rows, made, strict=True):
        first, middle, last = row["cu_seqlens"]
        assert (first, last) == (0, len(row["input_ids"]))
        assert row["doc_ids"][0] == row["doc_ids"][1]
        for side, (a, b) in ((chosen, (0, middle)), (rejected, (middle, last))):
            ids, labels = row["input_ids"][a:b], row["labels"][a:b]
            assert ids == peer.apply_chat_template(prompt + side, tokenize=True)["input_ids"]
            answered = [turn for turn in side if turn["role"] == "assistant"]
            said = peer.decode([label for label in labels if label != -100], clean_up_tokenization_spaces=False)
            ends = STYLES[style].end_of_turn
            assert said == "".join(turn["content"] + ends for turn in answered)
    assert counts["trained_tokens"] == sum(label != -100 for row in rows for label in row["labels"])


def test_labels_are_those_of_chats_but_for_the_prompt():
    pairs, peer = loaded("qwen3")
    rng = random.Random(7)
    record, prompt, chosen, _ = two_conversations(rng)
    (row,), _ = encoded(pairs, [record])
    middle = row["cu_seqlens"][1]
    _, whole = labels_of(peer, stretches("qwen3", prompt + chosen))
    last_of_prompt = len(peer.apply_chat_template(prompt, tokenize=True)["input_ids"])
    assert row["labels"][:middle] == [-100] * last_of_prompt + whole[last_of_prompt:]


def test_answers_that_begin_alike_are_trained_on_where_they_part():
    same, then = {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"}
    turns = [{"role": "user", "content": "Hi"}, same, then]
    one, two = ([*turns, {"role": "assistant", "content": end}] for end in ("A", "B"))
    (chosen, rejected), form = read_pair({"chosen": one, "rejected": two})
    assert form == "conversations"
    assert [turn.get("weight") for turn in chosen] == [0, 0, 0, None]
    assert [turn.get("weight") for turn in rejected] == [0, 0, 0, None]


def test_long_pairs_are_left_out_whole():
    whole, _ = loaded("qwen2.5")
    rng = random.Random(1)
    records = [two_conversations(rng)[0] for _ in range(30)]
    rows, _ = encoded(whole, records)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    pairs, _ = loaded("qwen2.5", lengths[15])
    kept, counts = encoded(pairs, records)
    assert kept == [row for row in rows if len(row["input_ids"]) <= lengths[15]]
    assert counts["long_pairs"] == counts["empty"] == 30 - len(kept) > 0
    assert any(f"of more than max_len {lengths[15]} tokens were left out" in note for note in pairs.notes(counts))


def test_pairs_without_a_trained_side_are_left_out():
    """What the template renders of nothing."""
    pairs, _ = loaded("terse")
    user = {"role": "user", "content": "Hi"}
    said, nothing = ({"role": "assistant", "content": content} for content in ("Yes.", ""))
    good = {"chosen": [user, said], "rejected": [user, said | {"content": "No."}]}
    rows, counts = encoded(pairs, [good, {"chosen": [user, said], "rejected": [user, nothing]}])
    assert len(rows) == 1
    assert counts["untrained_pairs"] == counts["empty"] == 1
    assert any(note.startswith("note: 1 pairs were left out, since") for note in pairs.notes(counts))


USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "y"), ("assistant", "n"))
)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "y"}, "key rejected is missing"),
        ({"chosen": "y", "rejected": None}, "key rejected is missing"),
        ({"chosen": "y", "rejected": "n"}, "chosen is a text without a prompt, and no dialogue"),
        ({"prompt": "?", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
        ({"prompt": "?", "chosen": "y", "rejected": 3}, "rejected is int: it must be a list of turns, or a text"),
        ({"prompt": [USER], "chosen": "y", "rejected": "n"}, "prompt is list and chosen a text: both must be"),
        ({"prompt": 3, "chosen": [YES], "rejected": [NO]}, "prompt is int: it must be a text or a list of turns"),
        ({"prompt": "?", "chosen": "y", "rejected": [NO]}, None),
        (
            {"chosen": [USER, YES], "rejected": [USER]},
            "rejected has no assistant turn after what both sides",
        ),
        ({"chosen": [USER, YES, USER], "rejected": [USER, YES]}, "chosen has no assistant turn after what both"),
        (
            {"prompt": "other", "chosen": [USER, YES], "rejected": [USER, NO]},
            "chosen begins with user, where the",
        ),
        (
            {"chosen": [USER, {"role": "x", "content": "y"}], "rejected": [USER, NO]},
            "chosen: turn 2 has the unknown",
        ),
        ({"chosen": [USER, 3], "rejected": [USER, NO]}, "chosen: turn 2 is int, not an object"),
        (
            {"chosen": [YES], "rejected": [NO]},
            "chosen parts from the other side at turn 1: a pair",
        ),
        ({"chosen": [USER, YES], "rejected": [NO, USER, YES]}, "chosen parts from the other side at turn 1"),
        (
            {"chosen": [USER, YES, USER, NO], "rejected": [USER, YES, NO]},
            "chosen parts from the other side at turn 3",
        ),
        ({"system": 3, "chosen": [USER, YES], "rejected": [USER, NO]}, "key system is int, not a string"),
        (
            {"system": "s", "chosen": [{"role": "system", "content": "t"}, USER, YES], "rejected": [USER, NO]},
            "key system stands beside turns that begin with one",
        ),
        (
            {"prompt": [USER], "chosen": [USER, YES], "rejected": [NO]},
            "chosen is of two conversations, rejected of a prompt and two answers",
        ),
    ],
)
def test_what_is_no_pair_is_said(record, reason):
    if reason is None:
        assert read_pair(record)[1] == "completions"
        return
    with pytest.raises(Malformed, match=reason):
        read_pair(record)


def test_what_chats_refuse_is_refused_by_its_side():
    pairs, _ = loaded("qwen2.5")
    record = {"chosen": [USER, YES], "rejected": [USER, NO | {"loss_scale": 2}]}
    with pytest.raises(Malformed, match="rejected: turn 2 \\(assistant\\) has a scale of its loss"):
        pairs.parse("json", json.dumps(record).encode(), None)
    with pytest.raises(Malformed, match="not a JSON object but list"):
        pairs.parse("json", b"[]", None)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"weight": 0}, "key weight beside the turns says not to train on it"),
        ({"train": False}, "key train beside the turns says not to train on it"),
        ({"images": ["a.jpg"]}, "key images beside the turns: preferences have no images"),
        ({"documents": ["d"]}, "key documents beside the turns: documents are not supported"),
    ],
)
def test_what_chats_refuse_beside_the_turns_is_refused_in_lines_and_in_columns(beside, reason):
    pairs, _ = loaded("qwen2.5")
    record = {"chosen": [USER, YES], "rejected": [USER, NO]}
    columns = pa.RecordBatch.from_pylist([record | beside, record])
    names = pairs.columns(columns.schema, "f")
    (bad, _), (good, _) = pairs.rows(columns.select(names))
    pairs.parse("json", good, None)
    for line in (bad, json.dumps(record | beside).encode()):
        with pytest.raises(Malformed, match=reason):
            pairs.parse("json", line, None)


def test_what_is_not_said_parts_no_conversations():
    """A date, or whether a turn is trained on: else an answer of the prompt would be trained on, or on one side."""
    pairs, _ = loaded("qwen2.5")
    asked = [USER, YES | {"weight": 0, "date": 1}, USER]
    again = [USER, YES | {"weight": 1, "date": 2}, USER]
    pair, _ = pairs.parse("json", json.dumps({"chosen": [*asked, YES], "rejected": [*again, NO]}).encode(), None)
    plain = {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}
    other, _ = pairs.parse("json", json.dumps(plain).encode(), None)
    assert (pair.chosen.rendered, pair.rejected.rendered) == (other.chosen.rendered, other.rejected.rendered)
    with pytest.raises(Malformed, match="chosen parts from the other side at turn 1"):  # a template may know dates
        read_pair({"chosen": [USER | {"date": 1}, YES], "rejected": [USER | {"date": 2}, NO]}, ("date",))


def test_ids_and_keys_that_nothing_uses():
    pairs, _ = loaded("qwen2.5")
    record, unused = {"chosen": [USER, YES], "rejected": [USER, NO], "score": 3, "margin": None}, Counter()
    _, first = pairs.parse("json", json.dumps(record).encode(), None, unused)
    assert unused == {"score": 1}
    _, other = pairs.parse("json", json.dumps(record | {"chosen": [USER, NO], "rejected": [USER, YES]}).encode(), None)
    assert first != other
    assert pairs.parse("json", json.dumps(record | {"id": 7}).encode(), None)[1] == "7"


def test_columns_of_parquet():
    pairs, _ = loaded("qwen2.5")
    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    schema = pa.schema({"id": pa.string(), "chosen": turns, "rejected": turns, "score": pa.float64()})
    assert pairs.columns(schema, "f") == ["chosen", "rejected", "id"]
    batch = pa.RecordBatch.from_pylist([{"id": "a", "chosen": [USER, YES], "rejected": [USER, NO]}], schema)
    ((record, doc_id),) = pairs.rows(batch.select(["chosen", "rejected", "id"]))
    assert json.loads(record) == {"chosen": [USER, YES], "rejected": [USER, NO]}
    assert doc_id == "a"
    with pytest.raises(UserError, match="f has no column rejected \\(it has chosen\\): preferences have the columns"):
        pairs.columns(pa.schema({"chosen": turns}), "f")
