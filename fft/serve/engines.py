"""Text generation behind one function: vLLM where it is installed, plain transformers everywhere else."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from fft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """Load the model directory ``model``. Raises :class:`UserError` when vLLM is asked for and not installed.

    ``batch_size`` is for transformers; vLLM schedules on its own.
    """
    if name == "vllm" and not _has_vllm():
        raise UserError(
            "--engine vllm: not installed: pip install 'flash-fine-tuning[serve]', or use --engine transformers."
        )
    if name == "vllm" or (name == "auto" and _has_vllm()):
        return VllmEngine(model)
    return TransformersEngine(model, batch_size)


class TransformersEngine:
    """``generate`` of transformers on left-padded batches of prompts. Raises :class:`UserError` without a tokenizer."""

    name = "transformers"

    def __init__(self, model: str, batch_size: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._batch_size = batch_size
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--model {model} has no tokenizer that can be loaded: copy tokenizer.json and "
                "tokenizer_config.json there."
            ) from error
        self._tokenizer = cast("PreTrainedTokenizerBase", tokenizer)
        if self._tokenizer.pad_token_id is None:
            # Padding is masked, so any token will do; models without one of their own borrow the end's.
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        # Few CPUs compute bf16 faster than fp32, and rounding would make a batch differ from its prompts alone.
        dtype = torch.float32 if device.type == "cpu" else "auto"
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[list[Completion]]:
        """See :class:`Engine`; ``batch_size`` completions at a time. Raises :class:`UserError` for an empty prompt."""
        import torch

        if "" in prompts and not self._tokenizer("").input_ids:
            raise UserError(
                f"prompt {prompts.index('') + 1} is empty and this model's tokenizer adds no start token: remove it."
            )
        torch.manual_seed(sampling.seed)
        for start in range(0, len(prompts), self._batch_size):
            yield self._batch(prompts[start : start + self._batch_size], sampling)

    def _batch(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        import torch

        inputs = self._tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
        choice = {"do_sample": False}
        if sampling.temperature > 0:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            output = self._model.generate(
                **inputs.to(self._model.device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                **choice,
            )
        return [self._completion(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _completion(self, ids: list[int]) -> Completion:
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        stop = next((at for at, token in enumerate(ids) if token in ends), None)
        kept = ids if stop is None else ids[:stop]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        return Completion(str(text), len(kept), "length" if stop is None else "stop")


class VllmEngine:
    """vLLM's offline engine; it forms batches itself, so prompts go in by the thousand, for the sake of progress."""

    name = "vllm"

    def __init__(self, model: str) -> None:
        from vllm import LLM

        self._llm = LLM(model=model)

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
                    seed=sampling.seed + start + i,
                )
                for i in range(len(chunk))
            ]
            results = self._llm.generate(chunk, parameters, use_tqdm=False)
            yield [
                Completion(r.outputs[0].text, len(r.outputs[0].token_ids), r.outputs[0].finish_reason) for r in results
            ]


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None
