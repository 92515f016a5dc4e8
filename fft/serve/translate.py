"""What ``/generate`` takes and answers, in terms of the OpenAI routes that vLLM has. Pure functions, no vLLM."""

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from itertools import zip_longest
from typing import Any

from fft.text.image_parts import MARK
from fft.text.messages import message_of
from fft.text.records import Malformed, decode_record, load_json

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


#: What a value must be: words for it, and the test.
_Kind = tuple[str, Callable[[object], bool]]
_NUMBER: _Kind = ("a number", _is_number)
_INTEGER: _Kind = ("an integer", _is_integer)
_BOOLEAN: _Kind = ("true or false", lambda value: isinstance(value, bool))
_TEXT: _Kind = ("a string", lambda value: isinstance(value, str))
_OBJECT: _Kind = ("an object", lambda value: isinstance(value, dict))
_TEXTS: _Kind = ("a list of strings", _is_list_of(str))
_INTEGERS: _Kind = ("a list of integers", _is_list_of(int))

_KEYS: dict[str, _Kind] = {
    "messages": ("a list of turns that is not empty", lambda value: isinstance(value, list) and bool(value)),
    "prompt": _TEXT,
    "sampling": _OBJECT,
    "stream": _BOOLEAN,
    "model": _TEXT,
    "tools": ("a list of objects", _is_list_of(dict)),
    "response_format": _OBJECT,
}
#: Settings that both routes of vLLM know; their bounds are its business.
_SAMPLING: dict[str, _Kind] = {
    "n": _INTEGER,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INTEGER,
    "min_p": _NUMBER,
    "seed": _INTEGER,
    "max_tokens": _INTEGER,
    "min_tokens": _INTEGER,
    "stop": ("a string or a list of strings", lambda value: _TEXT[1](value) or _TEXTS[1](value)),
    "stop_token_ids": _INTEGERS,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "ignore_eos": _BOOLEAN,
    "skip_special_tokens": _BOOLEAN,
    "include_stop_str_in_output": _BOOLEAN,
    "bad_words": _TEXTS,
    "logit_bias": _OBJECT,
    "logprobs": ("an integer, how many likeliest tokens to tell", _is_integer),
    "structured_outputs": _OBJECT,
}
#: Keys of a turn in OpenAI's form; what they may hold is vLLM's business.
_TURN_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content")
#: What a message may hold beside its text, told where there is any.
_BESIDE_TEXT = ("tool_calls", "reasoning")


#: Status and sentence of an answer that was cut off by the server's end.
ABORTED = (503, "The server was stopped before the answer was complete: ask again.")


class Refused(Exception):
    """A request that is not answered: an HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class VllmRequest:
    """A request to vLLM: its route, its body of JSON, and whether the pieces of several answers may be mixed in what
    comes back."""

    route: str
    body: bytes
    many: bool


def read_generate_request(body: bytes) -> VllmRequest:
    """What to ask vLLM for, by the body of a request to ``/generate``.

    It has ``messages``, turns of a conversation (``{"user": "text"}`` or OpenAI's), or ``prompt``, a text to go on
    with as it is. Raises :class:`Refused` for all that is not understood, keys included; null counts as not there.
    """
    try:
        given = load_json(decode_record(body))
    except Malformed as error:
        raise Refused(400, f"The body is {error}.") from error
    if not isinstance(given, dict):
        raise Refused(400, f"The body is {type(given).__name__}, not a JSON object.")
    asked = _understood(given, _KEYS, "")
    sampling = _understood(asked.pop("sampling", {}), _SAMPLING, "sampling.")
    if ("messages" in asked) == ("prompt" in asked):
        raise Refused(400, 'Give either "messages", a list of turns, or "prompt", a text.')
    chat = "messages" in asked
    if chat:
        asked |= _conversation(asked["messages"])
        if (told := sampling.pop("logprobs", None)) is not None:
            sampling |= {"logprobs": True, "top_logprobs": told}
    elif "tools" in asked:
        raise Refused(400, '"tools" go with "messages", not with "prompt".')
    else:
        sampling.setdefault("max_tokens", None)  # OpenAI's default is 16; here it is what there is room for
    if asked.get("stream"):
        asked["stream_options"] = {"include_usage": True}
    try:
        encoded = json.dumps(asked | sampling, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(400, "The body holds a lone surrogate, which is no Unicode text.") from error
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The body holds a number that is none, or is nested too deeply.") from error
    return VllmRequest(CHAT if chat else COMPLETION, encoded, sampling.get("n", 1) > 1)


def _understood(given: Mapping[str, Any], known: Mapping[str, _Kind], where: str) -> dict[str, Any]:
    if unknown := [key for key in given if key not in known]:
        near = [match for key in unknown for match in difflib.get_close_matches(key, known, n=1)]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        names = ", ".join(repr(f"{where}{key}"[:60]) for key in unknown[:5])
        raise Refused(
            400, f"Unknown key{'s' if len(unknown) > 1 else ''} {names}{meant}; known are {', '.join(known)}."
        )
    values = {key: value for key, value in given.items() if value is not None}
    for key, value in values.items():
        wanted, holds = known[key]
        if not holds(value):
            raise Refused(400, f'"{where}{key}" must be {wanted}.')
    return values


def _conversation(turns: list) -> dict[str, Any]:
    try:
        messages = [message_of(turn, number) for number, turn in enumerate(turns, start=1)]
    except Malformed as error:
        raise Refused(400, f'"messages": {error}.') from error
    for number, message in enumerate(messages, start=1):
        if unknown := [key for key in message if key not in _TURN_KEYS]:
            raise Refused(400, f'"messages": turn {number} has the unknown key {unknown[0][:60]!r}.')
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise Refused(400, f'"messages": the content of turn {number} must be a string or a list of parts.')
        if isinstance(content, list) and content and all(isinstance(part, str) for part in content):
            message["content"] = _parts(*content, turn=number)
    if messages[-1]["role"] == "assistant":  # it is gone on with
        return {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    return {"messages": messages}


def _parts(text: str, *images: str, turn: int) -> list[dict[str, Any]]:
    """A text and the images that its marks stand for, as ``jllm`` has them, in OpenAI's form."""
    texts = text.split(MARK)
    if len(texts) != len(images) + 1:
        raise Refused(400, f'"messages": turn {turn} has {len(texts) - 1} {MARK} and {len(images)} images.')
    parts: list[dict[str, Any]] = []
    for between, image in zip_longest(texts, images):
        parts += [{"type": "text", "text": between}] if between else []
        if image is not None and not image.startswith(("data:", "http://", "https://")):
            raise Refused(400, f'"messages": an image of turn {turn} is no URL: give its bytes as a data: URL.')
        parts += [{"type": "image_url", "image_url": {"url": image}}] if image is not None else []
    return parts


def told_answer(reply: Mapping[str, Any], many: bool = False) -> dict[str, Any]:
    """A whole answer of vLLM's, or a chunk of a stream, as ``/generate`` tells it: lists with an entry a choice.

    ``text`` and ``finish_reason`` always; ``logprobs``, ``tool_calls``, ``reasoning`` and ``usage`` where there are
    any; ``index`` with ``many``, for chunks that hold but some of the choices.
    """
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    parts = [choice.get("message") or choice.get("delta") or {} for choice in choices]
    told: dict[str, Any] = {"index": [choice["index"] for choice in choices]} if many else {}
    told["text"] = [
        part.get("content") or choice.get("text") or "" for part, choice in zip(parts, choices, strict=True)
    ]
    told["finish_reason"] = [choice.get("finish_reason") for choice in choices]
    if any(choice.get("logprobs") for choice in choices):
        told["logprobs"] = [_told_logprobs(choice.get("logprobs") or {}) for choice in choices]
    for name in _BESIDE_TEXT:
        if any(part.get(name) for part in parts):
            told[name] = [part.get(name) for part in parts]
    return told | ({"usage": reply["usage"]} if reply.get("usage") else {})


def _told_logprobs(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both routes' forms in one: of each token, and of the likeliest ones beside it, its text and log probability."""
    if "content" in given:
        return [
            {
                **_of_token(entry["token"], entry["logprob"]),
                "top_logprobs": [_of_token(top["token"], top["logprob"]) for top in entry.get("top_logprobs") or ()],
            }
            for entry in given["content"] or ()
        ]
    tokens, logprobs = given.get("tokens") or (), given.get("token_logprobs") or ()
    return [
        {**_of_token(token, logprob), "top_logprobs": [_of_token(*pair) for pair in (top or {}).items()]}
        for token, logprob, top in zip(tokens, logprobs, given.get("top_logprobs") or [None] * len(tokens), strict=True)
    ]


def _of_token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob}


class StreamTranslator:
    """Server-sent events of vLLM's, as ``/generate`` tells them; they may arrive cut anywhere."""

    def __init__(self, many: bool) -> None:
        self._many, self._tail = many, b""

    def feed(self, piece: bytes, last: bool, stopping: bool = False) -> bytes:
        """The events that are whole now; with ``last``, what is left, too. Of a server that is ``stopping``, an error
        means that the answer was cut off, whatever vLLM says of it."""
        *events, self._tail = (self._tail + piece).split(b"\n\n")
        if last and self._tail.strip():
            events.append(self._tail)
        return b"".join(translated for event in events if (translated := self._event(event, stopping)))

    def _event(self, event: bytes, stopping: bool) -> bytes:
        """One of them; comments, errors and the end stay what they are, and what tells nothing is left out."""
        if not event.startswith(b"data: {"):
            return event + b"\n\n"
        chunk = json.loads(event.removeprefix(b"data: "))
        if "choices" not in chunk:
            return error_event(*ABORTED) if stopping else event + b"\n\n"
        told = told_answer(chunk, self._many)
        if not _tells(told):
            return b""
        return _data(told) + (error_event(*ABORTED) if is_aborted(told) else b"")


def is_aborted(told: Mapping[str, Collection[str | None]]) -> bool:
    """Whether an answer that :func:`told_answer` gave was cut off."""
    return "abort" in told["finish_reason"]


def _tells(told: Mapping[str, Any]) -> bool:
    return any(any(value) if isinstance(value, list) else value for key, value in told.items() if key != "index")


def told_error(reply: bytes) -> bytes:
    """An error of vLLM's, its message in one line."""
    try:
        told = json.loads(reply)
        told["error"]["message"] = " ".join(told["error"]["message"].split())
    except (ValueError, LookupError, TypeError, AttributeError):
        return reply  # no error of its form: as it is
    return json.dumps(told, ensure_ascii=False).encode()


def error_body(status: int, sentence: str) -> dict[str, Any]:
    """An error in vLLM's form."""
    kind = HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": status}}


def error_event(status: int, sentence: str) -> bytes:
    """The same within a stream."""
    return _data(error_body(status, sentence))


def _data(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
