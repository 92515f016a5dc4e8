"""What can be wrong with a model directory, an adapter and the options is found here, before weights are loaded."""

import contextlib
import hashlib
import importlib
import importlib.util
import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fft.errors import UserError, one_line
from fft.images.rules import GRIDS, TILES, ImageSettings
from fft.serve.engines import EngineOptions
from fft.serve.prompts import load_model_tokenizer
from fft.text.chat import load_image_parts
from fft.text.chat_template import load_chat_template
from fft.text.encoder import image_ids_of
from fft.text.image_parts import ImageParts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fft.models.directory import Weights

#: Names under which configs say how many positions a model has.
_POSITIONS = (
    *("max_position_embeddings", "model_max_length", "n_positions", "max_seq_len", "seq_length"),
    "max_sequence_length",
)
#: Kinds of rotary positions whose factor is in the number of positions already.
_SCALED = ("default", "llama3", "yarn", "longrope", "su")
#: Model types that we have and vLLM does not: it took Baichuan's out in 0.23.
_NOT_IN_VLLM = ("baichuan",)
#: Where neither config nor tokenizer says how many.
_ASSUMED = 2048


@dataclass(frozen=True)
class CheckedModel:
    """A model directory of which all is known that can be known before it is loaded; ``limit`` are tokens of a prompt
    and its answer, ``ends`` tokens that end one, ``read`` weights that have to be read here, ``images`` what reads
    images of prompts."""

    directory: str
    options: EngineOptions
    engine: str
    config: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    limit: int
    ends: frozenset[int]
    read: "Weights | None"
    images: ImageParts | None = None

    def identity(self) -> dict[str, Any]:
        """What answers depend on, as JSON has it; raises :class:`UserError` for weights that cannot be read."""
        from fft.planning.identity import identity_of
        from fft.weights.hf import WeightReader

        options: dict[str, Any] = {
            **asdict(self.options),
            "name": self.engine,
            "engine_args": dict(self.options.engine_args),
        }
        del options["batch_size"]
        lora = options.pop("lora")
        if lora is not None:
            files = sorted(file for file in Path(lora).glob("adapter_*") if file.is_file())
            options["lora"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        found = identity_of(self.config, WeightReader(self.directory), self.directory, None, ())
        template = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        return {
            "config": hashlib.sha256(json.dumps(found["config"], sort_keys=True).encode()).hexdigest()[:16],
            "weights": found["weights"],
            "tokenizer": found["tokenizer"],
            "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16],
            "ends": sorted(self.ends),
            **({} if self.images is None else {"images": self.images.rules.facts()}),
            "engine": options | {"version": _version(self.engine)},
        }


def check_model(
    model: str,
    options: EngineOptions | None = None,
    for_vllm: bool = False,
    images: ImageSettings | None = None,
) -> CheckedModel:
    """Find out what is wrong with a model directory, an adapter or the options, without loading the weights.

    A model that vLLM has not is left to transformers, but refused where it is ``for_vllm`` alone. With ``images``,
    prompts may have some. Raises
    :class:`UserError` when vLLM is asked for and not installed, and for what is not understood of the directory or the
    adapter, or does not belong together.
    """
    options = options or EngineOptions()
    name = engine_name(options)
    from fft.models.directory import check_whole
    from fft.weights.hf import WeightReader

    config, tokenizer = _load_parts(model)
    weights = WeightReader(model)
    if name == "vllm" or for_vllm:
        fault = _why_not_vllm(config.model_type, weights.is_original)
        if fault and (for_vllm or options.name == "vllm"):
            raise UserError(f"--model {model} {fault}.")
        name = engine_name(replace(options, name="transformers")) if fault else name
    check_whole(config, weights.names, model)
    weights.check_types()
    limit = token_limit(config, tokenizer, options.max_model_len)
    read: Weights | None = None if weights.as_stored else weights  # FP8 is multiplied out
    if options.lora is not None:
        from fft.checkpoint.conversion import merged

        read = merged(weights, Path(options.lora), "fp32", Path(model))
    parts = None if images is None else _image_parts(Path(model), tokenizer, images)
    return CheckedModel(model, options, name, config, tokenizer, limit, end_tokens(model, tokenizer), read, parts)


def _why_not_vllm(kind: str, original: bool) -> str:
    """Why a model of this type, or in the form of its own code, is not vLLM's to run; empty where it is."""
    if original or kind in _NOT_IN_VLLM:
        return (
            "is none that vLLM has: use --engine transformers of batch_infer or, for Qwen and InternLM2, give what "
            "python -m fft.checkpoint.convert makes of it"
        )
    if kind in (*GRIDS, *TILES):
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # one that was made for another torch raises what it likes
            return (
                f"is a model of images, for which vLLM needs torchvision ({one_line(error)[:120]}): install that of "
                "your torch, or use --engine transformers of batch_infer"
            )
    return ""


def _image_parts(folder: Path, tokenizer: "PreTrainedTokenizerBase", images: ImageSettings) -> ImageParts:
    try:
        template = load_chat_template(tokenizer, str(folder))
        return load_image_parts(folder, template, images, image_ids_of(tokenizer))
    except UserError as error:  # elsewhere, it is the tokenizer that is given
        raise UserError(str(error).replace("`tokenizer`", "--model")) from error


def engine_name(options: EngineOptions) -> str:
    """Which engine it will be: "vllm" or "transformers". Raises :class:`UserError` for options that it has not."""
    if options.name == "vllm" and not _has_vllm():
        raise UserError("--engine vllm: not installed: pip install vllm, or use --engine transformers.")
    if options.name == "vllm" or (options.name == "auto" and _has_vllm()):
        return "vllm"
    for name, given in (
        ("tensor_parallel_size", options.tensor_parallel_size > 1),
        ("gpu_memory_utilization", options.gpu_memory_utilization is not None),
        ("engine_args", bool(options.engine_args)),
    ):
        if given:
            raise UserError(f"`{name}` is vLLM's, and transformers generates here: pip install vllm, or leave it out.")
    return "transformers"


def _load_parts(model: str) -> "tuple[PretrainedConfig, PreTrainedTokenizerBase]":
    """Config and tokenizer of a model directory. Raises :class:`UserError` where they do not belong together."""
    from fft.models.directory import load_config

    config, tokenizer = load_config(model, init=False), load_model_tokenizer(model)
    known, places = max(tokenizer.get_vocab().values(), default=-1) + 1, config.get_text_config().vocab_size
    if known > places:
        raise UserError(
            f"--model {model} has a tokenizer of {known} tokens, and its config.json a vocab_size of {places}."
        )
    return config, tokenizer


def token_limit(
    config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", max_model_len: int | None = None
) -> int:
    """Tokens of a prompt and its answer: what the model has positions for, or ``max_model_len``.

    Raises :class:`UserError` for more than the model has.
    """
    text = config.get_text_config()
    told = [value for name in _POSITIONS if isinstance(value := getattr(text, name, None), int)]
    longest = min([*told, int(min(tokenizer.model_max_length, 1 << 31))])
    rope = getattr(text, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type", "default") not in _SCALED and told:
        longest = int(longest * float(rope.get("factor") or 1))
    if longest == 1 << 31:
        longest = max_model_len or _ASSUMED
    if max_model_len is not None and max_model_len > longest:
        raise UserError(f"`max_model_len` {max_model_len} is more than the model has positions for ({longest}).")
    return max_model_len or longest


def end_tokens(model: str, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those that ``generation_config.json``, or else the config, names."""
    from fft.weights.hf import read_json

    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = Path(model) / name
        named = read_json(file).get("eos_token_id") if file.is_file() else None
        if named is not None:
            return frozenset(ends.union(named if isinstance(named, list) else [named]))
    return frozenset(ends)


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):  # vLLM's build for machines without a GPU
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "unknown"


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None
