"""Formats in which data sets write conversations, each a small schema: pure functions from a record to its turns.

A record is of a format when it has all of its keys; one of two formats is refused by name. Where a record cannot be
taken, what is said has the expression of ``jq`` that mends it. docs/inputs.md has the formats for users.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fft.text.records import Malformed, load_json

Record = Mapping[str, object]

#: Keys of a JSON object (columns of a parquet file) that may hold turns in the form of a chat template.
TURN_KEYS = ("messages", "conversation")
#: Keys of a turn that say whether it is trained on: 1 or true, 0 or false.
TRAIN_KEYS = ("weight", "train", "loss")

#: Who speaks in ShareGPT's turns, as a chat template's role.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
#: Keys under which data sets have a question and its answer, which are of no format.
_PAIRS = tuple(
    (question, answer)
    for question in ("instruction", "prompt", "question", "query", "problem", "input")
    for answer in ("output", "completion", "response", "answer", "solution")
)
_IDENTIFIER = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Format:
    """``name`` as it is told, the ``keys`` that a record of it has, those that it may have ``beside`` them, and what
    makes turns of it. These are not checked yet, but for what only this format knows."""

    name: str
    keys: tuple[str, ...]
    beside: tuple[str, ...]
    turns: Callable[[Record], object]

    @cached_property
    def tally(self) -> str:
        """Under which name its records are counted."""
        return "read_as_" + re.sub("[^a-z]+", "_", self.name.lower())

    def fits(self, names: Collection[str]) -> bool:
        """Whether keys of these names are all that it needs."""
        return all(key in names for key in self.keys)


def format_of(row: Record, formats: Sequence[Format] = ()) -> Format:
    """Which of the ``formats``, by default of all, a record is of. Raises :class:`Malformed` for none and for two."""
    found = [
        one
        for one in formats or FORMATS
        if row.get(one.keys[0]) is not None and all(row.get(key) is not None for key in one.keys[1:])
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        there = [key for key in row if row[key] is not None]
        raise Malformed(f"no key {known_formats()}: {mended(there)}")
    one, other, *_ = found
    said = f"both {' and '.join(one.keys)} and {' and '.join(other.keys)} are there"
    raise Malformed(f"{said}: leave out what is not to be read, as jq -c 'del({_paths(other.keys)})' does")


def known_formats() -> str:
    """All formats by their keys, for an error."""
    return ", or ".join([" or ".join(TURN_KEYS), *(" and ".join(one.keys) for one in FORMATS[len(TURN_KEYS) :])])


def mended(names: Sequence[str], spark: bool = False) -> str:
    """The expression, of ``jq`` or ``spark``, that makes a format that is read of records with keys of these names."""
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), ("QUESTION", "ANSWER"))
    if spark:
        asked, answered = (name if _IDENTIFIER.fullmatch(name) else f"`{name}`" for name in pair)
        return f'df.selectExpr("{asked} AS prompt", "{answered} AS completion") makes one of two columns'
    return f"jq -c '{{prompt: {_paths(pair[:1])}, completion: {_paths(pair[1:])}}}' makes one of two keys"


def _paths(keys: Sequence[str]) -> str:
    return ", ".join(f".{key}" if _IDENTIFIER.fullmatch(key) else f'."{key}"' for key in keys)


def _text(row: Record, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(
            f"key {key} is {type(value).__name__}, not a string, which jq -c '{_paths([key])} |= tostring' makes it"
        )
    return value


def _with_system(row: Record, turns: object) -> object:
    """Turns after the system turn that stands beside them."""
    system = _text(row, "system")
    if not system or not isinstance(turns, list):
        return turns
    first = turns[0] if turns else None
    if isinstance(first, dict) and ("system" in first or "system" in (first.get("role"), first.get("from"))):
        raise Malformed("key system stands beside turns that begin with one: jq -c 'del(.system)' leaves it out")
    return [{"role": "system", "content": system}, *turns]


def _sharegpt(row: Record) -> object:
    turns = row["conversations"]
    if isinstance(turns, list):
        turns = [_sharegpt_turn(turn, number) for number, turn in enumerate(turns, 1)]
    return _with_system(row, turns)


def _sharegpt_turn(turn: object, number: int) -> object:
    if not isinstance(turn, dict) or turn.get("from") is None:
        return turn  # in the form of a chat template, or refused as one
    if turn.get("role") is not None or turn.get("content") is not None:
        raise Malformed(f"turn {number} has both from and role or content: leave out what is not to be read")
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise Malformed(
            f"turn {number} is from {speaker!r}, who is none of {', '.join(_SPEAKERS)}: as which it is meant, says "
            f'jq -c \'(.conversations[] | select(.from == "{speaker}").from) = "gpt"\''
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    value = turn.get("value")
    if speaker != "function_call":
        return {"role": role, "content": value, **rest}
    if isinstance(value, str):
        try:
            value = load_json(value)
        except Malformed as error:
            raise Malformed(f"the value of turn {number} (function_call) is no call: {error}") from error
    return {"role": role, "tool_calls": value if isinstance(value, list) else [value], **rest}


def _alpaca(row: Record) -> object:
    turns = []
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Malformed(f"number {number} of history is no list of a question and its answer, two strings")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(text for text in (_text(row, "instruction"), _text(row, "input")) if text)
    turns.append({"role": "user", "content": asked})
    if row.get("output") is not None:
        turns.append({"role": "assistant", "content": _text(row, "output")})
    return _with_system(row, turns)


def _alpaca_prompt(row: Record) -> object:
    return _alpaca({**row, "output": None})


def _prompt_completion(row: Record) -> object:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _with_system(row, [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise Malformed(
            f"prompt is {type(prompt).__name__} and completion {type(completion).__name__}: both must be texts or "
            "lists of turns; jq -c '.completion |= [{role: \"assistant\", content: .}]' makes a list of a text"
        )
    if not any(
        isinstance(turn, dict) and ("assistant" in turn or turn.get("role") == "assistant") for turn in completion
    ):
        raise Malformed("the completion has no assistant turn, and only it is trained on")
    return _with_system(row, [*(_untrained(turn, number) for number, turn in enumerate(prompt, 1)), *completion])


def _untrained(turn: object, number: int) -> object:
    """A turn of a prompt, which is not trained on."""
    if not isinstance(turn, dict):
        return turn
    asks = next((key for key in TRAIN_KEYS if turn.get(key)), None)
    if asks is not None:
        raise Malformed(
            f"the {asks} of turn {number} of the prompt is {turn[asks]!r}: only the completion is trained on"
        )
    return {**turn, TRAIN_KEYS[0]: 0}


SHAREGPT = Format("ShareGPT", ("conversations",), ("system",), _sharegpt)
ALPACA = Format("Alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca)
PROMPT_COMPLETION = Format("prompt/completion", ("prompt", "completion"), ("system",), _prompt_completion)
_MESSAGES = tuple(Format("messages", (key,), (), lambda row, key=key: row[key]) for key in TURN_KEYS)
#: Keys that hold nothing but turns.
LISTS_OF_TURNS = (*TURN_KEYS, *SHAREGPT.keys)
#: What is trained on.
FORMATS = (*_MESSAGES, SHAREGPT, ALPACA, PROMPT_COMPLETION)
#: What prompts may be: an answer that is there already is not asked for.
PROMPTS = (*_MESSAGES, SHAREGPT, Format("Alpaca", ("instruction",), ALPACA.beside, _alpaca_prompt))
