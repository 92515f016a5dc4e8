"""Conversations as data sets write them, read into the messages that a chat template takes. Pure functions.

The keys that are understood stand here, and nowhere else; docs/inputs.md explains them. Of all others, those that
would change what is rendered or trained on are refused by name, and the rest is counted as unused.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from fft.text.formats import TRAIN_KEYS, Format, format_of
from fft.text.image_parts import IMAGE_KEYS, IMAGE_KINDS, ImageParts, Source
from fft.text.records import Malformed, column_type, count_unused, decode_record, dump_json, id_of, load_json
from fft.text.tool_calls import CALLS_KEY, OLD_KEY, read_calls

#: Beside the turns: what the model may call, a list of JSON schemas, or that list as JSON text.
TOOLS_KEY = "tools"
ROLES = ("system", "user", "assistant", "tool", "developer")

_REFUSED_BESIDE_TURNS = {
    "system": "make it the first turn",
    "functions": "give them as tools",
    "documents": "documents are not supported",
    "chat_template_kwargs": "settings of the chat template are not supported",
    **dict.fromkeys(IMAGE_KEYS, "images are read with --image_path"),
    **dict.fromkeys(("videos", "audios"), "this release reads texts and images alone"),
}
_REFUSED_IN_A_TURN = {
    "loss_scale": "a scale of its loss",
    "train_detail": "a choice of characters to train on",
    "training_detail": "a choice of characters to train on",
    **dict.fromkeys(("images", "image", "videos", "video", "audio"), "an image, a sound or a film"),
}
#: Keys beside the turns for which :func:`check_beside` refuses a record: also a table's columns must be read for it.
WATCHED_BESIDE = (*_REFUSED_BESIDE_TURNS, *TRAIN_KEYS)
_TRAIN_KEYS = frozenset(TRAIN_KEYS)
#: Keys of a turn that are rendered, if anything is; a template may know others.
SPOKEN = frozenset(("role", "content", CALLS_KEY, OLD_KEY))
_UNDERSTOOD_IN_A_TURN = SPOKEN.union(TRAIN_KEYS, _REFUSED_IN_A_TURN)


@dataclass(frozen=True)
class RawConversation:
    """``messages`` have ``role`` and ``content``, and further keys for the template; a content is a text, or None in a
    turn that has ``tool_calls``, whose arguments are objects. ``untrained`` are the numbers, from 0, of assistants'
    turns that say that they are not trained on. ``tools`` are JSON schemas, if there are any. ``images`` are those of
    all turns, in order, where they are read; contents have what stands for them. ``form`` is what the record was read
    as, None for a list of turns."""

    messages: list[dict]
    doc_id: str | None
    untrained: frozenset[int] = frozenset()
    tools: tuple[dict, ...] = ()
    images: tuple[Source, ...] = ()
    form: Format | None = field(default=None, compare=False)


def parse_conversation(
    record: bytes | None,
    id_key: str,
    template_keys: Collection[str] = (),
    unused: Counter[str] | None = None,
    images: ImageParts | None = None,
) -> RawConversation:
    """Read one JSON record to train on; one without turns has no messages.

    See :func:`read_conversation`. Raises :class:`Malformed`, also where no turn is an assistant's.
    """
    row = load_json(decode_record(record))
    raw = read_conversation(row, template_keys, unused, (id_key,), images)
    if isinstance(row, dict):
        raw = replace(raw, doc_id=id_of(row, id_key))
    if raw.messages and not any(message["role"] == "assistant" for message in raw.messages):
        raise Malformed("no assistant turn")
    if b"\\u" in (record or b""):  # only an escape can bring one
        check_unicode([raw.messages, raw.doc_id, raw.tools])
    return raw


def read_conversation(
    row: object,
    template_keys: Collection[str] = (),
    unused: Counter[str] | None = None,
    beside: Collection[str] = (),
    images: ImageParts | None = None,
    formats: Sequence[Format] = (),
) -> RawConversation:
    """The turns of a record that is read already, whoever speaks last; without an id.

    A record is a list of turns, or an object of one of the ``formats``, by default of all in :mod:`fft.text.formats`.
    A turn is ``{"user": "text"}`` or ``{"role": "user", "content": "text"}``; further keys of the latter form go to the
    chat template as they are. Keys that are neither understood nor among ``template_keys``, or in the object among
    those ``beside``, are counted in ``unused``. With ``images``, contents may hold some, or they stand beside the
    turns. Raises :class:`Malformed` with the number of the turn, from 1.
    """
    tools: tuple[dict, ...] = ()
    waiting = form = None
    if isinstance(row, dict):
        form = format_of(row, formats)
        read = (*form.keys, *form.beside, *(IMAGE_KEYS if images is not None else ()))
        count_unused(row, (TOOLS_KEY, *read, *beside), unused)
        tools = _tools_of(row)
        waiting = images.beside(row) if images is not None else None
        check_beside(row, read)
        row = form.turns(row)
    if not isinstance(row, list):
        raise Malformed(f"not a list of turns but {type(row).__name__}")
    messages, untrained, found = [], set(), []
    for number, turn in enumerate(row):
        message, trained = _message(turn, number + 1, images)
        if images is not None and message["content"] is not None:
            where = f"turn {number + 1} ({message['role']})"
            message["content"], own = images.content(message["content"], where, waiting, unused)
            found += own
        messages.append(message)
        if not trained:
            untrained.add(number)
        if len(message) > 2:
            count_unused(message, _UNDERSTOOD_IN_A_TURN.union(template_keys), unused, "of a turn")
    if waiting:
        raise Malformed(f"{len(waiting)} images beside the turns are in none: mark their places with <image>")
    return RawConversation(messages, None, frozenset(untrained), tools, tuple(found), form)


def check_unicode(value: object) -> None:
    """Raise :class:`Malformed` for a value of JSON in which a text is none, as an escape of half a character makes."""
    try:
        dump_json(value).encode()
    except UnicodeEncodeError as error:
        raise Malformed("a lone surrogate, which is no Unicode text") from error


def check_beside(row: Mapping[str, object], read: Collection[str], images: str = "") -> None:
    """Raise :class:`Malformed` for a key beside the turns, not among those that are ``read``, that would change what is
    rendered, and for one that says that the record is not trained on. ``images`` is why there can be none."""
    for key, reason in _REFUSED_BESIDE_TURNS.items():
        if row.get(key) and key not in read:
            reason = images if images and key in IMAGE_KEYS else reason
            raise Malformed(f"key {key} beside the turns: {reason}")
    for key in TRAIN_KEYS:
        if row.get(key) in (0, False) and row.get(key) is not None:
            raise Malformed(f"key {key} beside the turns says not to train on it: leave the record out")


def watched_columns(schema: pa.Schema, where: str, read: Collection[str]) -> list[str]:
    """The columns that :func:`check_beside` has to see, but for those that are ``read``. Raises :class:`UserError` when
    two have one name."""
    found = [name for name in WATCHED_BESIDE if name in schema.names and name not in read]
    return [name for name in found if not pa.types.is_null(column_type(schema, where, name))]


def _tools_of(row: Mapping[str, object]) -> tuple[dict, ...]:
    tools = row.get(TOOLS_KEY)
    if isinstance(tools, str) and tools.strip():
        tools = load_json(tools)
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Malformed(f"{TOOLS_KEY} are no list of objects")
    return tuple(tools)


def message_of(turn: object, number: int) -> dict:
    """A turn, ``{"user": "text"}`` or ``{"role": "user", "content": "text"}``, as a message in the latter form.

    What is null is left out, as transformers does; further keys of the latter form stay. Raises :class:`Malformed`.
    """
    if not isinstance(turn, dict):
        raise Malformed(f"turn {number} is {type(turn).__name__}, not an object")
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message:
        if len(message) != 1:
            raise Malformed(f"turn {number} must have one role as its key, it has {', '.join(message) or 'none'}")
        ((role, content),) = message.items()
        message = {"role": role, "content": content}
    if message["role"] not in ROLES:
        raise Malformed(f"turn {number} has the unknown role {message['role']!r}")
    return message


def _message(turn: object, number: int, images: ImageParts | None) -> tuple[dict, bool]:
    """The message of a turn, and whether it says that it may be trained on. Only ``images`` may read its content."""
    flags = {}
    if isinstance(turn, dict) and not _TRAIN_KEYS.isdisjoint(turn):
        turn = {key: value for key, value in turn.items() if value is not None}
        flags = {key: turn.pop(key) for key in TRAIN_KEYS if key in turn} if len(turn) > 1 else {}
    turn = message_of(turn, number)
    role = turn["role"]
    if len(turn) > 2 or "content" not in turn:
        where = f"turn {number} ({role})"
        for key, what in _REFUSED_IN_A_TURN.items():
            if turn.get(key):
                raise Malformed(f"{where} has {what} ({key}), which is not supported")
        if calls := read_calls(turn, where):
            turn = {"content": None, **turn, CALLS_KEY: calls}
            turn.pop(OLD_KEY, None)
    if not isinstance(turn.get("content"), str) and (images is None or turn.get("content") is None):
        turn["content"] = _content(turn, f"turn {number} ({role})")
    return turn, _is_trained(flags, role, number)


def _content(turn: Mapping[str, object], where: str) -> str | None:
    """The content of a turn without images that is no string: texts of a list of parts, or None beside calls."""
    content = turn.get("content")
    if content is None:
        if turn.get(CALLS_KEY):
            return None
        raise Malformed(f"the content of {where} is missing")
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise Malformed(
            f"the content of {where} is {type(content).__name__}, not a string; jq -c '(.messages[].content | "
            'select(type != "string")) |= tojson\' makes it one'
        )
    texts = []
    for number, part in enumerate(content, 1):
        kind = part.get("type", "text" if "text" in part else None)
        if kind != "text":
            remedy = "images are read with --image_path" if kind in IMAGE_KINDS else "only texts are known"
            raise Malformed(f"part {number} of {where} is of type {kind!r}: {remedy}")
        if not isinstance(part.get("text"), str):
            raise Malformed(f"part {number} of {where} is of type text and has none")
        texts.append(part["text"])
    return "".join(texts)


def _is_trained(flags: Mapping[str, object], role: str, number: int) -> bool:
    for key, value in flags.items():
        if value not in (0, 1):  # false and true are these, too
            raise Malformed(f"the {key} of turn {number} ({role}) is {value!r}: only 0, 1, false and true are known")
        if value and role != "assistant":
            raise Malformed(f"the {key} of turn {number} ({role}) is {value!r}: only assistants' turns are trained on")
    if len({bool(value) for value in flags.values()}) > 1:
        raise Malformed(f"{' and '.join(flags)} of turn {number} ({role}) contradict each other: leave one out")
    return all(flags.values())
