"""Conversations as data sets write them, read into the messages that a chat template takes. Pure functions.

The keys that are understood stand here, and nowhere else; docs/inputs.md explains them. Of all others, those that
would change what is rendered or trained on are refused by name, and the rest is counted as unused.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fft.text.image_parts import IMAGE_KEYS, ImageParts, Source
from fft.text.records import Malformed, count_unused, decode_record, dump_json, id_of, load_json

#: Keys of a JSON object (columns of a parquet file) that may hold the turns.
TURN_KEYS = ("messages", "conversation")
#: Beside the turns: what the model may call, a list of JSON schemas, or that list as JSON text.
TOOLS_KEY = "tools"
ROLES = ("system", "user", "assistant", "tool")
#: Keys of a turn that say whether it is trained on: 1 or true, 0 or false.
TRAIN_KEYS = ("weight", "train", "loss")

_REFUSED_BESIDE_TURNS = {
    "system": "make it the first turn",
    "functions": "give them as tools",
    "documents": "documents are not supported",
    "chat_template_kwargs": "settings of the chat template are not supported",
    **dict.fromkeys(IMAGE_KEYS, "images are read with --image_path"),
    **dict.fromkeys(("videos", "audios"), "this release reads texts and images alone"),
}
_REFUSED_IN_A_TURN = {
    "tool_calls": "tool calls",
    "function_call": "a function call",
    "loss_scale": "a scale of its loss",
    "train_detail": "a choice of characters to train on",
    "training_detail": "a choice of characters to train on",
    **dict.fromkeys(("images", "image", "videos", "video", "audio"), "an image, a sound or a film"),
}
_TRAIN_KEYS = frozenset(TRAIN_KEYS)
_UNDERSTOOD_IN_A_TURN = frozenset(("role", "content", *TRAIN_KEYS, *_REFUSED_IN_A_TURN))


@dataclass(frozen=True)
class RawConversation:
    """``messages`` have ``role`` and ``content``, and further keys for the template; ``untrained`` are the numbers,
    from 0, of assistants' turns that say that they are not trained on. ``tools`` are JSON schemas, if there are any.
    ``images`` are those of all turns, in order, where they are read; contents have what stands for them."""

    messages: list[dict]
    doc_id: str | None
    untrained: frozenset[int] = frozenset()
    tools: tuple[dict, ...] = ()
    images: tuple[Source, ...] = ()


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
) -> RawConversation:
    """The turns of a record that is read already, whoever speaks last; without an id.

    A record is a list of turns, or an object with such a list under ``messages`` or ``conversation``. A turn is
    ``{"user": "text"}`` or ``{"role": "user", "content": "text"}``; further keys of the latter form go to the chat
    template as they are. Keys that are neither understood nor among ``template_keys``, or in the object among those
    ``beside``, are counted in ``unused``. With ``images``, contents may hold some, or they stand beside the turns.
    Raises :class:`Malformed` with the number of the turn, from 1.
    """
    tools: tuple[dict, ...] = ()
    waiting = None
    if isinstance(row, dict):
        read = IMAGE_KEYS if images is not None else ()
        count_unused(row, (*TURN_KEYS, TOOLS_KEY, *beside, *read), unused)
        tools = _tools_of(row)
        waiting = images.beside(row) if images is not None else None
        row = _turns_of(row, read)
    if not isinstance(row, list):
        raise Malformed(f"not a list of turns but {type(row).__name__}")
    messages, untrained, found = [], set(), []
    for number, turn in enumerate(row):
        message, trained = _message(turn, number + 1, images)
        if images is not None:
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
    return RawConversation(messages, None, frozenset(untrained), tools, tuple(found))


def check_unicode(value: object) -> None:
    """Raise :class:`Malformed` for a value of JSON in which a text is none, as an escape of half a character makes."""
    try:
        dump_json(value).encode()
    except UnicodeEncodeError as error:
        raise Malformed("a lone surrogate, which is no Unicode text") from error


def _turns_of(row: Mapping[str, object], read: Collection[str] = ()) -> object:
    found = [key for key in TURN_KEYS if row.get(key) is not None]
    if len(found) != 1:
        raise Malformed(f"both {' and '.join(found)} are there" if found else f"no key {' or '.join(TURN_KEYS)}")
    for key, reason in _REFUSED_BESIDE_TURNS.items():
        if row.get(key) and key not in read:
            raise Malformed(f"key {key} beside the turns: {reason}")
    for key in TRAIN_KEYS:
        if row.get(key) in (0, False) and row.get(key) is not None:
            raise Malformed(f"key {key} beside the turns says not to train on it: leave the record out")
    return row[found[0]]


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
    if len(turn) > 2 or "content" not in turn:
        for key, what in _REFUSED_IN_A_TURN.items():
            if turn.get(key):
                raise Malformed(f"turn {number} ({turn['role']}) has {what} ({key}), which is not supported")
    if not isinstance(turn.get("content"), str) and (images is None or "content" not in turn):
        found = f"is {type(turn['content']).__name__}, not a string" if "content" in turn else "is missing"
        raise Malformed(f"the content of turn {number} ({turn['role']}) {found}")
    return turn, _is_trained(flags, turn["role"], number)


def _is_trained(flags: Mapping[str, object], role: str, number: int) -> bool:
    for key, value in flags.items():
        if value not in (0, 1):  # false and true are these, too
            raise Malformed(f"the {key} of turn {number} ({role}) is {value!r}: only 0, 1, false and true are known")
        if value and role != "assistant":
            raise Malformed(f"the {key} of turn {number} ({role}) is {value!r}: only assistants' turns are trained on")
    return all(flags.values())
