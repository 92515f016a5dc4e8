"""Hugging Face model directories: read one tensor at a time, write one shard per pipeline stage."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fft.data.model_files import check_directory, check_file
from fft.data.views import noted
from fft.errors import UserError, one_line
from fft.files import claim_file, copy_file, sync, write_file
from fft.images.processor_files import set_limits
from fft.images.rules import ImageRules
from fft.json_text import json_value
from fft.parallel.tensor_plan import Shard
from fft.text.convert_tokenizer import convert_tokenizer, is_original
from fft.weights import internvl
from fft.weights.files import INDEX, SINGLE, opened, weight_files
from fft.weights.names import StoredRows, slices
from fft.weights.originals import generation_of, original_of, translate
from fft.weights.quantized import BlockScales, is_coded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "config.json"
_GENERATION = "generation_config.json"

#: Files that make a tokenizer and its templates, copied as they are so that nothing about it changes.
_TOKENIZER_FILES = (
    *("tokenizer*", "tokenization_*", "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*", "*.jinja"),
    "additional_chat_templates/*",
)
#: Files that say what becomes of images and films.
_PROCESSOR_FILES = ("*processor_config.json",)


class WeightReader:
    """Tensors of a directory of (sharded) safetensors or ``.bin`` files by name, each read from disk when asked for.

    FP8 weights with block scales are given multiplied out, as float32; those of :mod:`fft.weights.originals` as the
    architecture has them. Raises :class:`UserError` when there are none,
    when one that the index names is missing, and when they are quantized in another way.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = root = Path(directory)
        check_directory(root)
        self._files = weight_files(root)
        if not self._files:
            raise UserError(
                f"{root} holds no {SINGLE} (nor {INDEX}): give a Hugging Face model directory with weights, "
                "or start from scratch with --init."
            )
        config = read_json(root / CONFIG) if (root / CONFIG).is_file() else {}
        self._blocks = BlockScales.of(config, str(root))
        scales = set() if self._blocks is None else {self._blocks.scales_of(name) for name in self._files}
        #: Of a model whose own code transformers does not have, tensors by the names of the architecture that it is.
        self._tensors = translate(config, [name for name in self._files if name not in scales])
        #: Whether code of its own, which is in no library, is what the directory is for.
        self.is_original = original_of(config) is not None
        #: Whether files have the very tensors that are given.
        self.as_stored = self._blocks is None and not self.is_original

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type to write tensors in unless another is asked for; None: as they are."""
        return None if self._blocks is None else torch.bfloat16

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, shard: Shard | None = None) -> Tensor:
        """Return a tensor, or a part of it, as it is stored, or multiplied out.

        Raises :class:`UserError` when it is absent, of another ``shape`` than the config implies, or of codes without
        their scales.
        """
        place = self._tensors.get(name, name)
        if isinstance(place, str):
            return self._stored_tensor(place, shape, shard)
        whole = (place.length, *place.shape[1:])
        if shape is not None and shape != whole:
            raise UserError(f"{self.directory}: {name} has shape {whole}, and the model needs {tuple(shape)}.")
        (part,) = slices((place,), whole, shard)
        value = self._stored_tensor(place.name, place.shape, part.shard)
        return value if part.within is None else part.within.of(value)

    def _stored_tensor(self, name: str, shape: tuple[int, ...] | None, shard: Shard | None) -> Tensor:
        """A tensor of the files, or a part of it, see :meth:`tensor`."""
        if name not in self._files:
            raise UserError(
                f"the model directory has no tensor {name}: its config.json and weights do not belong together."
            )
        file = self._files[name]
        found, value = _stored(file, name, shape, shard)
        if not is_coded(value):
            return value
        blocks = self._check_codes(name, value)
        scales = blocks.scales_of(name)
        try:
            return blocks.multiplied(value, _stored(self._files[scales], scales)[1], found, shard)
        except ValueError as error:
            raise UserError(f"{file}: tensor {name} has {error}: fetch the model again.") from error

    def check_types(self) -> None:
        """Raise :class:`UserError` for the first tensor of codes without their scales; reads no values."""
        for file in sorted(set(self._files.values())):
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    stored = tensors.get_slice(name)
                    if stored.get_shape() and is_coded(nothing := stored[(slice(0, 0),)]):
                        self._check_codes(name, nothing)

    def _check_codes(self, name: str, value: Tensor) -> BlockScales:
        """How a tensor of codes is multiplied out. Raises :class:`UserError` where that is not known."""
        blocks = self._blocks
        if blocks is None or blocks.scales_of(name) not in self._files or not blocks.fit(value):
            raise UserError(
                f"{self._files[name]}: tensor {name} holds codes ({value.dtype}) of a quantization that is not read: "
                "give the model in bf16 or fp16."
            )
        return blocks

    def read(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None, pieces: tuple[StoredRows, ...] = ()
    ) -> Tensor:
        """Return a parameter of the model of ``shape``, or this rank's part of it; nothing else is read from disk.

        ``pieces`` are what files have of it, where they have no tensor of its name. Raises :class:`UserError` as
        :meth:`tensor` does, and for values that are no finite numbers.
        """
        if not pieces or (name in self._tensors and not (pieces[0].swapped and self._is_swapped(name, shape))):
            return self._numbers(name, shape, shard)
        values = []
        for piece in slices(pieces, shape, shard):
            value = self._numbers(piece.rows.name, piece.rows.shape, piece.shard)
            value = value.transpose(-1, -2) if piece.rows.swapped else value
            values.append(value if piece.within is None else piece.within.of(value))
        local = shape if shard is None else shard.local_shape
        return (values[0] if len(values) == 1 else torch.cat(values)).view(local)

    def _is_swapped(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether files have another shape of a parameter of ``shape`` that is swapped in most: transformers writes
        such ones as they are.
        """
        place = self._tensors[name]
        if not isinstance(place, str) or place not in self._files:
            return True
        with opened(self._files[place]) as tensors:
            return tuple(tensors.get_slice(place).get_shape()) != shape

    def _numbers(self, name: str, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
        value = self.tensor(name, shape, shard)
        if not value.is_floating_point():
            raise UserError(f"{self._where(name)}: tensor {name} is of {value.dtype}, not of floating-point numbers.")
        if not is_finite(value):
            raise UserError(
                f"{self._where(name)}: tensor {name} holds values that are NaN or infinite: fetch the model again, or "
                "take an older checkpoint."
            )
        return value

    def _where(self, name: str) -> Path:
        """The file of a tensor."""
        place = self._tensors[name]
        return self._files[place if isinstance(place, str) else place.name]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite; in one pass, which keeps nothing."""
    return not tensor.numel() or all(map(torch.isfinite, tensor.aminmax()))  # a NaN is both


def _stored(
    file: Path, name: str, shape: tuple[int, ...] | None = None, shard: Shard | None = None
) -> tuple[tuple[int, ...], Tensor]:
    """The shape of a tensor in a file, and the tensor or a part of it."""
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
            return found, tensors.get_tensor(name)
        before = (slice(None),) * shard.dim if shard.experts is None else _experts(shard)
        return found, torch.cat([stored[(*before, slice(a, b))] for a, b in shard.spans], dim=shard.dim)


def _experts(shard: Shard) -> tuple[slice, ...]:
    """What stands before the dimension that a part of experts is cut in."""
    return (slice(*shard.experts or ()), *(slice(None),) * (shard.dim - 1))


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises :class:`UserError` where there is none."""
    try:
        return dict(json_value(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): restore it.") from error


def shard_name(shard: int, shards: int) -> str:
    """Name of shard ``shard`` of ``shards``, counted from 0."""
    return SINGLE if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write_shard(staging: Path, tensors: dict[str, Tensor], shard: int, shards: int) -> None:
    """Write one stage's tensors (canonical names) as shard ``shard`` of ``shards``, counted from 0.

    Raises :class:`UserError` when they cannot be written.
    """
    write_tensors(staging / shard_name(shard, shards), tensors, {"format": "pt"})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, down to the disk. Raises :class:`UserError` when it cannot be written."""
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        claim_file(path)
        save_file(cpu, path, metadata=metadata)
        sync(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be written ({one_line(error)}): make room there and run again.") from error


def write_metadata(
    staging: Path,
    config: "PretrainedConfig",
    tokenizer: str | None,
    shards: int,
    model: Path | None = None,
    rules: ImageRules | None = None,
) -> list[str]:
    """Add index, config and tokenizer to the written shards; returns the names of these files.

    The generation config is that of the ``model`` directory trained from, and so is what it has of a tokenizer where
    no other is named. Of models of images, the processor's files have the limits of ``rules``, by which it was trained.
    Raises :class:`UserError` for files that cannot be read.
    """
    before = _files(staging)
    config.save_pretrained(staging)
    if model is not None:
        _copy(model, staging, (_GENERATION, *_code(staging / CONFIG)))
        _mend_generation(staging / _GENERATION, model / CONFIG)
    if not any(staging.glob("*.py")):
        _name_no_code(staging / CONFIG)
    source = model if tokenizer is None else Path(tokenizer)
    if source is not None and is_original(source):
        _converted(source).write(staging)
    elif source is not None:
        _copy(source, staging, (*_TOKENIZER_FILES, *_PROCESSOR_FILES, *_code(source / "tokenizer_config.json")))
    if model is not None and not any(staging.glob(_PROCESSOR_FILES[0])):
        _copy(model, staging, _PROCESSOR_FILES)
    if model is not None and (model / CONFIG).is_file():
        internvl.complete_native(staging, read_json(model / CONFIG))
    if rules is not None:
        set_limits(staging, rules)
    write_index(staging, shards)
    return sorted(_files(staging) - before)


def write_index(staging: Path, shards: int) -> None:
    """Write which tensors are in which of the written ``shards``; one alone needs no index."""
    if shards == 1:
        return
    weight_map, size = {}, 0
    for shard in range(shards):
        file = shard_name(shard, shards)
        with opened(staging / file) as tensors:
            weight_map.update(dict.fromkeys(tensors.keys(), file))
        size += _tensor_bytes(staging / file)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(staging / INDEX, json.dumps(index, indent=1))


#: A tokenizer that code of its own reads goes along converted: at every checkpoint, but that is done once.
_converted = lru_cache(maxsize=1)(convert_tokenizer)


def _mend_generation(file: Path, config: Path) -> None:
    """Have a ``generation_config.json`` say what the code of the model whose ``config`` this is did by itself."""
    if file.is_file() and config.is_file():
        given = read_json(file)
        meant = generation_of(read_json(config), given)
        if meant != given:
            write_file(file, json.dumps(meant, indent=2))


def _name_no_code(config: Path) -> None:
    """Have a config name no code that is not beside it: where a run began with a ``config.json`` alone."""
    settings = read_json(config)
    if settings.pop("auto_map", None) is not None:
        write_file(config, json.dumps(settings, indent=2) + "\n")


def _code(config: Path) -> tuple[str, ...]:
    """Pattern of the code beside a config that names classes of its own (``auto_map``)."""
    return ("*.py",) if config.is_file() and "auto_map" in read_json(config) else ()


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in (file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
        check_file(file, source)
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy_file(file, copy)


def _files(folder: Path) -> set[str]:
    """Names of all files in a folder and below."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _tensor_bytes(file: Path) -> int:
    """Size of a safetensors file without its header, whose length its first eight bytes tell."""
    if (stored := noted(file)) is not None:
        return stored.size - len(stored.head)
    with open(file, "rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
