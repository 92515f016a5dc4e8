"""Files of weights: which of a directory's are a model's, and both formats under one interface."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fft.data.model_files import check_file
from fft.data.views import noted
from fft.errors import UserError, one_line
from fft.files import is_plain
from fft.json_text import json_value
from fft.weights.in_store import StoredTensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Where weights may be, the preferred first: index and single file.
_INDEXES = ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


def weight_files(root: Path) -> dict[str, Path]:
    """The file of every tensor of a model directory, by the tensor's name; empty without weights.

    Raises :class:`UserError` where one cannot be read or is missing, and where there are two models to choose from.
    """
    for index, single in _INDEXES:
        has_index, has_single = (root / index).is_file(), (root / single).is_file()
        if not has_index and not has_single:
            continue
        if not has_index:
            check_file(root / single, root)
            with opened(root / single) as tensors:
                return dict.fromkeys(tensors.keys(), root / single)
        files = {name: root / file for name, file in _weight_map(root / index).items()}
        if has_single and set(files.values()) != {root / single}:
            raise UserError(
                f"{root} holds {single} beside an {index} of other files, and tools differ in which they take for the "
                "model: remove what is not."
            )
        missing = sorted({str(file) for file in files.values() if not file.is_file()})
        if missing:
            raise UserError(f"{root} lacks {', '.join(missing)}, named in its index: restore the model directory.")
        for file in {*files.values()}:
            check_file(file, root)
        return files
    return {}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = dict(json_value(index.read_text(encoding="utf-8"))["weight_map"])
        other = [file for file in found.values() if not is_plain(file)]
        if other:
            raise ValueError(f"{other[0]!r} is no file name")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{index} is no index of safetensors files ({error!r}): restore the model directory."
        ) from error
    return found


def check_here(file: Path) -> None:
    """Raise :class:`UserError` for a file that lies in a store, for formats that are read whole."""
    stored = noted(file)
    if stored is not None:
        raise UserError(
            f"{stored.name}: only safetensors are read from a store, since they are read by ranges: copy the folder "
            "to a disk."
        )


class _Pickled:
    """A ``.bin`` file under the interface of ``safe_open``; tensors are mapped, not read, until they are used.

    Files in the format of PyTorch before 1.6, which cannot be mapped, are read whole.
    """

    def __init__(self, file: Path) -> None:
        try:
            found = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError, OSError, ValueError) as error:
            raise UserError(
                f"{file} is no readable file of weights ({one_line(error)[:120]}): fetch it again, or the model's "
                "safetensors."
            ) from error
        if not isinstance(found, dict):
            raise UserError(f"{file} holds a {type(found).__name__}, not tensors by name: save the state dict alone.")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise UserError(
                    f"{file} holds {name!r}, a {type(value).__name__} and no tensor: save the state dict alone."
                )
        self._tensors: dict[str, Tensor] = found

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].clone()  # tied ones share their storage

    def get_slice(self, name: str) -> "_Mapped":
        return _Mapped(self._tensors[name])


class _Mapped:
    """A tensor under the interface of safetensors' slices."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        return self._tensor[index]


#: A safetensors file, here or in a store.
TensorFile = safe_open | StoredTensors


def tensors_of(file: Path) -> TensorFile:
    """A safetensors file, here or noted as a store's. Raises :class:`UserError` when it cannot be read."""
    if (stored := noted(file)) is not None:
        return StoredTensors(stored)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        said = str(error).rstrip(".")
        raise UserError(
            f"{file} is no readable safetensors file ({said}): it may be cut off or a Git LFS pointer; fetch it again."
        ) from error


@contextmanager
def opened(file: Path) -> Iterator[TensorFile | _Pickled]:
    """A file of weights in either format. Raises :class:`UserError` when it cannot be read."""
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is no file: restore the model directory.")
    if file.suffix == ".bin":
        check_here(file)
        yield _Pickled(file)
        return
    tensors = tensors_of(file)
    if isinstance(tensors, StoredTensors):
        yield tensors
        return
    with tensors:
        yield tensors


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a small file of weights. Raises :class:`UserError` when it cannot be read."""
    with opened(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - safe_open is no mapping
