"""Lists of int32 as Arrow buffers: built from numpy, and carried as bytes through an exchange.

Shuffling a list of ints as one binary value is 2.5 to 5 times faster in Spark than as an array, element by element.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql.types import ArrayType, BinaryType, IntegerType, StructField, StructType

from fft.errors import UserError

INTS = pa.list_(pa.int32())


def int_lists(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    """``values[offsets[i]:offsets[i + 1]]`` as row ``i`` of a list<int32> array, without copying int32 values."""
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32, copy=False)), pa.array(values.astype(np.int32, copy=False))
    )


def values_and_offsets(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of :func:`int_lists`; the offsets start at 0."""
    if lists.null_count or lists.values.null_count:
        raise UserError("a list of integers holds null: write the input table again without nulls.")
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy(zero_copy_only=False)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def values_of_bytes(blobs: pa.BinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Int32 values of binary rows, end to end, and their int64 offsets (in values)."""
    blobs = blobs.cast(pa.large_binary())
    _, offsets, data = blobs.buffers()
    at = np.frombuffer(offsets, np.int64)[blobs.offset : blobs.offset + len(blobs) + 1] // 4
    values = np.frombuffer(data, np.int32) if data is not None and data.size else np.empty(0, np.int32)
    return values[at[0] : at[-1]], at - at[0]


def pack_columns(df: DataFrame, columns: list[str]) -> DataFrame:
    """Replace list<int32> columns by their bytes."""
    return _convert(df, columns, BinaryType(), _to_binary)


def unpack_columns(df: DataFrame, columns: list[str]) -> DataFrame:
    """Inverse of :func:`pack_columns`."""
    return _convert(df, columns, ArrayType(IntegerType(), containsNull=False), _to_lists)


def _convert(
    df: DataFrame, columns: list[str], kind: ArrayType | BinaryType, convert: Callable[[pa.Array], pa.Array]
) -> DataFrame:
    fields = [StructField(f.name, kind, False) if f.name in columns else f for f in df.schema.fields]

    def apply(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            names = batch.schema.names
            arrays = [convert(a) if n in columns else a for n, a in zip(names, batch.columns, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, names)

    return df.mapInArrow(apply, StructType(fields))


def _to_binary(lists: pa.ListArray) -> pa.BinaryArray:
    values, offsets = values_and_offsets(lists.cast(INTS))
    return pa.Array.from_buffers(
        pa.binary(), len(lists), [None, pa.py_buffer(offsets.astype(np.int32) * 4), pa.py_buffer(values.tobytes())]
    )


def _to_lists(blobs: pa.BinaryArray) -> pa.ListArray:
    return int_lists(*values_of_bytes(blobs))
