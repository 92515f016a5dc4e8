"""From rows of prompts to rows of answers, through the window of one engine.

The window goes across batches, and across the parts of a task: an engine is idle only at a task's end. What comes out
is in the order of what went in, whatever finished first.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import pyarrow as pa

from fft.errors import UserError
from fft.serve.asked import with_images
from fft.serve.engines import Completion
from fft.serve.prompts import Renderer
from fft.serve.sampling import Sampling
from fft.serve.window import Question, answers
from fft.text.formats import ALPACA, LISTS_OF_TURNS
from fft.text.image_parts import ImageParts, Source
from fft.text.messages import RawConversation
from fft.text.records import Malformed, dump_json
from spark_jobs.generation.engine import Loaded, Wanted
from spark_jobs.generation.fields import IMAGES, Fields
from spark_jobs.generation.prompts import Chunk, PromptKeys

#: What stands between chunks, and comes out in its place.
Mark = TypeVar("Mark")

_QUARANTINE = 'mend it, or give `on_error="quarantine"` to set such rows aside.'


@dataclass(frozen=True)
class Asking:
    """What is asked of every row, and of which engine; see :func:`spark_jobs.generate_job.generate_table`."""

    wanted: Wanted
    sampling: Sampling
    keys: PromptKeys
    chat: str = "auto"
    system: str | None = None

    def renderer(self, loaded: Loaded) -> Renderer:
        """What makes ids of prompts. Raises :class:`UserError` for a chat with a model that has no template."""
        return Renderer.of(loaded.tokenizer, loaded.engine.limit, self.chat, self.system, loaded.images)


@dataclass(frozen=True)
class AskedPrompt:
    """A row's conversation, of so many ``tokens``; ``unused`` are keys of its turns that nothing reads."""

    conversation: RawConversation
    tokens: int
    unused: Counter[str]


@dataclass(frozen=True)
class Answered:
    """A chunk and, of each of its rows, what was asked and the answers, or what is wrong with it."""

    chunk: Chunk
    rows: Sequence[tuple[AskedPrompt, tuple[Completion, ...]] | Malformed]

    def check(self) -> None:
        """Raise :class:`UserError` that names the first row that is malformed."""
        for row, place in zip(self.rows, self.chunk.places, strict=True):
            if isinstance(row, Malformed):
                raise UserError(f"{place}: {row}: {_QUARANTINE}")

    def table(self, fields: Fields, logprobs: bool, error: bool = False) -> pa.RecordBatch:
        """Its rows, one an answer; with ``error``, those that are malformed have one, too, that says why."""
        kept, rows = [], []
        for at, row in enumerate(self.rows):
            if not isinstance(row, Malformed):
                made = [_row(fields, row[0].conversation, answer, sample) for sample, answer in enumerate(row[1])]
            else:
                made = [{"error": str(row)}] if error else []
            kept += [at] * len(made)
            rows += made
        schema = fields.rows(logprobs, error)
        carried = self.chunk.carried.take(pa.array(kept, pa.int64()))
        own = [
            pa.array([row.get(field.name) for row in rows], field.type) for field in [*schema][carried.num_columns :]
        ]
        return pa.RecordBatch.from_arrays([*carried.columns, *own], schema=schema)


@dataclass(frozen=True)
class _Row:
    """A row on its way through the window."""

    chunk: Chunk
    asked: AskedPrompt | Malformed


def answer_chunks(loaded: Loaded, asking: Asking, items: Iterable[Chunk | Mark]) -> Iterator[Answered | Mark]:
    """Ask for answers to all rows of the chunks; what else is among them comes out in its place.

    Raises :class:`UserError` when the engine ends.
    """
    waiting: list[tuple[AskedPrompt, tuple[Completion, ...]] | Malformed] = []
    for question, completions in answers(loaded.engine, _questions(loaded, asking, items)):
        row = question.item
        if not isinstance(row, _Row):
            yield row
            continue
        waiting.append(row.asked if isinstance(row.asked, Malformed) else (row.asked, completions))
        if len(waiting) == len(row.chunk.rows):
            yield Answered(row.chunk, waiting)
            waiting = []


def _questions(loaded: Loaded, asking: Asking, items: Iterable[Chunk | Mark]) -> Iterator[Question[_Row | Mark]]:
    renderer = asking.renderer(loaded)
    for item in items:
        if not isinstance(item, Chunk):
            yield Question(item, 0, None, asking.sampling)
            continue
        prompts = [row if isinstance(row, Malformed) else _prompt_of(row, asking.keys) for row in item.rows]
        rendered = iter(renderer.render_many([p for p in prompts if not isinstance(p, Malformed)]))
        for at, (prompt, row) in enumerate(zip(prompts, item.rows, strict=True)):
            found = prompt if isinstance(prompt, Malformed) else next(rendered)
            if isinstance(found, Malformed):
                yield Question(_Row(item, found), 0, None, asking.sampling)
            else:
                unused: Counter[str] = Counter()
                conversation = renderer.conversation(cast("str | list | dict", prompt), unused)
                asked = AskedPrompt(_told(conversation, loaded.images), len(found), unused)
                name = _name(row, item, at, asking.keys.id)
                yield Question(_Row(item, asked), name, found, asking.sampling, found.images)


def _told(asked: RawConversation, images: ImageParts | None) -> RawConversation:
    """A conversation as it is told: with marks where there are images."""
    if images is None or not asked.images:
        return asked
    return replace(asked, messages=[{**turn, "content": images.marked(turn["content"])} for turn in asked.messages])


def _name(row: Mapping[str, Any] | Malformed, chunk: Chunk, at: int, key: str) -> str:
    """By what a row is known, on which its samples depend: its id, or its place in a part, or its content."""
    own = None if isinstance(row, Malformed) else row.get(key)
    if own is not None:
        return own if isinstance(own, str) else dump_json(own)
    return f"{chunk.part}:{chunk.first + at}" if chunk.part >= 0 else dump_json(row)


def _prompt_of(row: Mapping[str, Any], keys: PromptKeys) -> Any:
    """What :class:`Renderer` takes: a text, turns, or an object with turns."""
    turns = [name for name in LISTS_OF_TURNS if row.get(name) is not None]
    conversation = turns or row.get(ALPACA.keys[0]) is not None
    if keys.prompt in LISTS_OF_TURNS or (conversation and row.get(keys.prompt) is None):
        return {name: value for name, value in row.items() if value is not None}
    if turns:
        return Malformed(f"both {keys.prompt} and {turns[0]} are there: choose one with prompt_key")
    if row.get(keys.prompt) is None:
        return Malformed(f"{keys.prompt} is null or missing")
    return with_images(row[keys.prompt], row) if keys.beside else row[keys.prompt]


def _image(source: Source) -> dict[str, Any]:
    """An image as data sets have it: its bytes, or the name of its file."""
    return {"bytes": source, "path": None} if isinstance(source, bytes) else {"bytes": None, "path": source}


def _row(fields: Fields, asked: RawConversation, answer: Completion, sample: int) -> dict[str, Any]:
    """An answer's own columns. Where the last turn was the assistant's, the answer goes on with it."""
    turns, last = list(asked.messages), {"role": "assistant", "content": answer.text}
    if turns and turns[-1]["role"] == "assistant":
        begun = turns.pop()
        last = {**begun, "content": begun["content"] + answer.text}
    trained = [number not in asked.untrained for number in range(len(turns))]
    messages = [fields.turn(turn, own) for turn, own in zip(turns, trained, strict=True)]
    return {
        "messages": [*messages, fields.turn(last, True)],
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": answer.tokens,
        "sample": sample,
        IMAGES: [_image(source) for source in asked.images] or None,
        "logprobs": None if answer.logprobs is None else json.dumps(answer.logprobs, ensure_ascii=False),
    }
