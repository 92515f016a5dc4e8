"""Text generation behind one function: vLLM where it is installed, plain transformers everywhere else."""

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from fft.errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessor, PretrainedConfig, PreTrainedTokenizerBase

    from fft.weights.hf import WeightReader

#: Names that ``--engine`` takes; "auto" is vLLM where it can be imported.
ENGINES = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. ``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens of that total mass."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt. ``finish_reason`` is "stop" (end of sequence) or "length" (the limit)."""

    text: str
    tokens: int
    finish_reason: str


class Engine(Protocol):
    """Generates completions batch by batch."""

    name: str

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[list[Completion]]:
        """Completions of all prompts in their order, as many at a time as the engine likes."""


def load_engine(name: str, model: str, batch_size: int) -> Engine:
    """Load the model directory ``model``; ``batch_size`` is for transformers, vLLM schedules on its own.

    Raises :class:`UserError` when vLLM is asked for and not installed, and for what is not understood of the directory,
    or does not belong together in it.
    """
    if name == "vllm" and not _has_vllm():
        raise UserError(
            "--engine vllm: not installed: pip install 'flash-fine-tuning[serve]', or use --engine transformers."
        )
    from fft.models.directory import check_whole, load_config
    from fft.weights.hf import WeightReader

    config = load_config(model, init=False)
    tokenizer = _load_tokenizer(model)
    known, places = max(tokenizer.get_vocab().values(), default=-1) + 1, config.get_text_config().vocab_size
    if known > places:
        raise UserError(
            f"--model {model} has a tokenizer of {known} tokens, and its config.json a vocab_size of {places}."
        )
    weights = WeightReader(model)
    check_whole(config, weights.names, model)
    weights.check_types()
    if name == "vllm" or (name == "auto" and _has_vllm()):
        return VllmEngine(model, config)
    return TransformersEngine(weights, config, tokenizer, batch_size)


def row_seed(seed: int, row: int) -> int:
    """Of a prompt's sample: those of neighbouring rows and seeds have nothing to do with each other."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "little") >> 1


def _load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False)
    except Exception as error:  # the library behind it raises Exception itself
        raise UserError(
            f"--model {model} has no tokenizer that can be loaded ({one_line(error)[:120]}): copy tokenizer.json and "
            "tokenizer_config.json there."
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


class TransformersEngine:
    """``generate`` of transformers on left-padded batches of prompts. Nothing of ``generation_config.json`` counts but
    the tokens that end a text. Raises :class:`UserError` for weights that transformers cannot load, or that are NaN.
    """

    name = "transformers"

    def __init__(
        self,
        weights: "WeightReader",
        config: "PretrainedConfig",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
    ) -> None:
        import torch
        from transformers import GenerationConfig

        self._batch_size, self._tokenizer = batch_size, tokenizer
        if tokenizer.pad_token_id is None:
            # Padding is masked, so any token will do; models without one of their own borrow the end's.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        # Few CPUs compute bf16 faster than fp32, and rounding would make a batch differ from its prompts alone.
        dtype = torch.float32 if device.type == "cpu" else "auto"
        self._model = _load_model(weights, config, dtype).to(device).eval()
        given = self._model.generation_config
        if (weights.directory / "generation_config.json").is_file():
            given = GenerationConfig.from_pretrained(weights.directory)
        self._ends = given.eos_token_id if given.eos_token_id is not None else tokenizer.eos_token_id
        self._model.generation_config = GenerationConfig(eos_token_id=self._ends, pad_token_id=tokenizer.pad_token_id)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[list[Completion]]:
        """See :class:`Engine`; ``batch_size`` completions at a time. Raises :class:`UserError` for an empty prompt."""
        if "" in prompts and not self._tokenizer("").input_ids:
            raise UserError(
                f"prompt {prompts.index('') + 1} is empty and this model's tokenizer adds no start token: remove it."
            )
        for start in range(0, len(prompts), self._batch_size):
            yield self._batch(prompts[start : start + self._batch_size], start, sampling)

    def _batch(self, prompts: Sequence[str], first: int, sampling: Sampling) -> list[Completion]:
        import torch

        inputs = self._tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
        draw = []
        if sampling.temperature > 0:
            seeds = [row_seed(sampling.seed, first + i) for i in range(len(prompts))]
            draw = [_drawing(sampling, seeds, self._model.device)]
        with torch.inference_mode():
            output = self._model.generate(
                **inputs.to(self._model.device),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # where tokens are drawn, the likeliest of what was drawn
                logits_processor=draw,
            )
        return [self._completion(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _completion(self, ids: list[int]) -> Completion:
        ends = set(self._ends if isinstance(self._ends, list) else [self._ends])
        stop = next((at for at, token in enumerate(ids) if token in ends), None)
        kept = ids if stop is None else ids[:stop]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Completion(str(text), len(kept), "length" if stop is None else "stop")


def _load_model(weights: "WeightReader", config: "PretrainedConfig", dtype: "torch.dtype | str") -> Any:
    """The model, of whole and finite weights; what types say of its ``to`` and ``generate`` is not so."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from fft.weights.hf import is_finite

    directory, source = weights.directory, {"pretrained_model_name_or_path": weights.directory}
    if weights.dtype is not None:  # quantized: read here, multiplied out
        source = {"pretrained_model_name_or_path": None, "state_dict": {n: weights.tensor(n) for n in weights.names}}
    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, info = kind.from_pretrained(**source, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:  # files that are cut, shapes that differ, packages that a model needs
        raise UserError(f"--model {directory} cannot be loaded ({one_line(error)[:300]}).") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(
                f"--model {directory}: {kind.replace('_', ' ')} {', '.join(map(str, sorted(info[kind])[:3]))}: its "
                "config.json and weights do not belong together."
            )
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise UserError(f"--model {directory}: {name} holds values that are NaN or infinite: fetch it again.")
    return model


def _drawing(sampling: Sampling, seeds: Sequence[int], device: "torch.device") -> "LogitsProcessor":
    """Has the likeliest token be one drawn at random, for each row with a generator of its own.

    With q drawn from an exponential distribution, log p - log q is largest for each token with its probability p.
    """
    import torch
    from transformers import LogitsProcessor, TopPLogitsWarper

    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    top_p = TopPLogitsWarper(sampling.top_p)

    class Drawing(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            likely = top_p(input_ids, scores.float() / sampling.temperature)
            rows = zip(likely, generators, strict=True)
            drawn = torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])
            return likely - drawn.log()

    return Drawing()


class VllmEngine:
    """vLLM's offline engine; it forms batches itself, so prompts go in by the thousand, for the sake of progress."""

    name = "vllm"

    def __init__(self, model: str, config: "PretrainedConfig") -> None:
        from vllm import LLM

        # A head of its own would be dropped where the config ties it.
        overrides = {} if config.tie_word_embeddings else {"hf_overrides": {"tie_word_embeddings": False}}
        self._llm = LLM(model=model, **overrides)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[list[Completion]]:
        """See :class:`Engine`."""
        from vllm import SamplingParams

        # One seed a prompt: equal prompts still get different samples, and a prompt's does not depend on its batch.
        for start in range(0, len(prompts), 1000):
            chunk = list(prompts[start : start + 1000])
            parameters = [
                SamplingParams(
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=row_seed(sampling.seed, start + i),
                )
                for i in range(len(chunk))
            ]
            results = self._llm.generate(chunk, parameters, use_tqdm=False)
            yield [
                Completion(r.outputs[0].text, len(r.outputs[0].token_ids), r.outputs[0].finish_reason) for r in results
            ]


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None
