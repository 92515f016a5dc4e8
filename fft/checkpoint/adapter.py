"""Low-rank adapters on disk in PEFT's format: a file of matrices, and a config that names the model they belong to."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fft.data.model_files import check_directory
from fft.data.views import origin
from fft.errors import UserError
from fft.files import remove_file, write_file
from fft.json_text import json_value
from fft.models.directory import ADAPTER_CONFIG
from fft.models.lora import Lora, is_adapter
from fft.models.vision import PARTS
from fft.weights import hf
from fft.weights.files import load_tensors, opened, tensors_of

#: A parameter, or its value.
_T = TypeVar("_T", bound=Tensor)

WEIGHTS = "adapter_model.safetensors"
CONFIG = ADAPTER_CONFIG
#: Settings of LoRA and DoRA: they say where its matrices belong and how to multiply them, or only how they were
#: trained. All others change what is computed, or may.
_PLAIN = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
        *("eva_config", "megatron_core", "qalora_group_size"),
    }
)
#: Values of ``init_lora_weights`` that leave the base as it was.
_UNCHANGED_BASE = (True, False, None, "gaussian", "eva")
#: What the file of matrices says of itself where the model below was held in four bits; PEFT has no word for it.
_NF4 = {"base_model": "nf4"}
#: What PEFT puts before a parameter's name.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Summand:
    """An adapter that is to be added to a model: the directory, its tensors, and whether it is one of DoRA."""

    place: str
    tensors: Mapping[str, Tensor]
    dora: bool

    def equals(self, other: "Summand") -> bool:
        """Whether both are the same, be it in other types."""
        return self.tensors.keys() == other.tensors.keys() and all(
            torch.equal(value.bfloat16(), other.tensors[key].bfloat16()) for key, value in self.tensors.items()
        )


def check_sum(every: Sequence[Summand]) -> None:
    """Raise :class:`UserError` for one of DoRA beside others - what lengths the rows of the sum should have, none of
    them says - and for one that would be added twice."""
    dora = next((one for one in every if one.dora), None)
    if dora is not None and len(every) > 1:
        raise UserError(f"{dora.place} is one of DoRA (use_dora), which has no sum with others: merge it alone.")
    twice = next((pair for pair in combinations(every, 2) if pair[0].equals(pair[1])), None)
    if twice is not None:
        raise UserError(
            f"{twice[0].place} and {twice[1].place} are the same adapter, which would be added twice: leave one out."
        )


def adapter_config(lora: Lora, base: Path, targets: str | None = None) -> dict:
    """Content of ``adapter_config.json``; ``base`` is the model directory that was adapted.

    ``targets`` is a regular expression of what has adapters, where more has a name of the same end.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin(base.resolve()),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": targets or sorted(lora.modules),
        "bias": "none",
        "inference_mode": True,
    }


def scale_of(config: Mapping[str, object], where: object) -> float:
    """What the product of an adapter's matrices is multiplied by.

    Raises :class:`UserError` for adapters that are more than LoRA or DoRA, or belong to a changed base.
    """
    other = [name for name, value in config.items() if name not in _PLAIN and value]
    if config.get("peft_type") != "LORA":
        other = [str(config.get("peft_type"))]
    elif config.get("bias", "none") != "none":
        other = ["bias"]
    elif config.get("init_lora_weights", True) not in _UNCHANGED_BASE:
        other = [f"init_lora_weights {config['init_lora_weights']!r}, which changes the base"]
    if other:
        raise UserError(f"{where}: only LoRA and DoRA are read, this has {', '.join(other)}: merge it with PEFT.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{where} is no LoRA adapter: r is {rank!r} and lora_alpha {alpha!r} in its {CONFIG}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_parameters(parameters: Mapping[str, _T]) -> dict[str, _T]:
    """Those of an adapter, out of a model's."""
    return {name: p for name, p in parameters.items() if is_adapter(name.removesuffix(".weight"))}


def adapts_tower(directory: Path) -> bool:
    """Whether an adapter is also of what makes hidden states of images. Raises :class:`UserError` where it cannot be
    read.
    """
    parts = {part for own in PARTS.values() for part in own}
    return any(not parts.isdisjoint(name.split(".")) for name in AdapterReader(directory).names)


def write_adapter(staging: Path, shards: int, config: Mapping[str, object], four_bits: bool = False) -> list[str]:
    """Make an adapter of the ``shards`` files that ranks wrote, which go; returns the names of the files made.

    ``four_bits`` says that the model below it was held so, which the file of matrices notes.
    """
    files = [staging / hf.shard_name(shard, shards) for shard in range(shards)]
    tensors = {f"{PREFIX}{name}": tensor for file in files for name, tensor in load_tensors(file).items()}
    hf.write_tensors(staging / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt"} | (_NF4 if four_bits else {}))
    for file in files:
        remove_file(file)
    write_file(staging / CONFIG, json.dumps(config, indent=2))
    return [WEIGHTS, CONFIG]


def saw_four_bits(directory: Path) -> bool:
    """Whether an adapter that a run wrote was trained on a model in four bits."""
    return _NF4.items() <= (tensors_of(directory / WEIGHTS).metadata() or {}).items()


def read_config(directory: Path) -> dict:
    """What ``adapter_config.json`` says. Raises :class:`UserError` when it cannot be read."""
    check_directory(directory)
    if not (directory / CONFIG).exists() and (inside := [path.parent for path in directory.glob(f"*/{CONFIG}")]):
        last = max(inside, key=lambda path: (len(path.name), path.name))  # of a run, whose steps have numbers
        raise UserError(f"{directory} is no adapter directory, but holds some: give one of them, as {last}.")
    try:
        return dict(json_value((directory / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory} is no adapter directory ({error}): give one that PEFT saved.") from error


def is_other_base(made_for: str, model: Path) -> bool:
    """Whether what an adapter says that it was made for has another name than the directory ``model``.

    Folders move, and hubs keep models in folders of their own, so paths are not compared but for the names in them.
    """
    one, other = ([name for name in re.split("/|--", place) if name] for place in (made_for, origin(model.resolve())))
    return bool(one and other) and one[-1] not in other and other[-1] not in one


class AdapterReader(hf.WeightReader):
    """An adapter's matrices by the names that they have in the model."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        check_directory(self.directory)
        with opened(self.directory / WEIGHTS) as file:
            self._files = dict.fromkeys(file.keys(), self.directory / WEIGHTS)
        self._blocks = None
        self._tensors = {name.removeprefix(PREFIX): name for name in self._files}
