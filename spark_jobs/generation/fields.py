"""What rows of answers have: the fields of the prompts' rows, carried along with their types, and the answers' own.

Parquet files and DataFrames say what types their columns have. JSON lines do not: all of them are looked at first. A
key that holds values of several types becomes a column of JSON texts, and so does one of objects without keys, for
which parquet has no form.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fft.errors import UserError
from fft.files import utf8
from fft.text.formats import LISTS_OF_TURNS, PROMPTS, TRAIN_KEYS, TURN_KEYS
from fft.text.image_parts import IMAGE_KEYS
from fft.text.messages import ROLES
from fft.text.tool_calls import CALLS_KEY, OLD_KEY

#: Columns of the answers. The whole conversation stands in ``messages``, as ``tokenize.py --task chat`` takes it.
MESSAGES = TURN_KEYS[0]
ANSWERS = (MESSAGES, "text", "finish_reason", "tokens", "sample")
#: A column of ours when log probabilities are asked for, and when malformed rows stay.
LOGPROBS, ERROR = "logprobs", "error"
#: And where prompts may have images: those of the conversation, in their order.
IMAGES = IMAGE_KEYS[0]

#: Marks a field whose values are written as JSON texts.
_AS_JSON = {b"fft": b"json"}
_TRAINED = "weight"
#: Keys of turns that are columns of ours, or become some.
_OF_TURNS = ("role", "content", "from", "value", CALLS_KEY, OLD_KEY, *ROLES, *TRAIN_KEYS)


@dataclass(frozen=True)
class Fields:
    """``carried`` are the columns of the prompts' rows; ``turns`` what turns have beside role and content. With
    ``images``, a column has those of the conversation."""

    carried: pa.Schema
    turns: pa.Schema
    images: bool = False

    @property
    def notes(self) -> list[str]:
        """What the user should know of them."""
        names = [field.name for field in self.carried if field.metadata == _AS_JSON]
        return [f"note: of several types, and therefore JSON texts in the output: {', '.join(names)}."] if names else []

    def rows(self, logprobs: bool, error: bool = False) -> pa.Schema:
        """Columns of the output."""
        turn = pa.struct([("role", pa.string()), ("content", pa.string()), *self.turns])
        types = (pa.list_(turn), pa.string(), pa.string(), pa.int32(), pa.int32())
        own = [pa.field(name, kind) for name, kind in zip(ANSWERS, types, strict=True)]
        own += [pa.field(IMAGES, pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])))] * self.images
        own += [pa.field(LOGPROBS, pa.string())] if logprobs else []
        own += [pa.field(ERROR, pa.string())] if error else []
        return pa.schema([*(field.remove_metadata() for field in self.carried), *own])

    def carry(self, rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
        """The carried columns of rows of JSON."""
        columns = [_column([row.get(field.name) for row in rows], field) for field in self.carried]
        return pa.RecordBatch.from_arrays(columns, [field.name for field in self.carried])

    def fit(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The carried columns of a batch of one file, in which some may be missing or of narrower types."""
        columns = []
        for field in self.carried:
            at = batch.schema.get_field_index(field.name)
            columns.append(pa.nulls(batch.num_rows, field.type) if at < 0 else batch.column(at).cast(field.type))
        return pa.RecordBatch.from_arrays(columns, [field.name for field in self.carried])

    def turn(self, message: Mapping[str, Any], trained: bool) -> dict[str, Any]:
        """A message as an element of the output's ``messages``."""
        own = {name: message[name] for name in ("role", "content")}
        for field in self.turns:
            value = message.get(field.name)
            if field.name == _TRAINED:
                value = None if trained else 0
            elif value is not None and field.metadata == _AS_JSON:
                value = _json(value)
            own[field.name] = value
        return own


def fields_of(
    schemas: Sequence[pa.Schema],
    turns: Sequence[pa.Schema],
    prompt_key: str,
    reserved: str = "",
    images: bool = False,
) -> Fields:
    """The fields of rows that come from several files, whose schemas these are; with ``images``, those are read.

    Raises :class:`UserError` when a column has the name of one of the answers', or when there is no prompt in it.
    """
    carried = merge(schemas)
    if prompt_key not in carried.names and not any(form.fits(carried.names) for form in PROMPTS):
        raise UserError(
            f"`inputs` have no {prompt_key!r} and no {' or '.join(map(repr, TURN_KEYS))} (they have "
            f"{', '.join(carried.names) or 'nothing'}): name the prompt with `prompt_key`."
        )
    taken = [name for name in (*ANSWERS[1:], LOGPROBS, reserved) if name in carried.names]
    if taken:
        raise UserError(f"`inputs` have a field {taken[0]!r}, which the output needs for itself: rename it.")
    replaced = (*LISTS_OF_TURNS, *(IMAGE_KEYS if images else ()))
    kept = [_settled(field) for field in carried if field.name not in replaced]
    names = {name for schema in turns for name in schema.names}
    extras = [_settled(field) for field in merge(turns) if field.name not in _OF_TURNS]
    extras += [_texts(CALLS_KEY)] if names.intersection((CALLS_KEY, OLD_KEY, "from")) else []
    flagged = bool(names.intersection(TRAIN_KEYS))
    return Fields(pa.schema(kept), pa.schema([*extras, *([(_TRAINED, pa.int64())] if flagged else [])]), images)


def turns_in(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    """What the turns in columns of these names have in a parquet file or a DataFrame, where they are structs."""
    for name in names:
        kind = schema.field(name).type if name in schema.names else pa.null()
        if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
            return pa.schema([*kind.value_type])
    return pa.schema([])


def infer(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """PromptKeys of JSON objects and the types of their values."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([_infer(name, [row.get(name) for row in rows]) for name in names])


def merge(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema that holds the values of all; where types do not agree, JSON texts do."""
    merged: dict[str, pa.Field] = {}
    for field in (field for schema in schemas for field in schema):
        merged[field.name] = _merged(merged[field.name], field) if field.name in merged else field
    return pa.schema([*merged.values()])


def _infer(name: str, values: Sequence[Any]) -> pa.Field:
    try:
        return pa.field(name, pa.array(values).type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return _texts(name)


def _texts(name: str) -> pa.Field:
    return pa.field(name, pa.string(), metadata=_AS_JSON)


def _merged(one: pa.Field, other: pa.Field) -> pa.Field:
    if _AS_JSON in (one.metadata, other.metadata):
        return _texts(one.name)
    try:
        schemas = [pa.schema([field.remove_metadata()]) for field in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0)
    except pa.ArrowException:
        return _texts(one.name)


def _settled(field: pa.Field) -> pa.Field:
    """A field that parquet can hold."""
    kind = _without_null(field.type)
    return _texts(field.name) if kind is None else pa.field(field.name, kind, metadata=field.metadata)


def _without_null(kind: pa.DataType) -> pa.DataType | None:
    """A type without unknown ones in it, which become strings; None for one without any fields."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        inner = [_without_null(field.type) for field in kind]
        if not inner or None in inner:
            return None
        return pa.struct([field.with_type(new) for field, new in zip(kind, inner, strict=True)])
    if pa.types.is_list(kind):
        inner_kind = _without_null(kind.value_type)
        return None if inner_kind is None else pa.list_(inner_kind)
    return kind


def _column(values: Sequence[Any], field: pa.Field) -> pa.Array:
    if field.metadata == _AS_JSON:
        values = [value if value is None else _json(value) for value in values]
    return pa.array(values, field.type)


def _json(value: Any) -> str:
    return utf8(json.dumps(value, ensure_ascii=False)).decode()
