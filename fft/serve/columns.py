"""Columns of a parquet output: of what the input's rows show, and of the answers."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fft.errors import UserError
from fft.serve.asked import ERROR, FINISH, LOGPROBS, PROMPT, TEXT
from fft.serve.sampling import Sampling

_TOKEN = [("token", pa.string()), ("id", pa.int64()), ("logprob", pa.float64())]
_TOLD = pa.list_(pa.struct([*_TOKEN, ("top_logprobs", pa.list_(pa.struct(_TOKEN)))]))
_REMEDY = "name an `output` that ends in .jsonl"


def merged_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for the rows of all. Raises :class:`UserError` where a column would need two types."""
    whole: dict[str, pa.Field] = {}
    for own in (field.remove_metadata().with_nullable(True) for schema in schemas for field in schema):
        known = whole.get(own.name, own)
        try:
            pair = [pa.schema([known]), pa.schema([own])]
            whole[own.name] = pa.unify_schemas(pair, promote_options="permissive").field(0)
        except pa.ArrowException as error:
            raise UserError(
                f"`inputs`: {own.name!r} holds {known.type} and {own.type}, which no parquet column does: {_REMEDY}."
            ) from error
    return pa.schema(list(whole.values()))


def schema_of_rows(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Types of what rows of JSON hold. Raises :class:`UserError` where a column would need two."""
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns.append((name, pa.array([row.get(name) for row in rows]).type))
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"`inputs`: {name!r} has values that no one parquet column holds ({reason}): {_REMEDY}."
            ) from (error)
    return pa.schema(columns)


def output_schema(shown: pa.Schema, sampling: Sampling, quarantine: bool) -> pa.Schema:
    """All columns of the output. Raises :class:`UserError` for one that parquet has no form for."""
    own = [(TEXT, pa.string()), (FINISH, pa.string())]
    own += [] if sampling.logprobs is None else [(LOGPROBS, _TOLD)]
    answers = [pa.field(name, kind if sampling.n == 1 else pa.list_(kind)) for name, kind in own]
    answers += [pa.field(ERROR, pa.string())] if quarantine else []
    fields = [field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in shown]
    lead = [field for field in fields if field.name == PROMPT]
    schema = pa.schema([*lead, *answers, *(field for field in fields if field.name != PROMPT)])
    for field in schema:
        try:
            pq.ParquetWriter(io.BytesIO(), pa.schema([field])).close()
        except pa.ArrowException as error:
            raise UserError(
                f"`inputs`: {field.name!r} is {field.type}, which parquet does not hold: {_REMEDY}."
            ) from error
    return schema
