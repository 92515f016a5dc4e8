"""Prompts to ids: those of transformers' own template, or refused for what training refuses, and for their length."""

import json

import pytest
from generation import TEMPLATE, make_model
from spark.chat_templates import TOOL_STYLES
from transformers import AutoTokenizer

from fft.errors import UserError
from fft.serve.asked import Reading
from fft.serve.prompts import Renderer, load_model_tokenizer
from fft.serve.sampling import Sampling
from fft.text.messages import parse_conversation
from fft.text.records import Malformed

WITH_TOOLS = "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}" + TEMPLATE
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    def load(template: str | None = TEMPLATE):
        return load_model_tokenizer(str(make_model(tmp_path_factory.mktemp("model") / "m", template=template)))

    return load


@pytest.fixture(scope="module")
def chat(tokenizer_of):
    return Renderer.of(tokenizer_of(), 64)


SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("x", [USER]),
        ([{"user": "x"}], [USER]),
        ({"messages": [SYSTEM, USER], "id": 7, "text": "y"}, [SYSTEM, USER]),
        ({"conversation": [{"user": "x"}, {"assistant": "y"}, {"user": "z"}]}, None),
    ],
)
def test_ids_are_those_of_the_tokenizer_s_own_template(prompt, messages, chat):
    if messages is None:
        messages = [USER, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    own = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.render(prompt) == own


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "x"}], "system": "be brief"}, [SYSTEM, USER]),
        ({"instruction": "x", "output": "what is there already"}, [USER]),
        (
            {"instruction": "x", "input": "y", "history": [["a", "b"]]},
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "x\ny"},
            ],
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], [USER]),
    ],
)
def test_prompts_in_the_formats_of_training_data(prompt, messages, chat):
    own = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.render(prompt) == own
    if isinstance(prompt, dict):
        asked = Reading("prompt", Sampling()).ask(prompt)
        assert (chat.render(asked.prompt), asked.fields) == (own, prompt)


def test_calls_in_a_prompt_are_rendered_or_refused(tokenizer_of, chat):
    function = {"name": "f", "arguments": '{"a": 1}'}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]
    turns.append({"role": "tool", "content": "7"})
    with pytest.raises(Malformed, match="it has tool calls, which the chat template does not render"):
        chat.render(turns)
    renderer = Renderer.of(tokenizer_of(TOOL_STYLES["hermes"].template), 400)
    objects = [
        USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        turns[2],
    ]
    own = renderer.tokenizer.apply_chat_template(objects, add_generation_prompt=True, return_dict=False)
    assert renderer.render(turns) == own
    with pytest.raises(Malformed, match=r"turn 1 \(developer\) is left out by the chat template"):
        renderer.render([{"role": "developer", "content": "be brief"}, USER])


def test_a_last_turn_of_the_assistant_goes_on(chat):
    messages = [USER, {"role": "assistant", "content": "def"}]
    own = chat.tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert chat.render(messages) == own
    assert chat.tokenizer.decode(own).endswith("<|assistant|>def")


def test_many_are_rendered_as_each_alone(chat):
    prompts = ["x", [USER], 3, "", {"messages": []}, "y" * 99, [SYSTEM, USER]]
    for prompt, found in zip(prompts, chat.render_many(prompts), strict=True):
        if isinstance(found, Malformed):
            with pytest.raises(Malformed, match=str(found).replace("(", r"\(")):
                chat.render(prompt)
        else:
            assert found == chat.render(prompt)


def test_texts_get_what_the_tokenizer_puts_around_them(tokenizer_of):
    tokenizer = tokenizer_of(None)
    renderer = Renderer.of(tokenizer, 64)
    assert renderer.render("def f(x):") == AutoTokenizer.from_pretrained(tokenizer.name_or_path)("def f(x):").input_ids


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "x"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "x"}], "functions": [{}]},
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"user": "x", "assistant": "y"}]},
        {"messages": [{"role": "user", "content": "x"}], "conversation": [{"user": "x"}]},
        {"messages": [{"role": "user", "content": "x", "weight": 1}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": "no list"},
        {"messages": ["x"]},
    ],
)
def test_what_training_refuses_is_refused_in_the_same_words(record, chat):
    with pytest.raises(Malformed) as trained:
        parse_conversation(json.dumps(record).encode(), "id")
    with pytest.raises(Malformed) as asked:
        chat.render(record)
    assert str(asked.value) == str(trained.value)


def test_tools_are_rendered_or_refused(tokenizer_of, chat):
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {"messages": [USER], "tools": tools}
    with pytest.raises(Malformed, match="it has tools, which the chat template does not render"):
        chat.render(record)
    renderer = Renderer.of(tokenizer_of(WITH_TOOLS), 400)
    own = renderer.tokenizer.apply_chat_template([USER], tools=tools, add_generation_prompt=True, return_dict=False)
    assert renderer.render(record) == own


def test_what_the_template_refuses_is_said(tokenizer_of):
    renderer = Renderer.of(tokenizer_of(STRICT), 64)
    with pytest.raises(Malformed, match="the chat template refuses it: begin with a user"):
        renderer.render([SYSTEM, USER])


def test_lengths_are_checked_with_room_for_a_token(chat, tokenizer_of):
    plain = Renderer.of(tokenizer_of(None), 8)
    assert len(plain.render("x" * 7)) == 7
    for text, said in (("x" * 8, "has 8 tokens, but may have 7: the model takes 8, one"), ("", "it has no tokens")):
        with pytest.raises(Malformed, match=said):
            plain.render(text)


def test_unread_keys_of_turns_are_counted_and_those_beside_are_not(tokenizer_of):
    renderer = Renderer.of(tokenizer_of(), 64)
    renderer.render({"messages": [{**USER, "mood": "good"}], "id": 3})
    assert renderer.unused == {"mood of a turn": 1}


def test_what_cannot_be_a_chat_is_named(tokenizer_of):
    for given, said in (
        ({"chat": "yes"}, '`chat="yes"`: .* has no chat template'),
        ({"system": "x"}, "`system`: .* has no chat template"),
        ({"chat": "maybe"}, "must be one of auto, yes, no"),
    ):
        with pytest.raises(UserError, match=said):
            Renderer.of(tokenizer_of(None), 64, **given)
    with pytest.raises(UserError, match="`system` is a turn of a chat"):
        Renderer.of(tokenizer_of(), 64, "no", "x")
