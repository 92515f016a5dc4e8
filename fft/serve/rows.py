"""From records to questions: each is read, asked and rendered, or refused by file and line; twice, first to check."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fft.errors import UserError
from fft.serve.asked import ERROR, FINISH, LOGPROBS, PROMPT, TEXT, Asked, Reading
from fft.serve.columns import merged_schema, schema_of_rows
from fft.serve.engines import Completion
from fft.serve.inputs import InputFile, PromptRecord, read_rows
from fft.serve.openai_batch import answer_request, refuse_request
from fft.serve.prompts import Prompt, Renderer
from fft.text.image_parts import ReadImage
from fft.text.records import Malformed

#: PromptRows that are rendered at once, since many texts are tokenized faster than one; fewer where they hold images.
_ROWS, _ROWS_OF_IMAGES = 256, 16
#: PromptRows whose types are found at once, for a parquet file.
_TYPED = 4096


@dataclass(frozen=True)
class Row:
    """A row of the input: what it asks and the ids of that, or the ``fault`` for which it has no answer."""

    number: int
    asked: Asked | None
    ids: Prompt | None
    fault: str = ""

    @property
    def images(self) -> Sequence[ReadImage]:
        """The images whose tokens are among the ids."""
        return () if self.ids is None else self.ids.images

    @property
    def shown(self) -> dict[str, Any]:
        """What the output has of the record."""
        return {} if self.asked is None else {**self.asked.lead, **self.asked.fields}

    def answered(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """What the output has of the answers: one as it is, several as lists."""
        if self.fault:
            return {TEXT: None, FINISH: ERROR, ERROR: self.fault}
        columns: dict[str, list[Any]] = {
            TEXT: [one.text for one in completions],
            FINISH: [one.finish_reason for one in completions],
        }
        if completions[0].logprobs is not None:
            columns[LOGPROBS] = [one.logprobs for one in completions]
        return {name: values[0] if len(values) == 1 else values for name, values in columns.items()}

    def line(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The row of an output of JSON lines."""
        if self.asked is None:
            return self.answered(())
        request = self.asked.request
        if request is not None:
            if self.fault:
                return refuse_request(request, self.number, self.fault)
            return answer_request(request, self.number, len(self.ids or ()), completions)
        return {**self.asked.lead, **self.answered(completions), **self.asked.fields}


@dataclass
class Facts:
    """What is known of the input when all of it was looked at.

    ``longest`` are tokens of a prompt and its answer; ``schema`` the columns of what its rows show. ``sha256`` is of
    the records, ``images`` of the images that they name; empty where there are none.
    """

    rows: int = 0
    faults: int = 0
    longest: int = 0
    sha256: str = ""
    images: str = ""
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))


@dataclass(frozen=True)
class PromptRows:
    """The rows of files; ``quarantine`` says that those with a fault have a place in the output."""

    files: Sequence[InputFile]
    reading: Reading
    renderer: Renderer
    quarantine: bool

    def read(self, first: int = 0, digest: Any = None) -> Iterator[Row]:
        """PromptRows from number ``first`` on; all before are only read, into ``digest``.

        Raises :class:`UserError` for the first fault, unless these are quarantined.
        """
        waiting: list[tuple[int, PromptRecord]] = []
        most = _ROWS if self.renderer.images is None else _ROWS_OF_IMAGES
        for number, record in enumerate(read_rows(self.files)):
            if digest is not None:
                digest.update(len(record.raw).to_bytes(8, "little") + record.raw)
            if number >= first:
                waiting.append((number, record))
            if len(waiting) == most:
                yield from self._rendered(waiting)
                waiting = []
        yield from self._rendered(waiting)

    def _rendered(self, records: Sequence[tuple[int, PromptRecord]]) -> Iterator[Row]:
        asked = [self._ask(record) for _, record in records]
        prompts = [one.prompt for one in asked if isinstance(one, Asked)]
        found = iter(self.renderer.render_many(prompts) if prompts else [])
        for (number, record), one in zip(records, asked, strict=True):
            ids = next(found) if isinstance(one, Asked) else one
            if not isinstance(ids, Malformed):
                yield Row(number, one if isinstance(one, Asked) else None, ids)
            elif self.quarantine:
                yield Row(number, self._kept(record, one), None, f"{record.where}: {ids}")
            else:
                raise UserError(f'{record.where}: {ids}; mend it, or give `on_error="quarantine"`.')

    def _ask(self, record: PromptRecord) -> Asked | Malformed:
        try:
            return self.reading.ask(record.value)
        except Malformed as error:
            return error

    def _kept(self, record: PromptRecord, asked: Asked | Malformed) -> Asked | None:
        """What the output shows of a record that has a fault: an object's fields but those that it needs for itself."""
        if isinstance(asked, Asked):
            return asked
        if not isinstance(record.value, dict):
            return None
        if "custom_id" in record.value:
            return Asked(None, {}, {}, self.reading.sampling, record.value)
        taken, key = (*self.reading.reserved, PROMPT), self.reading.key
        fields = {name: value for name, value in record.value.items() if name not in (*taken, key)}
        lead = {PROMPT: record.value[key]} if key in record.value else {}
        return Asked(None, lead, fields, self.reading.sampling)

    def check(self, facts: Facts, typed: bool) -> None:
        """Look at all rows and note the ``facts``; with ``typed``, also the columns of parquet for what they show.

        Raises :class:`UserError` for what :meth:`read` does, for no rows at all, and for what parquet does not hold.
        """
        digest, pictures, images = hashlib.sha256(), hashlib.sha256(), 0
        kinds = {file.kind == "parquet" for file in self.files}
        if typed and len(kinds) == 2:
            raise UserError("`inputs` in parquet and in text have no types in common: name an `output` in .jsonl.")
        inferred = typed and False in kinds
        schemas = [_shown_schema(file.schema(), self.reading.key) for file in self.files if typed and not inferred]
        batch: list[dict[str, Any]] = []
        for row in self.read(0, digest):
            facts.rows += 1
            facts.faults += bool(row.fault)
            for image in row.images:
                pictures.update(len(image.data).to_bytes(8, "little") + image.data)
                images += 1
            if row.asked is not None and row.asked.request is not None and typed:
                raise UserError("`inputs` for OpenAI's batch API are answered in lines: name an `output` in .jsonl.")
            if row.ids is not None and row.asked is not None:
                facts.longest = max(facts.longest, len(row.ids) + row.asked.sampling.max_new_tokens)
            if inferred:
                batch.append(row.shown)
                if len(batch) == _TYPED:
                    schemas, batch = [merged_schema([*schemas, schema_of_rows(batch)])], []
        if not facts.rows:
            raise UserError(f"`inputs` {', '.join(file.name for file in self.files[:3])} holds no prompts.")
        facts.sha256 = digest.hexdigest()
        facts.images = pictures.hexdigest() if images else ""
        facts.schema = merged_schema([*schemas, schema_of_rows(batch)])


def _shown_schema(schema: pa.Schema, key: str) -> pa.Schema:
    """Columns of a parquet file, under the names that the output has for them."""
    return pa.schema([field.with_name(PROMPT) if field.name == key else field for field in schema])
