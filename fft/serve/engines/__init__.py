"""What generates: one contract for vLLM and transformers.

Requests are token ids, so that a prompt is read and checked once, before any engine, see :mod:`fft.serve.prompts`. What
an answer says is made of its ids by :mod:`fft.serve.engines.texts`, alike for both.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from fft.errors import UserError, positive
from fft.json_text import json_value
from fft.serve.sampling import Sampling

if TYPE_CHECKING:  # it brings numpy and Arrow, for which flags need not wait
    from fft.text.image_parts import ReadImage

#: Names that ``--engine`` takes; "auto" is vLLM where it can be imported.
ENGINES = ("auto", "vllm", "transformers")
#: Types that ``--dtype`` takes; "auto" is float32 on a CPU, the model's own elsewhere.
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineOptions:
    """Which engine, and how it runs; what is None or "auto" it chooses itself.

    ``batch_size`` is for transformers, vLLM forms batches on its own. ``max_model_len`` are tokens of a prompt and its
    answer together. ``lora`` is the directory of an adapter in PEFT's format. ``engine_args`` go to vLLM's
    ``EngineArgs`` as they are. Raises :class:`UserError` for what no engine can do.
    """

    name: str = "auto"
    batch_size: int = 8
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    lora: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        for name, holds, sentence in (
            ("engine", self.name in ENGINES, f"must be one of {', '.join(ENGINES)}"),
            ("dtype", self.dtype in DTYPES, f"must be one of {', '.join(DTYPES)}"),
            ("batch_size", self.batch_size >= 1, "must be at least 1"),
            ("max_model_len", self.max_model_len is None or self.max_model_len >= 2, "must be at least 2"),
            ("tensor_parallel_size", self.tensor_parallel_size >= 1, "must be at least 1"),
            ("gpu_memory_utilization", share is None or 0 < share <= 1, "must be a share above 0 and up to 1"),
        ):
            if not holds:
                raise UserError(f"`{name}` {self.name if name == 'engine' else getattr(self, name)} {sentence}.")
        flags = {spec.name for spec in fields(self)} - {"engine_args", "batch_size"}
        if taken := sorted((flags | {"model"}) & set(self.engine_args)):
            raise UserError(f"`engine_args` holds {taken[0]}, which has a flag of its own: use that.")


@dataclass(frozen=True)
class Request:
    """A prompt's ids, of which one sample is wanted; ``number`` tells its answer from others.

    ``room`` is how many tokens an answer may have; ``sampling.n`` and ``sampling.seed`` do not count here, ``seed``
    does, see :func:`fft.serve.sampling.row_seed`. All tokens of its ``images`` are among the ids, in their order.
    """

    number: int
    ids: Sequence[int]
    sampling: Sampling
    seed: int
    room: int
    images: "Sequence[ReadImage]" = ()


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt. ``finish_reason`` is "stop" (an end that was asked for, or the model's own)
    or "length" (the limit).

    ``tokens`` does not count the token that ended it. ``logprobs`` has, if asked for, of each token ``token`` (its
    text), ``id``, ``logprob``, and the same of the likeliest under ``top_logprobs``.
    """

    text: str
    tokens: int
    finish_reason: str
    logprobs: tuple[dict[str, Any], ...] | None = None


class Engine(Protocol):
    """Takes requests at any time; each step brings it forward and returns what has finished."""

    name: str
    #: Tokens of a prompt and its answer, at most.
    limit: int
    #: Requests to have unfinished, so that it has enough to choose from.
    window: int

    def add(self, request: Request) -> None:
        """Take a request; its number must not be that of an unfinished one."""

    def step(self) -> list[tuple[int, Completion]]:
        """Go on; the numbers of requests that have finished, and their answers."""

    def close(self) -> None:
        """End it, its processes too; what is unfinished is lost. May be called twice."""


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :class:`EngineOptions`."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=ENGINES, default="auto", help="auto: vLLM where installed (default)")
    group.add_argument(
        "--batch_size",
        "--bacth_size",
        type=positive,
        default=8,
        help="prompts at a time; vLLM decides itself (default: %(default)s)",
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, else the model's")
    group.add_argument("--max_model_len", type=positive, help="tokens of a prompt and its answer, at most")
    group.add_argument("--tensor_parallel_size", type=positive, default=1, help="GPUs that share the model (vLLM)")
    group.add_argument("--gpu_memory_utilization", type=float, help="share of a GPU's memory to take (vLLM: 0.92)")
    group.add_argument("--lora", metavar="DIR", help="adapter to add to the model, in PEFT's format")
    group.add_argument(
        "--engine_args", type=_json_object, default={}, metavar="JSON", help="more of vLLM's engine arguments"
    )


def engine_options_of(args: argparse.Namespace) -> EngineOptions:
    """What the flags say. Raises :class:`UserError` as :class:`EngineOptions` does."""
    names = [spec.name for spec in fields(EngineOptions) if spec.name != "name"]
    return EngineOptions(name=args.engine, **{name: getattr(args, name) for name in names})


def _json_object(text: str) -> dict[str, Any]:
    try:
        return dict(json_value(text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"quantization": "fp8"}}') from None
