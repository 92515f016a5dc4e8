"""What of a model directory is understood: its config, and which tensors its files must and may hold.

Whoever reads one asks here, so that what transformers would make something else of is refused by all alike. Which
configs are trained is the business of :mod:`fft.models.supported`.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from fft.data.model_files import check_counts, check_directory
from fft.errors import UserError, one_line
from fft.json_text import json_value
from fft.models.baichuan import BaichuanConfig, BaichuanForCausalLM
from fft.models.lora import is_adapter
from fft.models.spec import ModelSpec
from fft.models.supported import FAMILIES
from fft.models.vision import PARTS
from fft.weights import hf
from fft.weights.files import weight_files
from fft.weights.internvl import with_image_token
from fft.weights.names import StoredNames
from fft.weights.originals import as_architecture
from fft.weights.quantized import BlockScales


class Weights(Protocol):
    """A model's tensors by Hugging Face name."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The type to write tensors in unless another is asked for; None: as they are."""

    def tensor(self, name: str) -> Tensor:
        """One of them."""


#: Types of models of which it is known what files hold.
_KNOWN = (*FAMILIES, *PARTS)
#: What makes a directory an adapter's, in PEFT's format.
ADAPTER_CONFIG = "adapter_config.json"
_HEADS, _EMBEDDINGS = ("lm_head.weight", "embed_out.weight"), ("embed_tokens.weight", "embed_in.weight")
#: Tensors of older files that are computed today.
_COMPUTED = (r"rotary_emb\.inv_freq$",)
#: Rows of a matrix that are compared at once.
_ROWS = 4096


def load_config(model: str, init: bool, weights: bool = True) -> PretrainedConfig:
    """Read the config of ``--model``, a directory or, with ``init``, a config.json.

    ``weights`` says whether those in the directory count: a head of its own among them, other than the embedding,
    stays one whatever ``tie_word_embeddings`` says, as in transformers. Raises :class:`UserError` where there is no
    config, where transformers cannot read it, and for what is not understood of the directory.
    """
    path = Path(model)
    check_directory(path)
    file = path / hf.CONFIG if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"--model {model} does not exist: give a Hugging Face model directory, or a config.json with --init."
            if not path.exists()
            else f"--model {model} has no config.json: give a Hugging Face model directory."
        )
    if not path.is_dir() and not init:
        raise UserError(f"--model {model} is a file: only --init starts from a config; give a model directory.")
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--model {model} holds an adapter beside a model, which transformers would add to it: move "
            f"{ADAPTER_CONFIG} elsewhere, or merge the two by python -m fft.checkpoint.convert --lora."
        )
    config = _read_config(file)
    if path.is_dir() and weights and config.tie_word_embeddings and weight_files(path):
        config.tie_word_embeddings = not has_own_head(hf.WeightReader(path))
    return config


def _read_config(file: Path) -> PretrainedConfig:
    """Raises :class:`UserError` for a config that transformers cannot read, or of weights that we cannot."""
    try:
        raw = dict(json_value(file.read_text(encoding="utf-8")))
        check_counts(raw, file)
        raw = as_architecture(with_image_token(raw, file.parent))
        kind = raw.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"model_type is {kind!r}, which transformers does not know")
        BlockScales.of(raw, str(file.parent))
        # What is trained and written is not quantized any more.
        config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k not in BlockScales.SETTINGS})
        config.tie_word_embeddings = bool(config.tie_word_embeddings)
    except UserError:
        raise
    except Exception as error:  # config classes raise what their checks happen to raise
        raise UserError(
            f"{file} is not a model configuration ({one_line(error)}): give one that transformers can read."
        ) from error
    names = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    names |= {BaichuanConfig.model_type: BaichuanForCausalLM.__name__}
    if not config.architectures and kind in names:
        config.architectures = [names[kind]]
    return config


def has_own_head(weights: Weights) -> bool:
    """Whether there is an output head with other values than the embedding's."""
    embeddings = [name for name in weights.names if name.endswith(_EMBEDDINGS)]
    heads = [name for name in weights.names if name.endswith(_HEADS)]
    if len(heads) != 1 or len(embeddings) != 1:
        return False
    head, embedding = weights.tensor(heads[0]), weights.tensor(embeddings[0])
    if head.shape != embedding.shape:
        return True
    pairs = zip(head.split(_ROWS), embedding.split(_ROWS), strict=True)
    return any(not torch.equal(a, b.to(a.dtype)) for a, b in pairs)


def check_tensors(spec: ModelSpec, names: Iterable[str], where: object) -> None:
    """Raise :class:`UserError` where files in ``where``, by ``names``, lack a tensor of the model or have others."""
    have, known = set(names), set()
    for name in spec.skeleton.state_dict():
        if is_adapter(name.removesuffix(".weight")):
            continue
        parts = spec.stored.names(name)
        known |= {name, *parts}
        lacking = [] if name in have else [part for part in parts if part not in have]
        if lacking and not (spec.tied and name == f"{spec.output}.weight"):
            raise UserError(f"{where} has no tensor {lacking[0]}: its config.json and weights do not belong together.")
    patterns = [*_COMPUTED, *(spec.skeleton._keys_to_ignore_on_load_unexpected or ())]
    extra = sorted(name for name in have - known if not any(re.search(pattern, name) for pattern in patterns))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{where} holds tensor {extra[0]}{more}, for which the model that its config.json describes has no place: "
            "the config is another model's, or lacks a setting."
        )


def check_adapter(spec: ModelSpec, names: Iterable[str], where: object) -> None:
    """Raise :class:`UserError` where files in ``where``, by ``names``, lack a matrix of the model's adapters or have
    others."""
    known = {name for name in spec.skeleton.state_dict() if is_adapter(name.removesuffix(".weight"))}
    have = set(names)
    if lacking := sorted(known - have):
        raise UserError(
            f"{where} has no {lacking[0]}: an adapter is trained that all layers have, see --lora_module_name; begin a "
            "new one by --lora_dim, or merge this one into the model first."
        )
    if extra := sorted(have - known):
        raise UserError(
            f"{where} has {extra[0]}, which is no matrix of an adapter of this model's linear layers: give the --model "
            "that it is for, or merge it with PEFT first."
        )


def stored_in(directory: Path) -> StoredNames:
    """How files of a model directory store its parameters; as they are, where the model's type is not known.

    Raises :class:`UserError` for a config that cannot be read.
    """
    config = load_config(str(directory), init=False, weights=False)
    return ModelSpec(config, torch.float32).stored if config.model_type in _KNOWN else StoredNames({})


def check_whole(config: PretrainedConfig, names: Iterable[str], where: object) -> None:
    """:func:`check_tensors` for a model of a type that is known; what others consist of is not known here."""
    if config.model_type in _KNOWN:
        check_tensors(ModelSpec(config, torch.float32), names, where)
