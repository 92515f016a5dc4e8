"""Hugging Face model directories: read one tensor at a time, write one shard per pipeline stage."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fft.errors import UserError, one_line
from fft.files import sync
from fft.parallel.tensor_plan import Shard
from fft.weights.experts import stored_names, stored_shape, stored_shard

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: Where weights may be, the preferred first: index and single file.
_INDEXES = ((_INDEX, _SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
_GENERATION = "generation_config.json"

#: Files that make a tokenizer, copied as they are so that nothing about it changes.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class WeightReader:
    """Tensors of a directory of (sharded) safetensors or ``.bin`` files by name, each read from disk when asked for.

    Raises :class:`UserError` when there are none, or when one that the index names is missing.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = root = Path(directory)
        for index, single in _INDEXES:
            if (root / index).is_file():
                self._files = {name: root / file for name, file in _weight_map(root / index).items()}
                break
            if (root / single).is_file():
                with opened(root / single) as shard:
                    self._files = dict.fromkeys(shard.keys(), root / single)
                break
        else:
            raise UserError(
                f"{root} holds no {_SINGLE} (nor {_INDEX}): give a Hugging Face model directory with weights, "
                "or start from scratch with --init."
            )
        missing = sorted({str(f) for f in self._files.values() if not f.is_file()})
        if missing:
            raise UserError(f"{root} lacks {', '.join(missing)}, named in its index: restore the model directory.")

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, shard: Shard | None = None) -> Tensor:
        """Return a tensor, or a part of it, as it is stored.

        Raises :class:`UserError` when it is absent, or of another ``shape`` than the config implies.
        """
        if name not in self._files:
            raise UserError(
                f"the model directory has no tensor {name}: its config.json and weights do not belong together."
            )
        file = self._files[name]
        with opened(file) as tensors:
            if name not in set(tensors.keys()):
                raise UserError(f"{file} has no tensor {name}, which its index places there: restore both.")
            stored = tensors.get_slice(name)
            found = tuple(stored.get_shape())
            if shape is not None and found != tuple(shape):
                raise UserError(
                    f"{file}: tensor {name} has shape {found}, config.json implies {tuple(shape)}: the two do not "
                    "belong together."
                )
            if shard is None:
                return tensors.get_tensor(name)
            before = (slice(None),) * shard.dim
            return torch.cat([stored[(*before, slice(a, b))] for a, b in shard.spans], dim=shard.dim)

    def read(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Tensor:
        """Return a parameter of the model of ``shape``, or this rank's part of it; nothing else is read from disk.

        Raises :class:`UserError` as :meth:`tensor` does.
        """
        names = stored_names(name, shape) if name not in self._files else []
        if not names:
            return self.tensor(name, shape, shard)
        each, own = stored_shape(len(names), shape), stored_shard(len(names), shard)
        local = shape if shard is None else shard.local_shape
        return torch.cat([self.tensor(stored, each, own) for stored in names]).view(local)


def shard_name(shard: int, shards: int) -> str:
    """Name of shard ``shard`` of ``shards``, counted from 0."""
    return _SINGLE if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write_shard(staging: Path, tensors: dict[str, Tensor], shard: int, shards: int) -> None:
    """Write one stage's tensors (canonical names) as shard ``shard`` of ``shards``, counted from 0.

    Raises :class:`UserError` when they cannot be written.
    """
    write_tensors(staging / shard_name(shard, shards), tensors, {"format": "pt"})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, down to the disk. Raises :class:`UserError` when it cannot be written."""
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(cpu, path, metadata=metadata)
        sync(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be written ({one_line(error)}): make room there and run again.") from error


def write_metadata(
    staging: Path, config: "PretrainedConfig", tokenizer: str | None, shards: int, model: Path | None = None
) -> list[str]:
    """Add index, config and tokenizer to the written shards; returns the names of these files.

    The generation config is that of the ``model`` directory trained from.
    """
    before = set(os.listdir(staging))
    config.save_pretrained(staging)
    if model is not None and (model / _GENERATION).is_file():
        shutil.copyfile(model / _GENERATION, staging / _GENERATION)
    if tokenizer is not None:
        for name in _TOKENIZER_FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, staging / name)
    if shards > 1:
        weight_map, size = {}, 0
        for shard in range(shards):
            file = shard_name(shard, shards)
            with safe_open(staging / file, framework="pt") as tensors:
                weight_map.update(dict.fromkeys(tensors.keys(), file))
            size += _tensor_bytes(staging / file)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return sorted(set(os.listdir(staging)) - before)


def _tensor_bytes(file: Path) -> int:
    """Size of a safetensors file without its header, whose length its first eight bytes tell."""
    with open(file, "rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index} is no index of safetensors files ({error!r}): restore the model directory."
        ) from error


class _Pickled:
    """A ``.bin`` file under the interface of ``safe_open``; tensors are mapped, not read, until they are used."""

    def __init__(self, file: Path) -> None:
        try:
            self._tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
            raise UserError(
                f"{file} is no readable file of weights ({one_line(error)[:120]}): fetch it again, or the model's "
                "safetensors."
            ) from error

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


@contextmanager
def opened(file: Path) -> Iterator[safe_open | _Pickled]:
    """A file of weights. Raises :class:`UserError` when it cannot be read."""
    if file.suffix == ".bin":
        yield _Pickled(file)
        return
    try:
        shard = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        said = str(error).rstrip(".")
        raise UserError(
            f"{file} is no readable safetensors file ({said}): it may be cut off or a Git LFS pointer; fetch it again."
        ) from error
    with shard:
        yield shard
