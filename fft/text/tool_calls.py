"""Calls of tools in assistants' turns: read as data sets write them, put as a template wants them, found in its text.

A call is ``{"id": .., "type": "function", "function": {"name": .., "arguments": ..}}``, or what is in ``function`` by
itself; arguments are an object, or one as JSON text. Templates differ: most want objects, some texts; most take a turn
without a content, some only one that is empty. Which it is, each is asked once.

All that a template writes of a turn with calls is trained on: from where a plain answer would begin, through the calls,
to the end of the turn. That is found by comparison with the rendering in which such an answer stands in their place.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fft.text.records import Malformed, load_json

CALLS_KEY = "tool_calls"
#: What OpenAI had before: one call alone.
OLD_KEY = "function_call"
#: Roles that many templates do not know.
OF_TOOLS = ("tool", "developer")
#: Private-use characters, of which a conversation uses some that it does not contain.
MARKS = [chr(code) for code in range(0xFFF00, 0xFFFFE)]

#: What a template makes of messages.
Render = Callable[[Sequence[dict]], str]

_NAME, _KEY, _VALUE = "name_of_the_tool", "key_of_the_argument", "value_of_the_argument"
_PROBE = [
    {"role": "user", "content": "question"},
    {
        "role": "assistant",
        # ids of nine characters are what Mistral's templates take
        CALLS_KEY: [{"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}],
    },
]


@dataclass(frozen=True)
class CallForm:
    """How a template takes calls: their arguments as JSON ``texts``, or objects; turns without a content with an
    ``empty`` one, or without that key, as ``apply_chat_template`` leaves out what is null."""

    texts: bool
    empty: bool

    def applied(self, messages: Sequence[dict]) -> list[dict]:
        """Messages, of which some have calls, in this form."""
        return [self._turn(message) if message.get(CALLS_KEY) else message for message in messages]

    def _turn(self, message: dict) -> dict:
        calls = message[CALLS_KEY]
        if self.texts:
            calls = [_with(call, arguments=json.dumps(_of(call)["arguments"], ensure_ascii=False)) for call in calls]
        own = {**message, CALLS_KEY: calls}
        if not own.get("content"):
            own["content"] = ""
            if not self.empty:
                del own["content"]
        return own


def call_form(render: Render) -> CallForm | None:
    """The form in which a template renders calls whole, as it is asked; None for one that renders none."""
    for texts in (False, True):
        for empty in (False, True):
            form = CallForm(texts, empty)
            try:
                text = render(form.applied(_PROBE))
            except Malformed:
                continue
            if all(mark in text for mark in (_NAME, _KEY, _VALUE)):
                return form
    return None


def in_form(messages: Sequence[dict], form: CallForm | None) -> list[dict]:
    """Messages, of which some have calls, as a template takes them. Raises :class:`Malformed` without a form."""
    if form is None:
        raise Malformed("it has tool calls, which the chat template does not render")
    return form.applied(messages)


def read_calls(turn: Mapping[str, object], where: str) -> list[dict]:
    """The calls of a turn, their arguments as objects; none where there are none. Raises :class:`Malformed`."""
    old, new = turn.get(OLD_KEY), turn.get(CALLS_KEY)
    if not old and not new:
        return []
    if old and new:
        raise Malformed(f"{where} has both {OLD_KEY} and {CALLS_KEY}")
    key, what = (OLD_KEY, "a function call") if old else (CALLS_KEY, "tool calls")
    said = f"{where} has {what} ({key})"
    if turn.get("role") != "assistant":
        raise Malformed(f"{said}, which only an assistant's may")
    calls = [old] if old else load_json(new) if isinstance(new, str) else new
    if not isinstance(calls, list):
        raise Malformed(f"{said} that are {type(calls).__name__}, no list")
    return [_read_call(call, f"{said}, of which number {number}") for number, call in enumerate(calls, 1)]


def _read_call(call: object, said: str) -> dict:
    if not isinstance(call, dict):
        raise Malformed(f"{said} is {type(call).__name__}, no object")
    own = call.get("function", call)
    if not isinstance(own, dict) or not isinstance(own.get("name"), str) or not own["name"]:
        raise Malformed(f"{said} names no function")
    kind = call.get("type", "function")
    if kind != "function":
        raise Malformed(f"{said} is of type {kind!r}: only functions are known")
    arguments = own.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_text(arguments, said)
    if not isinstance(arguments, dict):
        found = "has no arguments" if arguments is None else f"has arguments that are {type(arguments).__name__}"
        raise Malformed(f"{said} {found}: they must be an object, or one as JSON text")
    beside = {} if own is call else {key: value for key, value in call.items() if key not in ("type", "function")}
    return {**beside, "type": "function", "function": {**own, "arguments": arguments}}


def _from_text(text: str, said: str) -> object:
    if not text.strip():
        return {}
    try:
        return load_json(text)
    except Malformed as error:
        raise Malformed(f"{said} has arguments that are {error}") from error


def _of(call: Mapping[str, dict]) -> dict:
    return call["function"]


def _with(call: Mapping[str, dict], **changed: str) -> dict:
    return {**call, "function": {**_of(call), **changed}}


def find_calls(render: Render, messages: Sequence[dict], i: int, text: str, mark: str) -> tuple[int, int]:
    """Start and end of what a template writes of turn ``i``, which has calls, in the ``text`` of all ``messages``.

    ``mark`` is a character that is not in it. Raises :class:`Malformed` where not all of it is rendered, or not found.
    """
    turn, where = messages[i], f"turn {i + 1} (assistant)"
    named = {**turn, CALLS_KEY: [_with(call, name=mark + _of(call)["name"]) for call in turn[CALLS_KEY]]}
    marked = render([*messages[:i], named, *messages[i + 1 :]])
    if marked.count(mark) != len(turn[CALLS_KEY]) or marked.replace(mark, "") != text:
        raise Malformed(f"{where}: the chat template does not render each of its tool calls, and once")
    content = (turn.get("content") or "").strip()
    if content and not _is_rendered(render, messages, i, mark, content):
        raise Malformed(f"{where}: the chat template leaves out the text beside its tool calls: leave it out yourself")
    plain = {key: value for key, value in turn.items() if key != CALLS_KEY} | {"content": mark}
    for last in (i + 1, len(messages)):
        try:
            whole = text if last == len(messages) else render(messages[:last])
            other = render([*messages[:i], plain, *messages[i + 1 : last]])
            first = render([*messages[:i], named, *messages[i + 1 : last]]).find(mark)
        except Malformed:
            continue
        start, end = _common(whole, other), len(whole) - _common(whole[::-1], other[::-1])
        here = marked.index(mark) - (first - start)
        if mark in other and start <= first < end and text[here : here + end - start] == whole[start:end]:
            return here, here + end - start
    raise Malformed(f"{where}: its tool calls cannot be found in what the chat template makes of it")


def _is_rendered(render: Render, messages: Sequence[dict], i: int, mark: str, content: str) -> bool:
    """Whether the end of the text of turn ``i`` is rendered; its beginning may be reasoning that is left out."""
    changed = {**messages[i], "content": content + mark}
    return mark in render([*messages[:i], changed, *messages[i + 1 :]])


def _common(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda size: a[:size] != b[:size])


def free_mark(text: str) -> str:
    """A mark that is not in a text. Raises :class:`Malformed` where all are."""
    mark = next((mark for mark in MARKS if mark not in text), None)
    if mark is None:
        raise Malformed("it uses all private-use characters of Unicode")
    return mark


def check_calls_and_roles(render: Render, messages: Sequence[dict]) -> None:
    """Raise :class:`Malformed` where a template leaves out a call, or a turn of a role that it does not know."""
    text = render(messages)
    mark = free_mark(text)
    for i, message in enumerate(messages):
        if message.get(CALLS_KEY):
            find_calls(render, messages, i, text, mark)
    check_rendered(render, messages, text, mark)


def check_rendered(render: Render, messages: Sequence[dict], text: str, mark: str) -> int:
    """How many turns of users and systems a template leaves out of the ``text`` that it makes of messages.

    Raises :class:`Malformed` where it leaves out one of another role, but an assistant's: roles that it does not know.
    """
    asked = [i for i, message in enumerate(messages) if message["role"] != "assistant" and _may_be_lost(message, text)]
    if not asked or _marks_in(render, messages, asked, mark) == len(asked):
        return 0
    lost = [i for i in asked if _marks_in(render, messages, [i], mark) == 0]
    for i in lost:
        role = messages[i]["role"]
        if role in OF_TOOLS:
            raise Malformed(
                f"turn {i + 1} ({role}) is left out by the chat template, which does not know that role; "
                f'jq -c \'(.messages[] | select(.role == "{role}").role) = "system"\' gives it another'
            )
    return len(lost)


def _may_be_lost(message: Mapping[str, object], text: str) -> bool:
    content = message["content"]
    if not isinstance(content, str) or not content.strip():  # parts of images have checks of their own
        return False
    return message["role"] in OF_TOOLS or content.strip() not in text


def _marks_in(render: Render, messages: Sequence[dict], turns: Sequence[int], mark: str) -> int | None:
    """How many marks, one in each of these turns, come out; None where the template refuses them."""
    marked = [{**m, "content": m["content"] + mark} if i in turns else m for i, m in enumerate(messages)]
    try:
        return render(marked).count(mark)
    except Malformed:
        return None
