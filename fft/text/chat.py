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
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists, lists_of_one
from fft.data.manifest import TokenizerInfo
from fft.errors import UserError
from fft.images.rules import TILES, ImageSettings, load_rules
from fft.text.chat_labels import NOT_TRAINED, encode_stretches, label
from fft.text.chat_template import ChatTemplate, Rendered, load_chat_template
from fft.text.cuts import cut_chat, first_row
from fft.text.encoder import Encoder, ImageIds, image_ids_of, info_of, load_tokenizer, recipe_of
from fft.text.engines import Recipe
from fft.text.formats import FORMATS, LISTS_OF_TURNS, Format, known_formats, mended
from fft.text.image_parts import IMAGE_KEYS, ImageParts, ReadImage
from fft.text.image_tokens import as_parts, expand, written_image
from fft.text.messages import TOOLS_KEY, WATCHED_BESIDE, RawConversation, parse_conversation, watched_columns
from fft.text.nested import check_json_type, json_rows
from fft.text.records import Malformed, check_id, column_type, content_id, dump_json, id_column, row_ids
from fft.text.tool_calls import CALLS_KEY

#: How many bytes a byte of input brings along where images lie in files of their own: a guess that makes parts small.
_BYTES_OF_IMAGES = 7


_TALLIES = (
    "trained_tokens",
    "cut_conversations",
    "dropped_tokens",
    "with_special_strings",
    "left_out_turns",
    "left_out_questions",
    "without_trained_turns",
    *dict.fromkeys(form.tally for form in FORMATS),
)
_TALLIES_OF_IMAGES = ("animations", "dropped_images")


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation; ``marked`` is true when a content holds a special token's string, ``form`` is the
    format of its record."""

    rendered: Rendered
    marked: bool
    images: tuple[ReadImage, ...] = ()
    form: Format = FORMATS[0]


@dataclass(frozen=True)
class Chat:
    """The task ``chat``; see :class:`fft.text.records.RecordEncoder`."""

    template: ChatTemplate
    recipe: Recipe
    special: tuple[str, ...]
    id_key: str = "id"
    max_len: int | None = None
    images: ImageParts | None = None

    pairs = False

    @property
    def columns_out(self) -> tuple[str, ...]:
        """Columns of its rows: those of images where these are read, also of rows that have none."""
        columns = ("input_ids", "labels", "doc_ids")
        return columns if self.images is None else (*columns, "image_grids", "images")

    @property
    def tallies(self) -> tuple[str, ...]:
        """What it counts."""
        return _TALLIES if self.images is None else (*_TALLIES, *_TALLIES_OF_IMAGES)

    @property
    def vision(self) -> dict[str, Any] | None:
        """What is made of images."""
        return None if self.images is None else self.images.rules.facts()

    @property
    def bytes_beside(self) -> int:
        """Images come from files."""
        return 0 if self.images is None else _BYTES_OF_IMAGES

    def held(self, document: Conversation | None) -> int:
        """Bytes of its images."""
        return sum(len(image.data) for image in document.images) if document is not None and document.images else 0

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The columns of turns, and the id's if there is one. Raises :class:`UserError` when there are no turns."""
        formats = [form for form in FORMATS if form.fits(schema.names)]
        if not formats:
            raise UserError(
                f"`inputs` {where} has no column {known_formats()} (it has {', '.join(schema.names)}): "
                f"{mended(schema.names, spark=True)}."
            )
        asked = dict.fromkeys(key for form in formats for key in (*form.keys, *form.beside))
        names = [name for name in asked if name in schema.names]
        for name in names:
            kind = column_type(schema, where, name)
            if name in LISTS_OF_TURNS and not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise UserError(f"`inputs` {where}: column {name} is {kind}, it must be an array of turns.")
        names += [TOOLS_KEY] if TOOLS_KEY in schema.names else []
        for name in names:
            check_json_type(column_type(schema, where, name), f"`inputs` {where}: column {name}")
        names += self._image_keys(schema.names)
        names += watched_columns(schema, where, names)
        return [*names, *id_column(schema, where, self.id_key)]

    def _image_keys(self, names: Sequence[str]) -> list[str]:
        return [] if self.images is None else [name for name in IMAGE_KEYS if name in names]

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes, str | None]]:
        """The columns that are read as one JSON object, but for the id's; and the id."""
        columns = batch.select([name for name in batch.schema.names if name != self.id_key])
        watched = [name for name in columns.schema.names if name in WATCHED_BESIDE]
        return zip(json_rows(columns, watched), row_ids(batch, self.id_key), strict=True)

    def parse(
        self, kind: str, record: bytes | None, doc_id: str | None, unused: Counter[str] | None = None
    ) -> tuple[Conversation | None, str]:
        """The conversation (None if it has no turns) and its id, else a hash. Raises :class:`Malformed`."""
        raw = parse_conversation(record, self.id_key, self.template.keys, unused, self.images)
        doc_id = doc_id if raw.doc_id is None else raw.doc_id
        images = self._read(raw) if raw.images else ()
        if doc_id is None:
            hashes = [blake2b(image.data, digest_size=16).hexdigest() for image in images]
            beside = [part for part in (sorted(raw.untrained), raw.tools, hashes) if part]
            doc_id = content_id(dump_json([raw.messages, *beside] if beside else raw.messages))
        if not raw.messages:
            return None, check_id(doc_id)
        rendered = self.template.locate(raw.messages, raw.tools, raw.untrained)
        if self.images is not None:
            rendered = self._with_images(raw, rendered, self.images)
        pattern, contents = _any_of(self.special), [message["content"] or "" for message in raw.messages]
        if images and self.images is not None:  # what stands for them is no text's
            contents = [content.replace(self.images.written, "") for content in contents]
        contents += [dump_json(message[CALLS_KEY]) for message in raw.messages if message.get(CALLS_KEY)]
        marked = any(map(pattern.search, contents))
        chat = Conversation(rendered, marked, images, raw.form or FORMATS[0])
        return chat if rendered.text else None, check_id(doc_id)

    def _read(self, raw: RawConversation) -> tuple[ReadImage, ...]:
        if self.images is None:
            return ()
        return tuple(self.images.read(source, number) for number, source in enumerate(raw.images, 1))

    def _with_images(self, raw: RawConversation, rendered: Rendered, images: ImageParts) -> Rendered:
        """The rendered conversation or, where the template makes something else of lists of texts and images, that of
        these, as processors have it. Raises :class:`Malformed` where it does not have the images, and only these."""
        if raw.images:
            parts = as_parts(raw.messages, images.written)
            if self.template.render(parts, tools=raw.tools) != rendered.text:
                if any(message["role"] == "assistant" and isinstance(message["content"], list) for message in parts):
                    raise Malformed("the chat template renders an assistant's images elsewhere than they stand")
                rendered = self.template.locate(parts, raw.tools, raw.untrained)
        images.check_written(rendered.text, [m["content"] or "" for m in raw.messages], len(raw.images))
        return rendered

    def token_rows(
        self, documents: Sequence[tuple[Conversation | None, str]], encoder: Encoder
    ) -> tuple[pa.RecordBatch, Counter[str]]:
        """Rows of a batch's conversations, none for those that are empty."""
        chats = [(chat, name) for chat, name in documents if chat is not None]
        texts = [chat.rendered.text for chat, _ in chats]
        positions = [[c for t in chat.rendered.turns for c in (t.start, t.end, t.stop)] for chat, _ in chats]
        ids, offsets, found, checked = encode_stretches(encoder, texts, positions)
        counts = Counter(documents_out=len(chats), empty=len(documents) - len(chats), checked=checked)
        images = None
        if self.images is not None:
            images = expand(ids, offsets, [chat.images for chat, _ in chats], self.images.rules)
            ids, offsets, found = images.ids, images.offsets, images.move(found)
        begins, ends, cuts = [], [], []
        for i, ((chat, _), (after, at), offset, length) in enumerate(
            zip(chats, found, offsets[:-1].tolist(), np.diff(offsets).tolist(), strict=True)
        ):
            turns = chat.rendered.turns
            counts["left_out_turns"] += chat.rendered.left_out
            counts["left_out_questions"] += chat.rendered.unheard
            counts[chat.form.tally] += 1
            counts["without_trained_turns"] += all(turn.start == turn.end for turn in turns)
            first, last = at[0::3], np.where([t.start < t.end for t in turns], after[1::3], at[0::3])
            begins.append(first + offset)
            ends.append(last + offset)
            bounds = zip(first.tolist(), last.tolist(), after[2::3].tolist(), [t.opens for t in turns], strict=True)
            places = () if images is None else images.places[i]
            own = cut_chat(length, list(bounds), self.max_len, places) or [first_row(length, self.max_len, places)]
            cuts.append(own)
            counts["cut_conversations"] += own != [(0, length)]
            counts["dropped_tokens"] += length - sum(end - begin for begin, end in own)
            counts["with_special_strings"] += chat.marked
        labels = label(ids, _joined(begins), _joined(ends))
        if images is not None:
            labels[images.inside()] = NOT_TRAINED
        spans = [(at + begin, at + end) for at, own in zip(offsets.tolist(), cuts, strict=False) for begin, end in own]
        starts, stops = (np.array([span[side] for span in spans], np.int64) for side in (0, 1))
        row_offsets = np.append(0, np.cumsum(stops - starts))
        if counts["dropped_tokens"]:
            kept = np.repeat(starts - row_offsets[:-1], stops - starts) + np.arange(row_offsets[-1])
            ids, labels = ids[kept], labels[kept]
        counts["trained_tokens"] = int(np.count_nonzero(labels >= 0))
        names = pa.array([name for (_, name), own in zip(chats, cuts, strict=True) for _ in own], pa.string())
        columns = [int_lists(ids, row_offsets), int_lists(labels, row_offsets), lists_of_one(names)]
        if images is not None:
            pictures, counted = images.columns(cuts)
            columns += pictures
            counts.update(counted)
        return pa.RecordBatch.from_arrays(columns, self.columns_out), counts

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """What the user should know about the tokenizer and these counts."""
        notes = [*self.recipe.notes, *_told(counts)]
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
        if counts.get("left_out_questions"):
            notes.append(f"note: the chat template leaves out {counts['left_out_questions']} systems' or users' turns.")
        if counts.get("without_trained_turns") and self.template.end_of_turn:
            notes.append(f"note: nothing is trained on in {counts['without_trained_turns']} conversations.")
        if not self.template.end_of_turn:
            notes.append("warning: the chat template ends no assistant turn with a special token: none is trained on.")
        if "strftime_now" in self.template.source:
            notes.append(f"note: the chat template writes the date; every row has {self.template.date:%Y-%m-%d}.")
        if counts.get("animations"):
            notes.append(f"note: of {counts['animations']} animations, the first frame is trained on.")
        if counts.get("dropped_images"):
            notes.append(f"note: {counts['dropped_images']} images were dropped with the tokens around them.")
        return notes


def load_chat(
    directory: Path, id_key: str, max_len: int | None, images: ImageSettings | None = None
) -> tuple[Chat, TokenizerInfo]:
    """Read tokenizer and chat template on the driver; with ``images``, also what the model makes of these.

    Raises :class:`UserError` when one is missing or not understood.
    """
    tokenizer = load_tokenizer(directory)
    template = load_chat_template(tokenizer, str(directory))
    recipe = recipe_of(tokenizer, (), (), parse_special_tokens=not getattr(tokenizer, "split_special_tokens", False))
    special = tuple(sorted({str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}))
    parts = None if images is None else load_image_parts(directory, template, images, image_ids_of(tokenizer), max_len)
    return Chat(template, recipe, special, id_key, max_len, parts), info_of(tokenizer, directory)


def load_image_parts(
    directory: Path, template: ChatTemplate, images: ImageSettings, ids: ImageIds, max_len: int | None = None
) -> ImageParts:
    """What reads images for the model of a directory. Raises :class:`UserError` for one that has none, or whose files
    do not belong together."""
    rules = load_rules(directory, images.limits, ids.around)
    token = ids.added.get(rules.image_token)
    if token is None or (rules.family in TILES and -1 in ids.around):
        raise UserError(
            f"`tokenizer` {directory} lacks the token {rules.image_token} that its config.json names for images, or "
            "those around them: give the whole directory of one model."
        )
    return ImageParts(rules, images.folder, written_image(template, token, str(directory)), token, max_len)


def _told(counts: Mapping[str, int]) -> list[str]:
    """What records were read as."""
    read = [(form.name, counts.get(form.tally, 0)) for form in {form.tally: form for form in FORMATS}.values()]
    told = ", as ".join(f"{name}: {count:,} record{'s' * (count != 1)}" for name, count in read if count)
    return [f"note: read as {told}."] if told else []


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


@lru_cache(maxsize=2)
def _any_of(strings: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, strings)) or "(?!)")
