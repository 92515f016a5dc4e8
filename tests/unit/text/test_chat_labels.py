"""Conversations to ids and labels, without Spark: against transformers and a second reading of the templates."""

import json
import tempfile
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spark.chat_oracle import labels_of, stretches
from spark.chat_templates import STYLES, save_chat_tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer

from fft.errors import UserError
from fft.text import chat_labels
from fft.text import messages as known_keys
from fft.text.chat import Chat, load_chat
from fft.text.chat_labels import NOT_TRAINED, Spelling
from fft.text.cuts import cut_chat
from fft.text.encoder import Encoder
from fft.text.formats import FORMATS, LISTS_OF_TURNS
from fft.text.messages import RawConversation, parse_conversation
from fft.text.records import Malformed

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


def rows_and_counts(chat, *conversations, encoder=None):
    documents = [chat.parse("json", json.dumps(messages).encode(), None) for messages in conversations]
    batch, counts = chat.token_rows(documents, encoder or Encoder(chat.recipe))
    return batch.to_pylist(), counts


def rows(chat, *conversations, encoder=None):
    return rows_and_counts(chat, *conversations, encoder=encoder)[0]


def trained_text(tokenizer, row):
    return tokenizer.decode([i for i in row["labels"] if i != NOT_TRAINED])


def expected_labels(tokenizer, style, messages):
    parts = stretches(style, messages)
    assert "".join(part for part, _ in parts) == tokenizer.apply_chat_template(messages, tokenize=False)
    return labels_of(tokenizer, parts)[1]


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


def test_sentence_piece_needs_no_slow_offsets(monkeypatch):
    chat, tokenizer = loaded("baichuan2", "sentence-piece")
    monkeypatch.setattr(chat_labels, "encode_with_offsets", None)
    (row,) = rows(chat, FIVE)
    assert row["labels"] == expected_labels(tokenizer, "baichuan2", FIVE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_conversation_is_labelled_as_the_template_reads(style, kind, data):
    chat, tokenizer = loaded(style, kind)
    messages = data.draw(conversations(STYLES[style].alternates))
    if not any(text for text, _ in stretches(style, messages)):
        assert rows_and_counts(chat, messages)[1]["empty"] == 1
        return
    (row,) = rows(chat, messages)
    assert row["input_ids"] == (tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] or None)
    if row["input_ids"]:
        assert row["labels"] == expected_labels(tokenizer, style, messages)


# What the templates do to a content


def test_qwen3_keeps_only_the_last_reasoning_and_trains_on_all_that_it_keeps():
    chat, tokenizer = loaded("qwen3")
    thought = "<think>\nLet me see.\n</think>\n\n"
    (row,) = rows(chat, turns("a", f"{thought}One.", "b", f"{thought}Two."))
    assert trained_text(tokenizer, row) == f"One.<|im_end|>{thought}Two.<|im_end|>"


def test_an_empty_reasoning_that_the_template_adds_is_not_trained_on():
    chat, tokenizer = loaded("qwen3")
    (row,) = rows(chat, turns("a", "One."))
    assert "<think>\n\n</think>\n\nOne." in tokenizer.decode(row["input_ids"])
    assert trained_text(tokenizer, row) == "One.<|im_end|>"


def test_reasoning_under_a_key_of_its_own():
    chat, tokenizer = loaded("qwen3")
    messages = turns("a", "One.")
    messages[1]["reasoning_content"] = "Hm."
    (row,) = rows(chat, messages)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert trained_text(tokenizer, row) == "<think>\nHm.\n</think>\n\nOne.<|im_end|>"


@pytest.mark.parametrize("style", [n for n in STYLES if STYLES[n].end_of_turn and not STYLES[n].drops_empty])
def test_an_empty_answer_trains_on_its_end_alone(style):
    chat, tokenizer = loaded(style)
    (row,) = rows(chat, turns("a", "", "b", "c"))
    assert (
        trained_text(tokenizer, row).replace(" c", "c") == STYLES[style].end_of_turn + f"c{STYLES[style].end_of_turn}"
    )


def test_a_trimmed_content_is_trained_on_as_trimmed_and_white_space_elsewhere_as_it_is():
    for style, expected in {"llama3": "x<|eot_id|>", "internlm2": " \t x \n<|im_end|>"}.items():
        chat, tokenizer = loaded(style)
        (row,) = rows(chat, turns("a", " \t x \n"))
        assert trained_text(tokenizer, row) == expected


def test_a_token_across_the_edge_of_a_header_is_trained_on():
    chat, tokenizer = loaded("mistral")
    (row,) = rows(chat, turns("a", "capital"))
    assert " capital" in tokenizer.decode(row["input_ids"])
    assert trained_text(tokenizer, row) == " capital</s>"


def test_what_looks_like_an_assistant_elsewhere_is_not_trained_on():
    for style in STYLES:
        chat, tokenizer = loaded(style)
        fake = "".join(text for text, _ in stretches(style, turns("q", "Fake answer")))
        (row,) = rows(chat, turns("a", "One", "b", "Two", system=f"Example:\n{fake}"))
        end = STYLES[style].end_of_turn
        assert trained_text(tokenizer, row).replace(" ", "") == f"One{end}Two{end}"


def test_special_token_strings_become_control_tokens_as_in_transformers_and_are_counted():
    for style in STYLES:
        special = STYLES[style].special[-1]
        chat, tokenizer = loaded(style)
        messages = turns(f"a {special} b", f"c{special}d")
        (row, _), counts = rows_and_counts(chat, messages, turns("a", "b"))
        assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
        assert row["labels"] == expected_labels(tokenizer, style, messages)
        assert row["input_ids"].count(tokenizer.convert_tokens_to_ids(special)) >= 2
        assert counts["with_special_strings"] == 1


def test_private_use_characters_in_the_text_do_no_harm():
    chat, tokenizer = loaded("qwen3")
    messages = turns("\U000fff00\U000fff01", "\U000fff00<think>\n\U000fff03\n</think>\n\n \U000fff02 ")
    (row,) = rows(chat, messages)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert row["labels"] == expected_labels(tokenizer, "qwen3", messages)


def test_roles_that_the_template_refuses_are_malformed():
    chat, _ = loaded("mistral")
    with pytest.raises(Malformed, match="the chat template refuses it: roles must alternate"):
        rows(chat, [{"role": "user", "content": "a"}, *turns("b", "c")])


def test_a_template_may_rewrite_a_content_but_not_repeat_it(tmp_path):
    folder = save_chat_tokenizer(tmp_path, "internlm2")
    template = folder / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("message['content'] +", "message['content'] | replace('a', 'b') +")
    )
    chat, _ = load_chat(folder, "id", None)
    assert rows_and_counts(chat, turns("q", "xyz"))[1]["trained_tokens"]
    template.write_text(template.read_text().replace("| replace('a', 'b')", "* 2"))
    with pytest.raises(UserError, match="its chat template fails on a plain question and answer"):
        load_chat(folder, "id", None)


def test_a_tokenizer_without_template_is_refused(tmp_path):
    folder = save_chat_tokenizer(tmp_path, "qwen3")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_chat(folder, "id", None)


def test_one_date_for_all_rows(tmp_path):
    folder = save_chat_tokenizer(tmp_path, "qwen2.5")
    template = folder / "chat_template.jinja"
    template.write_text("Today is {{ strftime_now('%Y-%m-%d') }}.\n" + template.read_text())
    chat, _ = load_chat(folder, "id", None)
    (row,) = rows(chat, turns("a", "b"))
    assert f"Today is {chat.template.date:%Y-%m-%d}." in AutoTokenizer.from_pretrained(folder).decode(row["input_ids"])
    assert any("writes the date" in note for note in chat.notes({"cut_conversations": 0, "with_special_strings": 0}))


def test_a_special_token_swallows_white_space_and_its_header_is_not_trained_on():
    chat, tokenizer = loaded("phi3")
    messages = turns("q", "\n  hi  ", " r ", "")
    (row,) = rows(chat, messages)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert trained_text(tokenizer, row) == "hi  <|end|><|end|>"


def test_a_turn_that_the_template_leaves_out_is_rendered_as_in_transformers_and_counted():
    chat, tokenizer = loaded("terse")
    messages = turns("a", "", "b", "c")
    (row, _), counts = rows_and_counts(chat, messages, turns("a", "b"))
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert trained_text(tokenizer, row) == "c<|im_end|>"
    assert counts["left_out_turns"] == 1
    assert any("leaves out 1" in note for note in chat.notes(counts))


def test_a_turn_that_is_left_out_at_length_is_none_that_is_malformed(tmp_path):
    folder = save_chat_tokenizer(tmp_path, "qwen2.5")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("in messages %}", "in messages[-2:] %}"))
    chat, _ = load_chat(folder, "id", None)
    (row,), counts = rows_and_counts(chat, turns("a", "b", "c", "d"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert row["input_ids"] == tokenizer.apply_chat_template(turns("a", "b", "c", "d"))["input_ids"]
    assert trained_text(tokenizer, row) == "d<|im_end|>"
    assert counts["left_out_turns"] == 1


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
@pytest.mark.parametrize("style", [name for name in STYLES if STYLES[name].end_of_turn])
def test_a_turn_that_says_so_is_not_trained_on(style, flag):
    chat, tokenizer = loaded(style)
    plain = turns("a", "One", "b", "Two")
    flagged = [plain[0], {**plain[1], **flag}, {**plain[2], **flag}, {**plain[3], "weight": 1, "train": True}]
    (whole,) = rows(chat, plain)
    (row,), counts = rows_and_counts(chat, flagged)
    assert row["input_ids"] == tokenizer.apply_chat_template(flagged)["input_ids"] == whole["input_ids"]
    assert trained_text(tokenizer, row).strip() == f"Two{STYLES[style].end_of_turn}"
    assert counts["without_trained_turns"] == 0
    assert rows(chat, [{"user": "a"}, {"assistant": "One", **flag}, {"user": "b"}, {"assistant": "Two"}]) == [
        {**row, "doc_ids": rows(chat, [plain[0], {**plain[1], "weight": 0}, *plain[2:]])[0]["doc_ids"]}
    ]
    counts = rows_and_counts(chat, [plain[0], {**plain[1], **flag}])[1]
    assert (counts["trained_tokens"], counts["without_trained_turns"]) == (0, 1)
    assert any("nothing is trained on in 1" in note for note in chat.notes(counts))


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_rendered_where_the_template_does(written):
    chat, tokenizer = loaded("terse")
    messages = turns("a", "b")
    (row,) = rows(chat, {"messages": messages, "tools": written})
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, tools=TOOLS)["input_ids"]
    assert "tools\n" in tokenizer.decode(row["input_ids"])
    assert trained_text(tokenizer, row) == "b<|im_end|>"
    with pytest.raises(Malformed, match="it has tools, which the chat template does not render"):
        rows(loaded("qwen2.5")[0], {"messages": messages, "tools": written})


def test_keys_that_are_neither_understood_nor_rendered_are_counted():
    chat, _ = loaded("qwen3")
    messages = turns("a", "b")
    messages[1] |= {"reasoning": "c", "name": "d", "annotations": [], "refusal": None}
    unused = Counter()
    record = {"messages": messages, "id": 1, "source": "web", "lang": None, "\ud800": 1}
    chat.parse("json", json.dumps(record).encode(), None, unused)
    assert unused == {"source": 1, "\\ud800": 1, "name of a turn": 1, "annotations of a turn": 1}


# Rows as data sets write them

GOOD = {
    "roles as keys": '[{"system": "s"}, {"user": "u"}, {"assistant": "a"}]',
    "conversation": '{"conversation": [{"system": "s"}, {"user": "u"}, {"assistant": "a"}], "id": 7}',
    "messages": '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": null}, '
    '{"role": "assistant", "content": "a"}], "conversation": null, "tools": [], "id": "7"}',
}


@pytest.mark.parametrize("name", GOOD)
def test_all_forms_of_a_row_give_the_same_messages(name):
    raw = parse_conversation(GOOD[name].encode(), "id")
    assert raw.messages == turns("u", "a", system="s")
    assert raw.doc_id == (None if name == "roles as keys" else "7")


def test_an_empty_list_is_an_empty_conversation():
    assert parse_conversation(b'{"messages": []}', "id") == RawConversation([], None)


BAD = {
    "{": "not valid JSON",
    "5": "not a list of turns but int",
    '{"text": "a"}': "no key messages or conversation",
    '{"messages": [], "conversation": []}': "both messages and conversation are there",
    '{"messages": [], "tools": 5}': "tools are no list of objects",
    '{"messages": [], "tools": "[5]"}': "tools are no list of objects",
    '{"messages": [], "functions": [{}]}': "key functions beside the turns: give them as tools",
    '{"messages": [], "system": "s"}': "key system beside the turns: make it the first turn",
    '{"messages": [], "weight": 0}': "key weight beside the turns says not to train on it",
    '{"messages": "a"}': "not a list of turns but str",
    '["a"]': "turn 1 is str, not an object",
    '[{"user": "a"}]': "no assistant turn",
    '[{"user": "a"}, {"bot": "b"}]': "turn 2 has the unknown role 'bot'",
    '[{"user": "a", "assistant": "b"}]': "turn 1 must have one role as its key, it has user, assistant",
    "[{}]": "turn 1 must have one role as its key, it has none",
    '[{"role": "user"}]': r"the content of turn 1 \(user\) is missing",
    '[{"user": ["a"]}, {"assistant": "b"}]': r"the content of turn 1 \(user\) is list, not a string",
    '[{"role": "assistant", "content": "", "tool_calls": [{}]}]': r"turn 1 \(assistant\) has tool calls",
    '[{"role": "assistant", "content": null, "tool_calls": [{}]}]': r"turn 1 \(assistant\) has tool calls",
    '[{"role": "assistant", "content": "", "function_call": {"name": "f"}}]': r"has a function call \(function_call\)",
    '[{"role": "assistant", "content": "", "images": ["a"]}]': "has an image, a sound or a film",
    '[{"role": "assistant", "content": "a", "weight": 0.5}]': r"the weight of turn 1 \(assistant\) is 0.5: only 0, 1",
    '[{"role": "user", "content": "a", "train": true}]': "only assistants' turns are trained on",
    '[{"\\ud800": "a"}]': r"unknown role '\\ud800'",
    '[{"assistant": "\\ud800"}]': "a lone surrogate",
}


@pytest.mark.parametrize("line", BAD)
def test_malformed_rows_say_why(line):
    with pytest.raises(Malformed, match=BAD[line]):
        parse_conversation(line.encode(), "id")


def test_every_key_that_is_refused_is_refused_by_name_and_stands_in_the_documentation():
    page = (Path(__file__).parents[3] / "docs" / "inputs.md").read_text()
    for key in known_keys._REFUSED_BESIDE_TURNS:
        with pytest.raises(Malformed, match=f"key {key} beside the turns"):
            parse_conversation(json.dumps({"messages": turns("a", "b"), key: "x"}).encode(), "id")
    for key in known_keys._REFUSED_IN_A_TURN:
        with pytest.raises(Malformed, match=rf"turn 2 \(assistant\) has .* \({key}\), which is not supported"):
            parse_conversation(json.dumps([{"user": "a"}, {**turns("a", "b")[1], key: ["x"]}]).encode(), "id")
        parse_conversation(json.dumps([{"user": "a"}, {**turns("a", "b")[1], key: []}]).encode(), "id")
    for key in known_keys.TRAIN_KEYS:
        with pytest.raises(Malformed, match=f"key {key} beside the turns says not to train on it"):
            parse_conversation(json.dumps({"messages": turns("a", "b"), key: 0}).encode(), "id")
    known = (*LISTS_OF_TURNS, known_keys.TOOLS_KEY, *known_keys.ROLES, *known_keys.TRAIN_KEYS)
    known += tuple(key for form in FORMATS for key in (*form.keys, *form.beside))
    known += (*known_keys._REFUSED_BESIDE_TURNS, *known_keys._REFUSED_IN_A_TURN)
    assert [key for key in known if f"`{key}`" not in page] == []


# Offsets


def test_spelling_gives_the_offsets_of_the_ids():
    spelling = Spelling.of([b"ab", b"", b"c"])
    spelled, begins, ends = spelling.spell(np.array([2, 0, 1, 0]))
    assert spelled.tobytes() == b"cabab"
    assert begins.tolist() == [0, 1, 3, 3]
    assert ends.tolist() == [1, 3, 3, 5]
    spelling = Spelling.of([b" a", b"<s>", b" "], added=[1])
    spelled, begins, ends = spelling.spell(np.array([0, 0, 1, 2, 0, 1, 0]), firsts=np.array([0, 6]))
    assert spelled.tobytes() == b"a a<s> a<s>a"
    assert begins.tolist() == [0, 1, 3, 6, 6, 8, 11]
    assert ends.tolist() == [1, 3, 6, 7, 8, 11, 12]


def test_rows_that_do_not_spell_their_text_get_transformers_offsets(monkeypatch):
    chat, tokenizer = loaded("qwen2.5", "nfc")
    asked = []
    real = chat_labels.encode_with_offsets
    monkeypatch.setattr(chat_labels, "encode_with_offsets", lambda r, texts: asked.append(len(texts)) or real(r, texts))
    chats = [turns("a", "plain"), turns("a", "e\u0301e\u0301 x"), turns("é", "é")]
    for row, messages in zip(rows(chat, *chats), chats, strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
        assert row["labels"] == expected_labels(tokenizer, "qwen2.5", messages)
    assert asked == [1]


def test_a_tokenizer_written_in_python(tmp_path):
    style = STYLES["qwen2.5"]
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=list(style.special))
    tokenizer.chat_template = style.template
    tokenizer.save_pretrained(tmp_path)
    chat, info = load_chat(tmp_path, "id", None)
    assert info.vocab_size == len(tokenizer)
    encoder = Encoder(chat.recipe)
    (row,) = rows(chat, FIVE, encoder=encoder)
    assert encoder.engine == 3
    assert row["input_ids"] == tokenizer.apply_chat_template(FIVE)["input_ids"]
    assert trained_text(tokenizer, row) == "Hi, how are you?<|im_end|>It is 42.<|im_end|>"


# Cutting


def rounds(*sizes):
    """Length and turns of a chat of (question, answer) token counts; the answer's last token is not trained on."""
    found, at = [], 0
    for question, answer in sizes:
        found.append((at + question, at + question + answer - 1, at + question + answer, True))
        at += question + answer
    return at, found


def test_long_chats_are_cut_where_a_question_begins():
    length, found = rounds((5, 5), (5, 5), (2, 3), (5, 5))
    assert cut_chat(length, found, None) == [(0, 35)]
    assert cut_chat(length, found, 35) == [(0, 35)]
    assert cut_chat(length, found, 34) == [(0, 25), (25, 35)]
    assert cut_chat(length, found, 20) == [(0, 20), (20, 35)]
    assert cut_chat(length, found, 10) == [(0, 10), (10, 20), (20, 25), (25, 35)]


def test_a_long_question_loses_its_beginning_not_its_answer():
    length, found = rounds((50, 5), (2, 3))
    assert cut_chat(length, found, 10) == [(45, 55), (55, 60)]
    assert cut_chat(length, found, 4) == [(50, 54), (56, 60)]


def test_a_long_answer_is_cut_inside():
    length, found = rounds((3, 20), (2, 2))
    assert cut_chat(length, found, 10) == [(0, 10), (10, 20), (20, 27)]


def test_a_last_question_without_answer_stays_only_where_there_is_room():
    _, found = rounds((5, 5), (5, 5))
    assert cut_chat(24, found, 14) == [(0, 10), (10, 24)]
    assert cut_chat(26, found, 14) == [(0, 10), (10, 20)]


def test_consecutive_answers_are_kept_together_if_they_fit():
    found = [(2, 5, 5, False), (6, 9, 9, True), (12, 14, 14, True)]
    assert cut_chat(14, found, 9) == [(0, 9), (9, 14)]
    assert cut_chat(14, found, 8) == [(0, 5), (5, 9), (9, 14)]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 20),
    st.integers(1, 40),
)
def test_pieces_fit_and_train_on_every_token_once(sizes, trailing, max_len):
    found, at = [], 0
    for question, answer, opens in sizes:
        found.append((at + question, at + question + answer - 1, at + question + answer, opens))
        at += question + answer
    pieces = cut_chat(at + trailing, found, max_len)
    assert all(0 < end - begin <= max_len for begin, end in pieces)
    assert all(before[1] <= after[0] for before, after in pairwise(pieces))
    covered = [position for begin, end in pieces for position in range(begin, end)]
    assert {p for first, last, _, _ in found for p in range(first, last)} <= set(covered)
    for first, last, _, _ in found:
        if last - first <= max_len and first < last:
            assert any(begin <= first and last <= end for begin, end in pieces)
