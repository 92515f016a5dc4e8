"""The chat task: conversations to rows of ``input_ids`` and ``labels``, by the tokenizer's own chat template.

``input_ids`` are those of ``tokenizer.apply_chat_template(messages, tokenize=True)``; ``labels`` equal them where an
assistant's turn is trained on and are -100 elsewhere. :mod:`fft.text.chat_template` has the rule.

As there, text is encoded with the template's control tokens in it: a special token's string inside a content becomes
that control token as well. Such conversations are counted.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists, lists_of_one
from fft.data.manifest import TokenizerInfo
from fft.errors import UserError
from fft.text.chat_labels import encode_stretches, label
from fft.text.chat_template import ChatTemplate, Rendered, load_chat_template
from fft.text.cuts import cut_chat
from fft.text.encoder import Encoder, info_of, load_tokenizer, recipe_of
from fft.text.engines import Recipe
from fft.text.messages import TOOLS_KEY, TURN_KEYS, parse_conversation
from fft.text.nested import check_json_type, json_rows
from fft.text.records import check_id, column_type, content_id, dump_json, id_column, row_ids


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation; ``marked`` is true when a content holds a special token's string."""

    rendered: Rendered
    marked: bool


@dataclass(frozen=True)
class Chat:
    """The task ``chat``; see :class:`fft.text.records.RecordEncoder`."""

    template: ChatTemplate
    recipe: Recipe
    special: tuple[str, ...]
    id_key: str = "id"
    max_len: int | None = None

    columns_out = ("input_ids", "labels", "doc_ids")
    tallies = (
        "trained_tokens",
        "cut_conversations",
        "dropped_tokens",
        "with_special_strings",
        "left_out_turns",
        "without_trained_turns",
    )

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The columns of turns, and the id's if there is one. Raises :class:`UserError` when there are no turns."""
        names = [name for name in TURN_KEYS if name in schema.names]
        if not names:
            raise UserError(
                f"`inputs` {where} has no column {' or '.join(TURN_KEYS)} (it has {', '.join(schema.names)}): "
                "rename it."
            )
        for name in names:
            kind = column_type(schema, where, name)
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise UserError(f"`inputs` {where}: column {name} is {kind}, it must be an array of turns.")
        names += [TOOLS_KEY] if TOOLS_KEY in schema.names else []
        for name in names:
            check_json_type(column_type(schema, where, name), f"`inputs` {where}: column {name}")
        return [*names, *id_column(schema, where, self.id_key)]

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes, str | None]]:
        """The columns of turns and tools as one JSON object, and the id."""
        columns = batch.select([name for name in (*TURN_KEYS, TOOLS_KEY) if name in batch.schema.names])
        return zip(json_rows(columns), row_ids(batch, self.id_key), strict=True)

    def parse(
        self, kind: str, record: bytes | None, doc_id: str | None, unused: Counter[str] | None = None
    ) -> tuple[Conversation | None, str]:
        """The conversation (None if it has no turns) and its id, else a hash. Raises :class:`Malformed`."""
        raw = parse_conversation(record, self.id_key, self.template.keys, unused)
        doc_id = doc_id if raw.doc_id is None else raw.doc_id
        if doc_id is None:
            beside = [part for part in (sorted(raw.untrained), raw.tools) if part]
            doc_id = content_id(dump_json([raw.messages, *beside] if beside else raw.messages))
        if not raw.messages:
            return None, check_id(doc_id)
        rendered = self.template.locate(raw.messages, raw.tools, raw.untrained)
        pattern = _any_of(self.special)
        marked = any(pattern.search(message["content"]) for message in raw.messages)
        return Conversation(rendered, marked) if rendered.text else None, check_id(doc_id)

    def token_rows(
        self, documents: Sequence[tuple[Conversation | None, str]], encoder: Encoder
    ) -> tuple[pa.RecordBatch, Counter[str]]:
        """Rows of a batch's conversations, none for those that are empty."""
        chats = [(chat, name) for chat, name in documents if chat is not None]
        texts = [chat.rendered.text for chat, _ in chats]
        positions = [[c for t in chat.rendered.turns for c in (t.start, t.end, t.stop)] for chat, _ in chats]
        ids, offsets, found, checked = encode_stretches(encoder, texts, positions)
        counts = Counter(documents_out=len(chats), empty=len(documents) - len(chats), checked=checked)
        begins, ends, names, starts, stops = [], [], [], [], []
        for (chat, name), (after, at), offset, length in zip(
            chats, found, offsets[:-1].tolist(), np.diff(offsets).tolist(), strict=True
        ):
            turns = chat.rendered.turns
            counts["left_out_turns"] += chat.rendered.left_out
            counts["without_trained_turns"] += all(turn.start == turn.end for turn in turns)
            first, last = at[0::3], np.where([t.start < t.end for t in turns], after[1::3], at[0::3])
            begins.append(first + offset)
            ends.append(last + offset)
            bounds = zip(first.tolist(), last.tolist(), after[2::3].tolist(), [t.opens for t in turns], strict=True)
            cuts = cut_chat(length, list(bounds), self.max_len) or [(0, self.max_len or length)]
            names += [name] * len(cuts)
            starts += [offset + begin for begin, _ in cuts]
            stops += [offset + end for _, end in cuts]
            counts["cut_conversations"] += cuts != [(0, length)]
            counts["dropped_tokens"] += length - sum(end - begin for begin, end in cuts)
            counts["with_special_strings"] += chat.marked
        labels = label(ids, _joined(begins), _joined(ends))
        lengths = np.array(stops, np.int64) - np.array(starts, np.int64)
        row_offsets = np.append(0, np.cumsum(lengths))
        if counts["dropped_tokens"]:
            kept = np.repeat(starts - row_offsets[:-1], lengths) + np.arange(row_offsets[-1])
            ids, labels = ids[kept], labels[kept]
        counts["trained_tokens"] = int(np.count_nonzero(labels >= 0))
        doc_ids = lists_of_one(pa.array(names, pa.string()))
        columns = [int_lists(ids, row_offsets), int_lists(labels, row_offsets), doc_ids]
        return pa.RecordBatch.from_arrays(columns, self.columns_out), counts

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """What the user should know about the tokenizer and these counts."""
        notes = list(self.recipe.notes)
        if counts["cut_conversations"]:
            notes.append(
                f"note: {counts['cut_conversations']} conversations longer than max_len {self.max_len} were cut; "
                f"{counts['dropped_tokens']} tokens on which nothing is trained were dropped."
            )
        if counts["with_special_strings"]:
            notes.append(
                f"note: {counts['with_special_strings']} conversations hold a special token's string; it became that "
                "control token, as in apply_chat_template."
            )
        if counts.get("left_out_turns"):
            notes.append(f"note: the chat template leaves out {counts['left_out_turns']} assistants' turns.")
        if counts.get("without_trained_turns") and self.template.end_of_turn:
            notes.append(f"note: nothing is trained on in {counts['without_trained_turns']} conversations.")
        if not self.template.end_of_turn:
            notes.append("warning: the chat template ends no assistant turn with a special token: none is trained on.")
        if "strftime_now" in self.template.source:
            notes.append(f"note: the chat template writes the date; every row has {self.template.date:%Y-%m-%d}.")
        return notes


def load_chat(directory: Path, id_key: str, max_len: int | None) -> tuple[Chat, TokenizerInfo]:
    """Read tokenizer and chat template on the driver. Raises :class:`UserError` when either is missing."""
    tokenizer = load_tokenizer(directory)
    template = load_chat_template(tokenizer, str(directory))
    recipe = recipe_of(tokenizer, (), (), parse_special_tokens=not getattr(tokenizer, "split_special_tokens", False))
    special = tuple(sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}))
    return Chat(template, recipe, special, id_key, max_len), info_of(tokenizer, directory)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


@lru_cache(maxsize=2)
def _any_of(strings: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, strings)) or "(?!)")
