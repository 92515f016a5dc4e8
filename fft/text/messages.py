"""Conversations as data sets write them, read into the messages that a chat template takes. Pure functions."""

import json

from fft.text.records import Malformed, decode_record, id_of, load_json

#: Keys of a JSON object (columns of a parquet file) that may hold the turns.
TURN_KEYS = ("messages", "conversation")
ROLES = ("system", "user", "assistant", "tool")


def parse_conversation(record: bytes | None, id_key: str) -> tuple[list[dict], str | None]:
    """Messages (dicts with ``role`` and ``content``) and id of one JSON record; an empty list for one without turns.

    A record is a list of turns, or an object with such a list under ``messages`` or ``conversation``. A turn is
    ``{"user": "text"}`` or ``{"role": "user", "content": "text"}``; further keys of the latter form go to the chat
    template as they are. Raises :class:`Malformed` with the number of the turn, from 1.
    """
    row, doc_id = load_json(decode_record(record)), None
    if isinstance(row, dict):
        doc_id = id_of(row, id_key)
        row = _turns_of(row)
    if not isinstance(row, list):
        raise Malformed(f"not a list of turns but {type(row).__name__}")
    messages = [_message(turn, number) for number, turn in enumerate(row, 1)]
    if messages and not any(message["role"] == "assistant" for message in messages):
        raise Malformed("no assistant turn")
    if b"\\u" in (record or b""):  # only an escape can bring one
        try:
            json.dumps([messages, doc_id], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Malformed("a lone surrogate, which is no Unicode text") from error
    return messages, doc_id


def _turns_of(row: dict) -> object:
    found = [key for key in TURN_KEYS if row.get(key) is not None]
    if len(found) != 1:
        raise Malformed(f"both {' and '.join(found)} are there" if found else f"no key {' or '.join(TURN_KEYS)}")
    if row.get("tools"):
        raise Malformed("tools are not supported")
    return row[found[0]]


def _message(turn: object, number: int) -> dict:
    if not isinstance(turn, dict):
        raise Malformed(f"turn {number} is {type(turn).__name__}, not an object")
    turn = {key: value for key, value in turn.items() if value is not None}  # as transformers does
    if "role" not in turn:
        if len(turn) != 1:
            raise Malformed(f"turn {number} must have one role as its key, it has {', '.join(turn) or 'none'}")
        ((role, content),) = turn.items()
        turn = {"role": role, "content": content}
    if turn["role"] not in ROLES:
        raise Malformed(f"turn {number} has the unknown role {turn['role']!r}")
    if not isinstance(turn.get("content"), str):
        found = f"is {type(turn['content']).__name__}, not a string" if "content" in turn else "is missing"
        raise Malformed(f"the content of turn {number} ({turn['role']}) {found}")
    if turn.get("tool_calls"):
        raise Malformed(f"turn {number} has tool calls, which are not supported")
    return turn
