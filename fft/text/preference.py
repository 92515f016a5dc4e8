"""The task ``preference``: pairs of conversations, what was chosen and what was rejected, to rows of two documents.

Both are rendered and encoded as chats are, see :mod:`fft.text.chat`. What both begin with is their prompt; of what
follows, assistants' turns are trained on, of the prompt nothing. A pair is never cut: one that is longer than it may be
is left out, and so is one of which nothing is trained on a side; both are counted.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists, list_values
from fft.data.manifest import TokenizerInfo
from fft.errors import UserError
from fft.text.chat import Chat, Conversation, load_chat
from fft.text.chat_template import ChatTemplate
from fft.text.encoder import Encoder
from fft.text.engines import Recipe
from fft.text.formats import TRAIN_KEYS
from fft.text.messages import SPOKEN, TOOLS_KEY, WATCHED_BESIDE, check_beside, message_of, watched_columns
from fft.text.nested import check_json_type, json_rows
from fft.text.records import (
    Malformed,
    check_id,
    column_type,
    content_id,
    count_unused,
    decode_record,
    dump_json,
    id_column,
    id_of,
    load_json,
    row_ids,
)

#: The two sides of a pair, and what may stand beside them.
SIDES = ("chosen", "rejected")
_BESIDE = ("prompt", "system", TOOLS_KEY)
#: What records are told to be.
_FORMS = {"conversations": "two conversations", "completions": "a prompt and two answers", "dialogues": "HH dialogues"}
_TALLIES = (
    "trained_tokens",
    "with_special_strings",
    "left_out_turns",
    "left_out_questions",
    "long_pairs",
    "untrained_pairs",
    *(f"read_as_{form}" for form in _FORMS),
)
#: How a speaker is named in dialogues of Anthropic's HH.
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_DIALOGUE = re.compile(r"\s*\n\nHuman:")


@dataclass(frozen=True)
class Pair:
    """Two rendered conversations, and what kind of record they come from."""

    chosen: Conversation | None
    rejected: Conversation | None
    form: str


@dataclass(frozen=True)
class PreferencePairs:
    """The task ``preference``; see :class:`fft.text.records.RecordEncoder`. ``chat`` cuts nothing."""

    chat: Chat
    max_len: int | None = None

    columns_out = ("input_ids", "labels", "cu_seqlens", "doc_ids")
    tallies = _TALLIES
    vision, pairs, bytes_beside = None, True, 0

    @property
    def recipe(self) -> Recipe:
        """How texts become ids."""
        return self.chat.recipe

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return self.chat.template

    def held(self, document: Pair | None) -> int:
        """Nothing but texts."""
        return 0

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The columns of a pair, and the id's if there is one. Raises :class:`UserError` where a side is missing."""
        for name in SIDES:
            if name not in schema.names:
                raise UserError(
                    f"`inputs` {where} has no column {name} (it has {', '.join(schema.names)}): preferences have the "
                    f"columns {' and '.join(SIDES)}, and perhaps prompt."
                )
        names = [name for name in (*_BESIDE, *SIDES) if name in schema.names]
        for name in names:
            check_json_type(column_type(schema, where, name), f"`inputs` {where}: column {name}")
        names += watched_columns(schema, where, names)
        return [*names, *id_column(schema, where, self.chat.id_key)]

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes, str | None]]:
        """The columns that are read as one JSON object, but for the id's; and the id."""
        columns = batch.select([name for name in batch.schema.names if name != self.chat.id_key])
        watched = [name for name in columns.schema.names if name in WATCHED_BESIDE]
        return zip(json_rows(columns, watched), row_ids(batch, self.chat.id_key), strict=True)

    def parse(
        self, kind: str, record: bytes | None, doc_id: str | None, unused: Counter[str] | None = None
    ) -> tuple[Pair, str]:
        """The pair and its id, else a hash. Raises :class:`Malformed`."""
        row = load_json(decode_record(record))
        if not isinstance(row, dict):
            raise Malformed(f"not a JSON object but {type(row).__name__}")
        count_unused(row, (*SIDES, *_BESIDE, self.chat.id_key), unused)
        check_beside(row, _BESIDE, "preferences have no images")
        turns, form = read_pair(row, self.template.keys)
        own = id_of(row, self.chat.id_key)
        doc_id = doc_id if own is None else own
        if doc_id is None:
            doc_id = content_id(dump_json([*turns, row.get(TOOLS_KEY)] if row.get(TOOLS_KEY) else list(turns)))
        sides = []
        for name, side in zip(SIDES, turns, strict=True):
            told = {"messages": side, TOOLS_KEY: row.get(TOOLS_KEY)}
            text = json.dumps(told, ensure_ascii=False).encode(errors="surrogatepass")
            try:
                sides.append(self.chat.parse("json", text, doc_id, unused)[0])
            except Malformed as error:
                raise Malformed(f"{name}: {error}") from error
        return Pair(sides[0], sides[1], form), check_id(doc_id)

    def token_rows(
        self, documents: Sequence[tuple[Pair, str]], encoder: Encoder
    ) -> tuple[pa.RecordBatch, Counter[str]]:
        """A row a pair, of two documents, but for those that are left out."""
        given = [(pair, name) for pair, name in documents if pair.chosen is not None and pair.rejected is not None]
        chats = [(side, name) for pair, name in given for side in (pair.chosen, pair.rejected)]
        made, counted = self.chat.token_rows(chats, encoder)
        rows = pa.Table.from_batches([made])
        (ids, offsets), (labels, _) = (list_values(rows, name, "the pairs") for name in ("input_ids", "labels"))
        lengths = np.diff(offsets).reshape(-1, 2)
        marked = np.append(labels >= 0, False)
        before = np.append(0, np.cumsum(marked))
        # A document's first token is not predicted.
        trained = (before[offsets[1:]] - before[offsets[:-1]] - marked[offsets[:-1]]).reshape(-1, 2)
        long = lengths.sum(1) > self.max_len if self.max_len is not None else np.zeros(len(lengths), bool)
        untrained = (trained == 0).any(1) & ~long
        kept = ~(long | untrained)
        tokens = np.repeat(np.repeat(kept, 2), lengths.ravel())
        ids, labels, lengths = ids[tokens], labels[tokens], lengths[kept]
        row_offsets = np.append(0, lengths.sum(1).cumsum())
        bounds = np.concatenate([np.zeros((len(lengths), 1), np.int64), lengths.cumsum(1)], axis=1)
        named = [name for (_, name), one in zip(given, kept.tolist(), strict=True) if one]
        columns = [
            int_lists(ids, row_offsets),
            int_lists(labels, row_offsets),
            int_lists(bounds.ravel(), np.arange(0, bounds.size + 1, 3)),
            pa.array([[name, name] for name in named], pa.list_(pa.string())),
        ]
        counts = Counter({name: counted[name] for name in (*_TALLIES, "checked") if name in counted})
        counts.update(long_pairs=int(long.sum()), untrained_pairs=int(untrained.sum()), documents_out=int(kept.sum()))
        counts["empty"] = len(documents) - counts["documents_out"]
        counts["trained_tokens"] = int(np.count_nonzero(labels >= 0))
        counts.update(f"read_as_{pair.form}" for pair, _ in given)
        return pa.RecordBatch.from_arrays(columns, self.columns_out), counts

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """What the user should know about the tokenizer and these counts."""
        read = [(told, counts.get(f"read_as_{form}", 0)) for form, told in _FORMS.items()]
        told = ", as ".join(f"{name}: {count:,} record{'s' * (count != 1)}" for name, count in read if count)
        notes = [f"note: read as {told}."] if told else []
        if counts.get("long_pairs"):
            notes.append(
                f"note: {counts['long_pairs']} pairs of more than max_len {self.max_len} tokens were left out: a pair "
                "is never cut."
            )
        if counts.get("untrained_pairs"):
            notes.append(
                f"note: {counts['untrained_pairs']} pairs were left out, since nothing is trained on of a side."
            )
        return [*notes, *self.chat.notes({**counts, "cut_conversations": 0})]


def load_preference(directory: Path, id_key: str, max_len: int | None) -> tuple[PreferencePairs, TokenizerInfo]:
    """Read tokenizer and chat template, see :func:`fft.text.chat.load_chat`; pairs of more than ``max_len`` tokens are
    left out. Raises :class:`UserError` when one is missing or not understood.
    """
    chat, info = load_chat(directory, id_key, None)
    return PreferencePairs(chat, max_len), info


def read_pair(row: Mapping[str, Any], template_keys: Collection[str] = ()) -> tuple[tuple[list[dict], list[dict]], str]:
    """The turns of a record's chosen and rejected conversation, those that both begin with not to be trained on; and
    what it was read as. Turns are the same if they are in what is said, and in ``template_keys``: a date, or whether
    one is trained on, parts no conversations.

    Each side is a list of turns, all of the conversation, or what follows the turns of ``prompt``; or a text, which
    answers the text of ``prompt``; or, without it, a dialogue as those of Anthropic's HH. Raises :class:`Malformed`.
    """
    for name in SIDES:
        if row.get(name) is None:
            raise Malformed(f"key {name} is missing")
    (chosen, form), (rejected, other) = (_conversation(row, name) for name in SIDES)
    if form != other:
        raise Malformed(f"chosen is of {_FORMS[form]}, rejected of {_FORMS[other]}: both must be of one kind")
    told = SPOKEN.union(template_keys).difference(TRAIN_KEYS)
    said = [[{key: turn[key] for key in turn if key in told} for turn in side] for side in (chosen, rejected)]
    shared = sum(1 for _ in takewhile(bool, map(eq, *said)))
    if shared == len(chosen) == len(rejected):
        raise Malformed("chosen and rejected are the same")
    for name, turns in zip(SIDES, (chosen, rejected), strict=True):
        if not any(turn["role"] == "assistant" for turn in turns[shared:]):
            raise Malformed(f"{name} has no assistant turn after what both sides begin with")
        if not shared or turns[shared]["role"] in ("system", "user"):
            raise Malformed(
                f"{name} parts from the other side at turn {shared + 1}: a pair is two answers to one prompt"
            )
    prompt = [_untrained(turn) for turn in chosen[:shared]]
    return ([*prompt, *chosen[shared:]], [*prompt, *rejected[shared:]]), form


def _conversation(row: Mapping[str, Any], name: str) -> tuple[list[dict], str]:
    """All turns of a side, and what it was read as."""
    side, prompt = row[name], row.get("prompt")
    if isinstance(side, str):
        if prompt is None:
            return _with_system(row, _dialogue(side, name)), "dialogues"
        if not isinstance(prompt, str):
            raise Malformed(
                f"prompt is {type(prompt).__name__} and {name} a text: both must be texts or lists of turns"
            )
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": side}]
        return _with_system(row, turns), "completions"
    if not isinstance(side, list):
        raise Malformed(f"{name} is {type(side).__name__}: it must be a list of turns, or a text")
    turns = [_turn(turn, number, name) for number, turn in enumerate(side, 1)]
    if prompt is None:
        return _with_system(row, turns), "conversations"
    spoken = turns
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
        spoken = [turn for turn in turns if turn["role"] != "system"]
    elif isinstance(prompt, list):
        asked = [_turn(turn, number, "prompt") for number, turn in enumerate(prompt, 1)]
    else:
        raise Malformed(f"prompt is {type(prompt).__name__}: it must be a text or a list of turns")
    if asked and spoken[: len(asked)] == asked:  # it is there twice
        return _with_system(row, turns), "conversations"
    if not turns or turns[0]["role"] not in ("assistant", "tool"):
        first = turns[0]["role"] if turns else "nobody"
        raise Malformed(
            f"{name} begins with {first}, where the prompt's turns or an assistant's answer to them must be"
        )
    return _with_system(row, [*asked, *turns]), "completions"


def _turn(turn: object, number: int, name: str) -> dict:
    try:
        return message_of(turn, number)
    except Malformed as error:
        raise Malformed(f"{name}: {error}") from error


def _dialogue(text: str, name: str) -> list[dict]:
    """The turns of a text in which each begins with an empty line and its speaker."""
    if not _DIALOGUE.match(text):
        raise Malformed(
            f"{name} is a text without a prompt, and no dialogue that begins with an empty line and Human: : give the "
            "key prompt, or lists of turns"
        )
    _, *parts = _SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in turns]


def _with_system(row: Mapping[str, Any], turns: list[dict]) -> list[dict]:
    """Turns after the system turn that stands beside them."""
    system = row.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise Malformed(f"key system is {type(system).__name__}, not a string")
    if turns and turns[0]["role"] == "system":
        raise Malformed("key system stands beside turns that begin with one: jq -c 'del(.system)' leaves it out")
    return [{"role": "system", "content": system}, *turns]


def _untrained(turn: dict) -> dict:
    """A turn of what both sides begin with, which is not trained on, whatever it says of that."""
    return {**{key: value for key, value in turn.items() if key not in TRAIN_KEYS}, TRAIN_KEYS[0]: 0}
