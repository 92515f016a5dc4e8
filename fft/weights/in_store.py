"""Safetensors files in a store: read by ranges, under the interface of ``safe_open``, and written as they are made.

Memory: a tensor or the part of it that is asked for, and of a part that is cut along an inner dimension the rows that
are read at once.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from fft.data.asking import asking
from fft.data.storage import Storage
from fft.data.views import StoredFile, write_bounded
from fft.errors import UserError, one_line
from fft.json_text import json_value

#: Types by the names that the format has for them.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
}
#: Bytes of rows that are read at once where not all of a row is wanted.
_BLOCK = 64 << 20


class StoredTensors:
    """A safetensors file of a store. Raises :class:`UserError` where it is none, or cannot be read."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        try:
            header = dict(json_value(file.head[8:]))
            self._metadata = {str(k): str(v) for k, v in dict(header.pop("__metadata__", {})).items()}
            self._places = {str(name): _place(file, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file.name} is no readable safetensors file ({error!r}): it may be cut off or a Git LFS pointer; "
                "write it again."
            ) from error

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._places)

    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return self._metadata

    def get_tensor(self, name: str) -> Tensor:
        """A whole one."""
        return self._places[name].part(())

    def get_slice(self, name: str) -> "StoredSlice":
        """One of which shape and parts are asked for."""
        return self._places[name]


class StoredSlice:
    """A tensor of a file in a store, from its byte ``start`` on."""

    def __init__(self, file: StoredFile, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, self._start, self._shape, self._dtype = file, start, shape, dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """The part of it that slices of step 1 give, one for each dimension, or for the first ones."""
        return self.part(index if isinstance(index, tuple) else (index,))

    def part(self, index: tuple[slice, ...]) -> Tensor:
        """See :meth:`__getitem__`."""
        if all(cut == slice(None) for cut in index):
            return self._rows(0, self._shape[0] if self._shape else 1).view(self._shape)
        low, high, _ = index[0].indices(self._shape[0])
        high = max(low, high)
        if all(cut == slice(None) for cut in index[1:]):
            return self._rows(low, high).view(high - low, *self._shape[1:])
        if high - low == 1:  # whose rows are those of a tensor, too
            start = self._start + low * self._row
            return StoredSlice(self._file, start, self._shape[1:], self._dtype).part(index[1:])[None]
        at_once = max(1, _BLOCK // max(1, self._row))
        inner = (slice(None), *index[1:])
        blocks = [
            self._rows(first, min(first + at_once, high)).view(-1, *self._shape[1:])[inner].clone()
            for first in range(low, high, at_once)
        ]
        return torch.cat(blocks) if blocks else torch.empty(0, *self._shape[1:], dtype=self._dtype)[inner]

    @property
    def _row(self) -> int:
        """Bytes of a row."""
        return prod(self._shape[1:]) * self._dtype.itemsize

    def _rows(self, low: int, high: int) -> Tensor:
        """Their values, flat."""
        if high * self._row == low * self._row:
            return torch.empty(0, dtype=self._dtype)
        found = self._file.read(self._start + low * self._row, self._start + high * self._row)
        return torch.frombuffer(found, dtype=self._dtype)


def _place(file: StoredFile, entry: Any) -> StoredSlice:
    """Where a tensor is. Raises ValueError, KeyError or TypeError where the header does not say that."""
    (start, stop), shape, dtype = entry["data_offsets"], tuple(map(int, entry["shape"])), _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"it has tensors of type {entry['dtype']}")
    if stop - start != prod(shape) * dtype.itemsize or not 0 <= start <= stop <= file.size - len(file.head):
        raise ValueError("a tensor lies outside of it")
    return StoredSlice(file, len(file.head) + start, shape, dtype)


def write_tensors_to(storage: Storage, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, the same bytes as ``save_file``'s, to a store; returns its SHA-256.

    Memory: a tensor on its way from a device, and what the store's client sends at once. Raises :class:`UserError`
    when it cannot be written.
    """
    try:
        return asking(partial(_write, storage, name, tensors, metadata))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{storage.shown(name)} cannot be written ({one_line(error)}): see to the store, or to this machine's "
            "credentials, and run again."
        ) from error


def _write(storage: Storage, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    kinds, at = {dtype: kind for kind, dtype in _DTYPES.items()}, 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for key in order:
        tensor = tensors[key]
        offsets = [at, at := at + tensor.nbytes]
        header[key] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file, digest = storage.create(name), hashlib.sha256()
    try:
        for piece in chain((len(text).to_bytes(8, "little"), text), (_bytes(tensors[key]) for key in order)):
            write_bounded(file, piece)
            digest.update(piece)
        file.close()
    except BaseException:
        file.discard()
        raise
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as they are in a file; those in the host's memory are not copied."""
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data
