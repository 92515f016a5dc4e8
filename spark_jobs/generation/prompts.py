"""Prompts of files: cut into parts from their sizes alone, and read in the tasks, a few hundred at a time.

Files are JSON lines, parquet, or text with a prompt a line.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
from pyspark.sql import SparkSession

from fft.corpus.files import Source
from fft.corpus.readers import naming, open_parquet, open_text, read_lines, schema_of
from fft.corpus.splits import SPLIT, Span, Split, cut_text, deal
from fft.data.known import COMPRESSIONS
from fft.text.formats import ALPACA, LISTS_OF_TURNS, TURN_KEYS
from fft.text.image_parts import IMAGE_KEYS
from fft.text.messages import TOOLS_KEY, check_unicode
from fft.text.nested import json_rows
from fft.text.records import Malformed, decode_record, load_json
from spark_jobs.generation.fields import Fields, infer, merge, turns_in
from spark_jobs.runtime.session import user_errors
from spark_jobs.runtime.tasks import create_tasks

#: Of a part: bytes of prompts, and rows of a parquet file, at most. As many parts as that at least, if there are rows.
PART_BYTES, PART_ROWS, FEWEST_PARTS = 1 << 20, 1024, 8
#: Rows that are read at once.
_BATCH = 256


class PromptKeys(NamedTuple):
    """Names of what is looked at in a row."""

    prompt: str = "prompt"
    id: str = "id"
    messages: str = LISTS_OF_TURNS[0]
    conversation: str = LISTS_OF_TURNS[1]
    conversations: str = LISTS_OF_TURNS[2]
    instruction: str = ALPACA.keys[0]
    input: str = ALPACA.beside[0]
    system: str = ALPACA.beside[1]
    history: str = ALPACA.beside[2]
    tools: str = TOOLS_KEY
    #: Of images beside a prompt, where these are read.
    images: str = ""
    image: str = ""

    @classmethod
    def of(cls, prompt: str, id: str, images: bool) -> "PromptKeys":
        """Those of a job; with ``images``, these are read."""
        keys = cls(prompt, id)
        return keys._replace(images=IMAGE_KEYS[0], image=IMAGE_KEYS[1]) if images else keys

    @property
    def turns(self) -> tuple[str, ...]:
        """Where there may be turns."""
        return self.prompt, *LISTS_OF_TURNS

    @property
    def beside(self) -> list[str]:
        """Where there may be images."""
        return [name for name in (self.images, self.image) if name]


@dataclass(frozen=True)
class Chunk:
    """Some rows of one part: the columns that are carried along, each row as an object or as what is wrong with it, and
    where it stands. The first is the part's ``first``, from 0."""

    part: int
    first: int
    carried: pa.RecordBatch
    rows: Sequence[dict[str, Any] | Malformed]
    places: "Sequence[Place]"


@dataclass(frozen=True)
class Place:
    """Where a row stands: its number in a file, in a split of it that begins at a byte if its lines are counted from
    there; a row of a DataFrame has no number. ``record`` is what was looked at."""

    path: str
    record: bytes
    number: int | None = None
    start: int | None = None

    def __str__(self) -> str:
        if self.number is None:
            return self.path
        if self.start is None:
            return f"{self.path}, row {self.number}"
        return f"{self.path}, line {_lines_before(self.path, self.start) + self.number + 1}"


#: A batch of rows: what is carried along, the rows, and their places.
_Read = tuple[pa.RecordBatch, list[dict[str, Any] | Malformed], list[Place]]
_NOTHING = Fields(pa.schema([]), pa.schema([]))


def prompt_splits(sources: Sequence[Source]) -> list[Split]:
    """The files cut into parts, in order. Raises :class:`UserError` for parquet that cannot be read."""
    total = sum(source.bytes for source in sources)
    chunk = max(1, min(PART_BYTES, -(-total // FEWEST_PARTS)))
    spans = []
    for source in sources:
        for file in source.files:
            if source.kind == "parquet":
                spans += _cut_rows(source.name, file.path, file.size, chunk)
            elif file.path.lower().endswith(COMPRESSIONS):
                spans.append(Span(source.name, source.kind, file.path, 0, 0, file.size))
            else:
                spans += cut_text(source.name, source.kind, file.path, file.size, chunk)
    return deal(spans, chunk)


def _cut_rows(dataset: str, path: str, size: int, chunk: int) -> list[Span]:
    with naming(path), open_parquet(path) as file:
        rows = file.metadata.num_rows
    pieces = min(max(-(-size // chunk), -(-rows // PART_ROWS)), rows)
    bounds = [rows * i // pieces for i in range(pieces + 1)] if pieces else []
    return [Span(dataset, "parquet", path, a, b, size // pieces) for a, b in itertools.pairwise(bounds)]


def read_chunks(part: int, splits: Sequence[Split], fields: Fields, keys: PromptKeys) -> Iterator[Chunk]:
    """The rows of a part, from its splits. Raises :class:`UserError` where a file cannot be read."""
    first = 0
    for split in splits:
        read = _parquet_chunks(split, fields, keys) if split.kind == "parquet" else _line_chunks(split, fields, keys)
        for carried, rows, places in read:
            yield Chunk(part, first, carried, rows, places)
            first += len(rows)


def rows_of(batch: pa.RecordBatch, keys: PromptKeys) -> tuple[list[dict[str, Any] | Malformed], list[bytes]]:
    """Of rows of parquet or of a DataFrame, the columns that are looked at: as objects, and as lines of JSON."""
    columns = batch.select([name for name in dict.fromkeys(keys) if name in batch.schema.names])
    lines = list(json_rows(columns, [name for name in keys.beside if name in batch.schema.names]))
    return [_parse(line) for line in lines], lines


def _parquet_chunks(split: Split, fields: Fields, keys: PromptKeys) -> Iterator[_Read]:
    at = 0
    with naming(split.path), open_parquet(split.path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        for group, size in enumerate(sizes):
            first, last = max(split.start - at, 0), min(split.stop - at, size)
            if first < last:
                table = file.read_row_group(group, use_threads=False).slice(first, last - first)
                number = at + first
                for batch in table.to_batches(max_chunksize=_BATCH):
                    rows, lines = rows_of(batch, keys)
                    yield fields.fit(batch), rows, [Place(split.path, ln, number + i) for i, ln in enumerate(lines)]
                    number += batch.num_rows
            at += size


def _line_chunks(split: Split, fields: Fields, keys: PromptKeys) -> Iterator[_Read]:
    rows: list[dict[str, Any] | Malformed] = []
    places: list[Place] = []
    for number, line in enumerate(read_lines(split.path, split.start, split.stop)):
        if line.strip():
            rows.append(_parse(line) if split.kind == "json" else _text(line, keys.prompt))
            places.append(Place(split.path, line, number, split.start))
        if len(rows) == _BATCH:
            yield fields.carry([_fields(row) for row in rows]), rows, places
            rows, places = [], []
    yield fields.carry([_fields(row) for row in rows]), rows, places


def _fields(row: dict[str, Any] | Malformed) -> dict[str, Any]:
    return {} if isinstance(row, Malformed) else row


def _text(line: bytes, key: str) -> dict[str, Any] | Malformed:
    try:
        return {key: decode_record(line)}
    except Malformed as error:
        return error


def _parse(line: bytes) -> dict[str, Any] | Malformed:
    try:
        text = decode_record(line)
        row = load_json(text)
        if isinstance(row, list):
            row = {TURN_KEYS[0]: row}
        if not isinstance(row, dict):
            raise Malformed(f"not a JSON object but {type(row).__name__}")
        if "\\u" in text:  # only an escape can bring half a character
            check_unicode(row)
    except Malformed as error:
        return error
    return row


def _lines_before(path: str, start: int) -> int:
    """How many lines of a file begin before byte ``start``."""
    if not start:
        return 0
    lines, left = 1, start - 1
    with naming(path), open_text(path) as stream:
        while left and (block := stream.read(min(left, 1 << 20))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines


@dataclass(frozen=True)
class LookThrough:
    """A function for ``mapInArrow``: splits of JSON lines in; out come, of each batch of them, the fields of rows and
    of turns, as Arrow writes schemas."""

    keys: PromptKeys

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        for batch in batches:
            rows, turns = [], []
            for split in [Split(**row) for row in batch.to_pylist()]:
                for _, read, _ in _line_chunks(split, _NOTHING, self.keys):
                    rows.append(infer([_fields(row) for row in read]))
                    turns.append(infer([turn for row in read for turn in _turns_of(_fields(row), self.keys)]))
            found = [[schema.serialize().to_pybytes()] for schema in (merge(rows), merge(turns))]
            yield pa.RecordBatch.from_arrays([pa.array(value, pa.binary()) for value in found], ["rows", "turns"])


def _turns_of(row: dict[str, Any], keys: PromptKeys) -> list[dict[str, Any]]:
    lists = [row[name] for name in keys.turns if isinstance(row.get(name), list)]
    return [turn for turns in lists for turn in turns if isinstance(turn, dict)]


def schemas_of(
    spark: SparkSession, sources: Sequence[Source], splits: Sequence[Split], keys: PromptKeys, tasks: int | None = None
) -> tuple[list[pa.Schema], list[pa.Schema]]:
    """Schemas of all rows, and of their turns; those of JSON lines are found by ``tasks``, by default one a part, which
    read all of them.

    Raises :class:`UserError` for parquet whose columns cannot be told apart.
    """
    rows, turns = [], []
    for source in sources:
        if source.kind == "parquet":
            found = [schema_of(file.path) for file in source.files]
            rows += found
            turns += [turns_in(schema, keys.turns) for schema in found]
        elif source.kind == "text":
            rows.append(pa.schema([(keys.prompt, pa.string())]))
    lines = [split for split in splits if split.kind == "json"]
    if lines:
        work = create_tasks(spark, [split.row() for split in lines], SPLIT, tasks or lines[-1].part + 1)
        with user_errors():
            looked = work.mapInArrow(LookThrough(keys), "rows binary, turns binary").collect()
        for found in looked:
            rows.append(pa.ipc.read_schema(pa.py_buffer(bytes(found["rows"]))))
            turns.append(pa.ipc.read_schema(pa.py_buffer(bytes(found["turns"]))))
    return rows, turns
