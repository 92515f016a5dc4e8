"""Random JSON records and chats: none ends in a traceback, and each is a row, empty, or set aside with a reason.

Each test draws a hundred; ``FFT_FUZZ=10000`` draws so many.
"""

import json
import math
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spark.chat_templates import save_chat_tokenizer
from transformers import AutoTokenizer

from fft.text.chat import load_chat
from fft.text.encoder import Encoder
from fft.text.messages import ROLES, TRAIN_KEYS
from fft.text.pretrain import load_pretrain
from fft.text.records import Keys, Malformed

FUZZ = settings(
    max_examples=int(os.environ.get("FFT_FUZZ", "100")), deadline=None, suppress_health_check=list(HealthCheck)
)
STYLES = ("qwen3", "terse", "phi3", "mistral")

strings = st.text(max_size=8) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "<think>",
        "</think>",
        "<|im_end|>",
        "<|end|>",
        "\ufeff",
        "\u180e",
        "\U000fff00",
        "\ud800",
        "é\u0301",
    ]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 0.5, 2**70, math.inf])
scalars = st.none() | st.booleans() | numbers | strings
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3)
)
keys_of_turns = st.sampled_from(
    ["role", "content", "name", "tool_calls", "function_call", "reasoning_content", "thinking", "images", *TRAIN_KEYS]
)
contents = strings | st.builds(lambda a, b: f"<think>\n{a}\n</think>\n\n{b}", strings, strings) | anything
turns = (
    st.builds(
        lambda role, content, more: {"role": role, "content": content, **more},
        st.sampled_from(ROLES),
        contents,
        st.dictionaries(st.sampled_from(TRAIN_KEYS), st.sampled_from([0, 1, True, False, 0.5, None]), max_size=1),
    )
    | st.builds(lambda role, content: {role: content}, st.sampled_from(ROLES), contents)
    | st.dictionaries(keys_of_turns | strings, anything, max_size=4)
    | anything
)
dialogues = st.builds(
    lambda rounds, end: [turn for pair in rounds for turn in pair] + end,
    st.lists(
        st.tuples(
            st.builds(lambda c: {"role": "user", "content": c}, strings),
            st.builds(lambda c: {"role": "assistant", "content": c}, contents),
        ),
        max_size=3,
    ),
    st.lists(turns, max_size=2),
)
beside = st.dictionaries(
    st.sampled_from(["id", "tools", "weight", "system", "conversation", "source"]) | strings, anything, max_size=3
)
chats = (
    dialogues
    | st.builds(lambda turns, more: {"messages": turns, **more}, dialogues | anything, beside)
    | st.builds(lambda turns, more: {"conversation": turns, **more}, dialogues, beside)
    | anything
)
texts = st.builds(lambda text, more: {"text": text, **more}, strings | anything, beside) | anything


@st.composite
def lines(draw, records):
    """A record as JSON in some form; now and then with a byte that breaks it."""
    text = json.dumps(draw(records), ensure_ascii=draw(st.booleans()))
    line = text.encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.sampled_from([b"", b"\xff", b'"', b"}", b"\x00", b"[" * 3000])) + line[at + 1 :]
    return line


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = {}
    for style in STYLES:
        folder = save_chat_tokenizer(tmp_path_factory.mktemp(style), style)
        found[style] = load_chat(folder, "id", 24)[0], AutoTokenizer.from_pretrained(folder)
    found["texts"] = load_pretrain(folder, Keys(), 5, "auto", False)[0], found[style][1]
    return found


def become(encoder, batch):
    """(rows, reasons, counts) of a batch of lines, all of which are accounted for."""
    documents, reasons, unused = [], [], Counter()
    for line in batch:
        try:
            documents.append(encoder.parse("json", line, None, unused))
        except Malformed as error:
            reasons.append(str(error).encode())
    rows, counts = encoder.token_rows(documents, Encoder(encoder.recipe))
    assert counts["documents_out"] + counts["empty"] + len(reasons) == len(batch)
    assert all(reasons)
    assert all(unused.values())
    json.dumps(unused, ensure_ascii=False).encode()
    return rows.to_pylist(), reasons, counts


def spelled_out(turn):
    ((role, content),) = ((key, value) for key, value in turn.items() if key in ROLES)
    return {"role": role, "content": content}


@FUZZ
@given(batch=st.lists(lines(texts), max_size=3))
def test_any_record_of_text_is_accounted_for(loaded, batch):
    encoder, _ = loaded["texts"]
    rows, _, counts = become(encoder, batch)
    names = [row["doc_ids"][0] for row in rows]
    assert counts["documents_out"] <= len(rows)
    assert len(set(names)) <= counts["documents_out"]
    assert all(0 < len(row["input_ids"]) <= 5 for row in rows)


@pytest.mark.parametrize("style", STYLES)
@FUZZ
@given(batch=st.lists(lines(chats), max_size=3))
def test_any_chat_is_accounted_for(loaded, style, batch):
    encoder, _ = loaded[style]
    rows, _, counts = become(encoder, batch)
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"])
        assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))
    assert counts["trained_tokens"] == sum(label >= 0 for row in rows for label in row["labels"])


@pytest.mark.parametrize("style", STYLES)
@FUZZ
@given(messages=dialogues)
def test_a_chat_that_is_taken_has_the_ids_of_transformers(loaded, style, messages):
    """And one that transformers renders, of texts alone, is taken."""
    encoder, peer = loaded[style]
    line = json.dumps(messages).encode()
    try:
        conversation, _ = encoder.parse("json", line, None)
    except Malformed:
        return
    text = conversation.rendered.text if conversation else ""
    written = [turn if "role" in turn else spelled_out(turn) for turn in json.loads(line)]
    assert text == (peer.apply_chat_template(written, tokenize=False) if written else "")
    turns = conversation.rendered.turns if conversation else ()
    assert all(0 <= turn.start <= turn.end <= turn.stop <= len(text) for turn in turns)
