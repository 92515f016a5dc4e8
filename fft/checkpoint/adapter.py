"""Low-rank adapters on disk in PEFT's format: a file of matrices, and a config that names the model they belong to."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import Tensor

from fft.errors import UserError
from fft.models.lora import Lora, is_adapter
from fft.parallel.tensor_plan import Shard
from fft.weights import hf

#: A parameter, or its value.
_T = TypeVar("_T", bound=Tensor)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
#: What PEFT puts before a parameter's name.
PREFIX = "base_model.model."


def adapter_config(lora: Lora, base: Path) -> dict:
    """Content of ``adapter_config.json``; ``base`` is the model directory that was adapted."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(lora.modules),
        "bias": "none",
        "inference_mode": True,
    }


def adapter_parameters(parameters: Mapping[str, _T]) -> dict[str, _T]:
    """Those of an adapter, out of a model's."""
    return {name: p for name, p in parameters.items() if is_adapter(name.removesuffix(".weight"))}


def write_adapter(staging: Path, shards: int, config: Mapping[str, object]) -> list[str]:
    """Make an adapter of the ``shards`` files that ranks wrote, which go; returns the names of the files made."""
    files = [staging / hf.shard_name(shard, shards) for shard in range(shards)]
    tensors = {f"{PREFIX}{name}": tensor for file in files for name, tensor in load_file(file).items()}
    hf.write_tensors(staging / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt"})
    for file in files:
        file.unlink()
    (staging / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return [WEIGHTS, CONFIG]


def read_config(directory: Path) -> dict:
    """What ``adapter_config.json`` says. Raises :class:`UserError` when it cannot be read."""
    try:
        return dict(json.loads((directory / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory} is no adapter directory ({error}): give one that PEFT saved.") from error


class AdapterReader(hf.WeightReader):
    """An adapter's matrices by the names that they have in the model."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        with hf.opened(self.directory / WEIGHTS) as file:
            self._files = dict.fromkeys(file.keys(), self.directory / WEIGHTS)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, shard: Shard | None = None) -> Tensor:
        """See :class:`hf.WeightReader`."""
        return super().tensor(f"{PREFIX}{name}", shape, shard)
