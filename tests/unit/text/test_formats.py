"""Formats of conversations, 200 random ones of each, against transformers' template of a second reading."""

import json
import random
import tempfile
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pytest
from spark.chat_oracle import labels_of, stretches, tool_stretches
from spark.chat_templates import STYLES, TOOL_STYLES, save_chat_tokenizer
from transformers import AutoTokenizer

from fft.text.chat import Chat, load_chat
from fft.text.encoder import Encoder
from fft.text.records import Malformed

#: Conversations of a format.
MANY = 200
STYLE_OF_TEXTS = ("qwen2.5", "llama3", "qwen3", "mistral", "phi4")
WORDS = ("Paris", "42", "naïve", "\n\n", "  ", "<b>", "über", "e\u0301", "x = {}", '"quoted"', "assistant", "</s", "😀")


@lru_cache
def loaded(style: str) -> tuple[Chat, object]:
    with tempfile.TemporaryDirectory() as folder:
        save_chat_tokenizer(Path(folder), style)
        return load_chat(Path(folder), "id", None)[0], AutoTokenizer.from_pretrained(folder)


def parse(chat, record):
    return chat.parse("json", json.dumps(record).encode(), None)


def rows_of(chat, records):
    batch, counts = chat.token_rows([parse(chat, record) for record in records], Encoder(chat.recipe))
    return batch.to_pylist(), counts


def row_of(chat, record):
    (row,), counts = rows_of(chat, [record])
    return row, counts


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def dialogue(rng, rounds, system=True):
    """Turns of users and assistants with the words that models know them by."""
    turns = [{"role": "system", "content": text(rng)}] if system and rng.random() < 0.5 else []
    for _ in range(rng.randint(1, rounds)):
        turns += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
    return turns


def with_calls(rng, style):
    """Turns in which assistants call tools, some of them twice at once, and the tools."""
    turns = dialogue(rng, 1, system=style != "mistral-tools")[:-1]
    for _ in range(rng.randint(1, 3)):
        for _ in range(rng.randint(0, 2)):
            calls = [
                {
                    "id": f"{rng.randrange(10**9):09}",
                    "type": "function",
                    "function": {
                        "name": rng.choice("fgh"),
                        "arguments": {text(rng): rng.choice([1, text(rng), [True]])},
                    },
                }
                for _ in range(rng.randint(1, 2))
            ]
            beside = text(rng) if style == "hermes" and rng.random() < 0.5 else None
            turns.append({"role": "assistant", "content": beside, "tool_calls": calls})
            if style == "hermes" and rng.random() < 0.5:
                turns[-1]["reasoning_content"] = "Let me see."
            turns += [{"role": "tool", "content": text(rng), "tool_call_id": call["id"]} for call in calls]
        turns += [{"role": "assistant", "content": text(rng)}, {"role": "user", "content": text(rng)}]
    return turns[:-1], [{"type": "function", "function": {"name": name, "parameters": {}}} for name in "fgh"]


def check(told, cases):
    """The rows of (style, record, messages, stretches, tools) are what transformers makes of the messages, and are
    trained on where the stretches are; and they are told to be of one format."""
    by_style = {}
    for case in cases:
        by_style.setdefault(case[0], []).append(case[1:])
    assert sum(map(len, by_style.values())) == MANY
    for style, own in by_style.items():
        chat, tokenizer = loaded(style)
        rows, counts = rows_of(chat, [case[0] for case in own])
        for row, (_, messages, parts, tools) in zip(rows, own, strict=True):
            rendered = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
            assert "".join(part for part, _ in parts) == rendered
            assert (row["input_ids"], row["labels"]) == labels_of(tokenizer, parts)
        assert chat.notes(counts)[0] == f"note: read as {told}: {len(own)} records."


SPEAKERS = {"user": ("human", "user"), "assistant": ("gpt", "assistant"), "system": ("system",)}


def test_sharegpt():
    rng, cases = random.Random(0), []
    for number in range(MANY):
        style = STYLE_OF_TEXTS[number % len(STYLE_OF_TEXTS)]
        messages = dialogue(rng, 4)
        turns = [{"from": rng.choice(SPEAKERS[turn["role"]]), "value": turn["content"]} for turn in messages]
        record = {"conversations": turns, "id": f"n{number}"}
        if messages[0]["role"] == "system" and rng.random() < 0.5:
            record = {"system": messages[0]["content"], "conversations": turns[1:]}
        if rng.random() < 0.2:
            record = {"conversations": messages}  # under that key also as templates have it
        cases.append((style, record, messages, stretches(style, messages), []))
    check("ShareGPT", cases)


def test_sharegpt_with_calls():
    rng, cases = random.Random(1), []
    for number in range(MANY):
        style = ("hermes", "deepseek")[number % 2]  # Mistral's wants ids, which this format has not
        messages, tools = with_calls(rng, style)
        turns = []
        for message in messages:
            if calls := message.get("tool_calls"):
                message["content"] = None  # the format has no text beside calls
                made = [call["function"] for call in calls]
                one = len(made) == 1 and rng.random() < 0.5
                keys = {key: message[key] for key in ("reasoning_content",) if key in message}
                turns.append({"from": "function_call", "value": json.dumps(made[0] if one else made), **keys})
            else:
                speaker = {"assistant": "gpt", "user": "human", "system": "system"}.get(message["role"], "observation")
                turns.append({"from": speaker, "value": message["content"]})
        record = {"conversations": turns, "tools": json.dumps(tools)}
        asked = texts_of_arguments(messages) if style == "deepseek" else messages
        cases.append((style, record, asked, tool_stretches(style, messages, tools), tools))
    check("ShareGPT", cases)


def texts_of_arguments(messages):
    return [
        {
            **message,
            "tool_calls": [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for call in message["tool_calls"]
            ],
        }
        if "tool_calls" in message
        else message
        for message in messages
    ]


def test_alpaca():
    rng, cases = random.Random(2), []
    for number in range(MANY):
        style = STYLE_OF_TEXTS[number % len(STYLE_OF_TEXTS)]
        messages = dialogue(rng, 3)
        *before, question, answer = messages
        record = {"instruction": question["content"], "input": "", "output": answer["content"]}
        if rng.random() < 0.5:
            record["input"] = text(rng)
            question["content"] += "\n" + record["input"]
        if before and before[0]["role"] == "system":
            record["system"] = before.pop(0)["content"]
        if before:
            asked, answered = before[::2], before[1::2]
            record["history"] = [[a["content"], b["content"]] for a, b in zip(asked, answered, strict=True)]
        cases.append((style, record, messages, stretches(style, messages), []))
    check("Alpaca", cases)


@pytest.mark.parametrize("lists", [False, True])
def test_prompt_and_completion(lists):
    rng, cases = random.Random(3), []
    for number in range(MANY):
        style = STYLE_OF_TEXTS[number % len(STYLE_OF_TEXTS)]
        messages = dialogue(rng, 3 if lists else 1, system=lists)
        if lists:
            answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
            at = rng.choice(answers)
            record = {"prompt": messages[:at], "completion": messages[at:]}
        else:
            at = 1
            record = {"prompt": messages[0]["content"], "completion": messages[1]["content"]}
        parts = stretches(style, messages)
        trained = [i for i, (_, own) in enumerate(parts) if own]
        for i in trained[: sum(turn["role"] == "assistant" for turn in messages[:at])]:
            parts[i] = (parts[i][0], False)
        cases.append((style, record, messages, parts, []))
    check("prompt/completion", cases)


def test_lists_of_text_parts():
    rng, cases = random.Random(4), []
    for number in range(MANY):
        style = STYLE_OF_TEXTS[number % len(STYLE_OF_TEXTS)]
        messages = dialogue(rng, 3)
        written = []
        for turn in messages:
            at = rng.randint(0, len(turn["content"]))
            parts = [{"type": "text", "text": part} for part in (turn["content"][:at], turn["content"][at:])]
            written.append({**turn, "content": parts if rng.random() < 0.7 else turn["content"]})
        cases.append((style, {"messages": written}, messages, stretches(style, messages), []))
    check("messages", cases)


@pytest.mark.parametrize("style", TOOL_STYLES)
def test_calls_of_tools(style):
    rng, cases = random.Random(5), []
    for _ in range(MANY):
        messages, tools = with_calls(rng, style)
        asked = texts_of_arguments(messages) if style == "deepseek" else messages
        written = texts_of_arguments(messages) if rng.random() < 0.5 else json.loads(json.dumps(messages))
        for turn in written:
            if turn["content"] is None and rng.random() < 0.5:  # as data sets have it: null, nothing or ""
                turn |= {"content": ""}
            if len(turn.get("tool_calls", ())) == 1 and style != "mistral-tools" and rng.random() < 0.2:
                turn["function_call"] = turn.pop("tool_calls")[0]["function"]
        tools = tools if rng.random() < 0.5 else []
        parts = tool_stretches(style, messages, tools)
        cases.append((style, {"messages": written, "tools": tools}, asked, parts, tools))
    check("messages", cases)


def test_developers_are_rendered_or_refused():
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "a"}]
    messages.append({"role": "assistant", "content": "b"})
    for style in ("deepseek", "llama3", "phi4"):
        chat, tokenizer = loaded(style)
        row, _ = row_of(chat, messages)
        assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
        assert "Be brief." in tokenizer.decode(row["input_ids"])
    for style, said in (("hermes", "which does not know that role; jq -c"), ("mistral-tools", "only user, assistant")):
        with pytest.raises(Malformed, match=said):
            parse(loaded(style)[0], messages)


def test_what_is_not_rendered_of_calls_is_refused():
    call = {"id": "123456789", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    for style in STYLES:
        with pytest.raises(Malformed, match="it has tool calls, which the chat template does not render"):
            parse(loaded(style)[0], turns)
    row_of(loaded("hermes")[0], turns)
    with pytest.raises(Malformed, match="leaves out the text beside its tool calls"):
        parse(loaded("mistral-tools")[0], turns)
    with pytest.raises(Malformed, match="does not render each of its tool calls"):
        parse(loaded("deepseek")[0], turns)


def test_a_system_turn_that_is_left_out_is_told(tmp_path):
    folder = save_chat_tokenizer(tmp_path, "qwen2.5")
    template = folder / "chat_template.jinja"
    template.write_text(
        "{%- set messages = messages | rejectattr('role', 'eq', 'system') | list %}" + template.read_text()
    )
    chat, _ = load_chat(folder, "id", None)
    turns = [{"system": "Never say never."}, {"user": "a"}, {"assistant": "b"}]
    counts = row_of(chat, turns)[1]
    assert counts["left_out_questions"] == 1
    assert "note: the chat template leaves out 1 systems' or users' turns." in chat.notes(counts)


ASKED, ANSWERED = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
BAD = {
    "two formats": (
        {"messages": [], "instruction": "a", "output": "b"},
        r"both messages and instruction and output are there: .* jq -c 'del\(.instruction, .output\)'",
    ),
    "another format": (
        {"question": "a", "answer": "b"},
        r"no key messages or conversation, or .*: jq -c '\{prompt: .question, completion: .answer\}' makes one",
    ),
    "another speaker": (
        {"conversations": [{"from": "bard", "value": "a"}]},
        r"turn 1 is from 'bard', .* jq -c '\(.conversations\[\] \| select\(.from == \"bard\"\).from\) = \"gpt\"'",
    ),
    "two forms of a turn": ({"conversations": [{**ASKED, "role": "user"}]}, "turn 1 has both from and role or content"),
    "a value that is none": (
        {"conversations": [{"from": "human"}, ANSWERED]},
        r"content of turn 1 \(user\) is missing",
    ),
    "no call": ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is no call: not valid JSON"),
    "two system turns": (
        {"system": "s", "conversations": [{"from": "system", "value": "t"}, ASKED, ANSWERED]},
        r"key system stands beside turns that begin with one: jq -c 'del\(.system\)'",
    ),
    "nobody answers": ({"conversations": [ASKED]}, "no assistant turn"),
    "no string": (
        {"instruction": "a", "output": 5},
        "output is int, not a string, which jq -c '.output |= tostring' makes",
    ),
    "no pairs": ({"instruction": "a", "output": "b", "history": ["c"]}, "number 1 of history is no list of a question"),
    "text and list": (
        {"prompt": [{"user": "a"}], "completion": "b"},
        r"jq -c '.completion \|= \[\{role: \"assistant\"",
    ),
    "nothing to complete": (
        {"prompt": [{"user": "a"}, {"assistant": "b"}], "completion": [{"user": "c"}]},
        "the completion has no assistant turn",
    ),
    "a prompt to train on": (
        {"prompt": [{"user": "a"}, {"assistant": "b", "weight": 1}, {"user": "c"}], "completion": [{"assistant": "d"}]},
        "the weight of turn 2 of the prompt is 1: only the completion is trained on",
    ),
    "no text": ([{"role": "user", "content": {"a": 1}}], r"is dict, not a string; jq -c .* \|= tojson' makes it one"),
    "a picture": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}],
        r"part 1 of turn 1 \(user\) is of type 'image_url': images are read with --image_path",
    ),
    "a user's call": (
        [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}],
        "which only an assistant's may",
    ),
    "broken arguments": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "of which number 1 has arguments that are not valid JSON",
    ),
    "a list of arguments": (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}],
        "has arguments that are list: they must be an object, or one as JSON text",
    ),
    "a fraction": ([{"user": "a"}, {"assistant": "b", "weight": 0.5}], "is 0.5: only 0, 1, false and true are known"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_taken_says_what_mends_it(name):
    record, said = BAD[name]
    with pytest.raises(Malformed, match=said):
        parse(loaded("hermes")[0], record)


def test_all_formats_of_one_conversation_are_one_document():
    chat, _ = loaded("qwen2.5")
    names = {
        parse(chat, record)[1]
        for record in (
            [{"user": "a"}, {"assistant": "b"}],
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"assistant": "b"}]},
            {"conversations": [ASKED, ANSWERED]},
            {"instruction": "a", "output": "b", "text": "a b"},
            {"prompt": "a", "completion": "b"},
        )
    }
    assert len(names) == 1


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"weight": 0}, "key weight beside the turns says not to train on it"),
        ({"loss": False}, "key loss beside the turns says not to train on it"),
        ({"system": "Be brief."}, "key system beside the turns: make it the first turn"),
        ({"images": [{"bytes": b"\xff", "path": None}]}, "key images beside the turns: images are read with"),
        ({"videos": ["a.mp4"]}, "key videos beside the turns: this release reads texts and images alone"),
    ],
)
def test_columns_are_refused_as_keys_are(beside, reason):
    """What would change the conversation, or says that it is not trained on, must not be left out with a column."""
    chat, _ = loaded("qwen2.5")
    record = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    columns = pa.RecordBatch.from_pylist([record | beside, record])
    (bad, _), (good, _) = chat.rows(columns.select(chat.columns(columns.schema, "f")))
    assert chat.parse("json", good, None) == parse(chat, record)
    with pytest.raises(Malformed, match=reason):
        chat.parse("json", bad, None)


def test_flags_of_a_turn_that_contradict_each_other_are_refused():
    chat, _ = loaded("qwen2.5")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 0, "train": True}]
    with pytest.raises(Malformed, match="weight and train of turn 2 \\(assistant\\) contradict each other"):
        parse(chat, {"messages": turns})
