"""Nested columns of Arrow as JSON records: what a parquet file holds reads as a JSON line would.

Engines fill what one row lacks of a struct with nulls, so nulls are left out. Bytes of strings stay what they are: what
is no UTF-8 is met where the record is read.
"""

import base64
import json
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa

from fft.errors import UserError


def check_json_type(kind: pa.DataType, where: str) -> None:
    """Raises :class:`UserError` for a type that holds bytes, which JSON and texts do not."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise UserError(f"{where} is {kind}, which is no text: cast it to a string.")
    for i in range(kind.num_fields):
        field = kind.field(i)
        check_json_type(field.type, f"{where}.{field.name}" if pa.types.is_struct(kind) else where)


def json_rows(columns: pa.RecordBatch, in_base64: Collection[str] = ()) -> Iterator[bytes]:
    """The rows as JSON objects, without nulls; maps become objects. Bytes of columns ``in_base64`` become objects with
    their base64 under ``bytes``, but for those that have this key already."""
    try:
        rows = columns.to_pylist()
    except UnicodeDecodeError:  # some string is none: its bytes go into the record
        rows = pa.RecordBatch.from_arrays(
            [column.cast(_in_bytes(column.type)) for column in columns.columns], columns.schema.names
        ).to_pylist()
    for row in rows:
        row.update({name: _base64(row[name]) for name in in_base64})
        text = json.dumps(_without_nulls(row), ensure_ascii=False, default=_no_json)
        yield text.encode(errors="surrogateescape")


def _in_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_in_bytes(field.type)) for field in kind.fields])
    if pa.types.is_dictionary(kind):
        return _in_bytes(kind.value_type)
    if pa.types.is_map(kind):
        return pa.map_(_in_bytes(kind.key_type), _in_bytes(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(_in_bytes(kind.value_type))
    return kind


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(key): _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], tuple):  # a map; one with equal keys is no object
        return _without_nulls(dict(value)) if len(dict(value)) == len(value) else [*map(list, value)]
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return _text(value)


def _base64(value: Any) -> Any:
    if isinstance(value, list):
        return [_base64(item) for item in value]
    if isinstance(value, dict):
        return {key: _encoded(item) if key == "bytes" else item for key, item in value.items()}
    return {"bytes": _encoded(value)} if isinstance(value, bytes) else value


def _encoded(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _text(value: Any) -> Any:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _no_json(value: object) -> dict[str, str]:
    """What JSON has no form for, such as a date, as an object: where a text should be, it is refused."""
    return {type(value).__name__: str(value)}
