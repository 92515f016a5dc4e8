"""Conversations to ids and labels, without Spark: against transformers and a second reading of the templates."""

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from fft.errors import UserError
from spark.chat_oracle import stretches
from spark.chat_templates import STYLES, save_chat_tokenizer
from spark_jobs import chat_labels
from spark_jobs.chat import Chat, load_chat
from spark_jobs.chat_labels import NOT_TRAINED, Spelling
from spark_jobs.chat_pieces import cut_chat
from spark_jobs.conversations import parse_conversation
from spark_jobs.documents import Malformed
from spark_jobs.encoding import Encoder

KINDS = ("byte-level", "nfc", "sentence-piece")


@lru_cache
def loaded(style: str, kind: str = "byte-level") -> tuple[Chat, object]:
    with tempfile.TemporaryDirectory() as folder:
        save_chat_tokenizer(Path(folder), style, kind)
        chat, _ = load_chat(Path(folder), "id", None)
        return chat, AutoTokenizer.from_pretrained(folder)


def turns(*contents, system=None):
    """user, assistant, user, ... messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def rows(chat, *conversations):
    documents = [chat.parse("json", json.dumps(messages).encode(), None) for messages in conversations]
    return chat.token_rows(documents, 0, Encoder(chat.recipe)).to_pylist()


def trained_text(tokenizer, row):
    return tokenizer.decode([i for i in row["labels"] if i != NOT_TRAINED])


def expected_labels(tokenizer, style, messages):
    """By transformers' own offsets: a token is trained on if it holds a character of a trained stretch."""
    parts = stretches(style, messages)
    text = "".join(part for part, _ in parts)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    flags = np.concatenate([np.full(len(part), trained) for part, trained in parts])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [bool(flags[a:b].any()) for a, b in encoded["offset_mapping"]]
    return [i if t else NOT_TRAINED for i, t in zip(encoded["input_ids"], trained, strict=True)]


FIVE = turns("Hello there", "Hi, how are you?", "Well. And 6 x 7?", "It is 42.", system="Be brief.")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_every_assistant_turn_is_trained_on_and_nothing_else(style, kind):
    chat, tokenizer = loaded(style, kind)
    (row,) = rows(chat, FIVE)
    assert row["input_ids"] == tokenizer.apply_chat_template(FIVE, tokenize=True)["input_ids"]
    assert row["labels"] == expected_labels(tokenizer, style, FIVE)
    assert all(label in (NOT_TRAINED, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))
    end = STYLES[style].end_of_turn
    if kind == "byte-level":  # sentence-piece tokens may take the space or newline before the content
        found = trained_text(tokenizer, row)
        expected = f"Hi, how are you?{end}It is 42.{end}"
        assert found.replace(" Hi", "Hi").replace(" It", "It") == expected if style == "mistral" else found == expected


WORDS = st.text(alphabet=st.sampled_from("ab Z0\n\té😀e\u0301ﬁ<>/:'"), max_size=12)
THOUGHTS = st.builds(lambda thought, answer: f"<think>\n{thought}\n</think>\n\n{answer}", WORDS, WORDS)


@st.composite
def conversations(draw, alternate):
    system = draw(st.none() | WORDS)
    content = WORDS | THOUGHTS
    if alternate:
        messages = turns(*draw(st.lists(content, min_size=2, max_size=7)), system=system)
    else:
        roles = draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=6))
        roles.insert(draw(st.integers(0, len(roles))), "assistant")
        messages = [{"role": role, "content": draw(content)} for role in roles]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
    return messages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_conversation_is_labelled_as_the_template_reads(style, kind, data):
    chat, tokenizer = loaded(style, kind)
    messages = data.draw(conversations(STYLES[style].alternates))
    (row,) = rows(chat, messages)
    assert row["input_ids"] == (tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] or None)
    if row["input_ids"]:
        assert row["labels"] == expected_labels(tokenizer, style, messages)
