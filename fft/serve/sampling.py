"""How tokens are chosen: one set of settings for both engines, the command line, notebooks and Spark's workers."""

import argparse
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fft.errors import UserError, positive

#: Most samples of a prompt, most likely tokens told of each token, the hottest temperature: vLLM's own bounds.
_MOST_SAMPLES, _MOST_LOGPROBS, _HOTTEST = 1024, 20, 2.0
#: Below this, vLLM takes a temperature for it.
_COLDEST = 0.01


_WHOLE, _NUMBER = (int, "a whole number", False), ((int, float), "a number", False)
#: Of each setting: what it must be, that in words, and whether it is a tuple of such.
_KINDS: dict[str, tuple[Any, str, bool]] = {
    **dict.fromkeys(("max_new_tokens", "top_k", "n", "seed"), _WHOLE),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _NUMBER),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _NUMBER),
    "stop": (str, "a list of texts", True),
    "stop_token_ids": (int, "a list of whole numbers", True),
    "ignore_eos": (bool, "true or false", False),
    "logprobs": ((int, type(None)), "a whole number", False),
}


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; ``temperature`` 0 is greedy.

    ``top_p`` keeps the likeliest tokens of that total probability, ``top_k`` so many (0: all), ``min_p`` those that
    are at least that share as likely as the likeliest. ``repetition_penalty`` divides the scores of tokens in prompt
    and answer, ``presence_penalty`` and ``frequency_penalty`` lower those in the answer, once or each time. ``n``
    samples are drawn of a prompt. ``stop`` are texts, ``stop_token_ids`` tokens that end an answer and are no part of
    it; with ``ignore_eos`` the model's own end is none. ``logprobs`` tells the log probability of each token and of so
    many likeliest ones; None tells none. Raises :class:`UserError` for what is out of bounds.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            kind, what, several = _KINDS[spec.name]
            values = value if several and isinstance(value, tuple) else [value]
            if several != isinstance(value, tuple) or not all(_is_of(one, kind) for one in values):
                raise UserError(f"`{spec.name}` must be {what}, not {value!r}.")
        for name, holds, sentence in (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            (
                "temperature",
                self.temperature == 0 or _COLDEST <= self.temperature <= _HOTTEST,
                f"must be 0 (greedy) or from {_COLDEST} to {_HOTTEST:g}",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be a share above 0 and up to 1"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or a number of tokens"),
            ("min_p", 0 <= self.min_p <= 1, "must be a share from 0 to 1"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "must be a number above 0 (1: no penalty)",
            ),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "must be from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "must be from -2 to 2"),
            ("n", 1 <= self.n <= _MOST_SAMPLES, f"must be from 1 to {_MOST_SAMPLES}"),
            ("stop", all(self.stop), "must hold no empty text"),
            ("stop_token_ids", all(token >= 0 for token in self.stop_token_ids), "must be ids of tokens, from 0"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= _MOST_LOGPROBS,
                f"must be from 0 to {_MOST_LOGPROBS}",
            ),
        ):
            if not holds:
                raise UserError(f"`{name}` {getattr(self, name)} {sentence}.")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"`n` {self.n} needs a `temperature` above 0: greedy samples are all the same.")


def _is_of(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))  # to Python, True is an int


def row_seed(seed: int, row: int | str, sample: int = 0) -> int:
    """The seed of one sample of a row: those of neighbouring rows, samples and seeds have nothing to do with each
    other. ``row`` is its number, or a name that does not depend on how rows are dealt to workers."""
    key = f"{seed}:{row}" if sample == 0 else f"{seed}:{row}/{sample}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of :class:`Sampling`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max_new_tokens", type=positive, default=64, help="default: %(default)s")
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    group.add_argument("--top_k", type=int, default=0, help="sample from so many likeliest tokens (0: all)")
    group.add_argument(
        "--min_p", type=float, default=0.0, help="sample from tokens at least this share as likely as the likeliest"
    )
    group.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: fewer tokens of prompt and answer again"
    )
    group.add_argument("--presence_penalty", type=float, default=0.0, help="above 0: fewer tokens of the answer again")
    group.add_argument("--frequency_penalty", type=float, default=0.0, help="the same, for each time that they occur")
    group.add_argument("--n", type=positive, default=1, help="samples of each prompt (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    group.add_argument("--stop", nargs="+", default=(), metavar="TEXT", help="texts that end an answer")
    group.add_argument("--stop_token_ids", nargs="+", type=int, default=(), metavar="ID", help="tokens that end one")
    group.add_argument("--ignore_eos", action="store_true", help="go on after the model's end of sequence")
    group.add_argument(
        "--logprobs", type=int, metavar="K", help="tell each token's log probability, and those of the K likeliest"
    )


def sampling_of(args: argparse.Namespace | Mapping[str, Any]) -> Sampling:
    """The settings that flags, or keywords of a notebook, give. Raises :class:`UserError` as :class:`Sampling` does."""
    given = args if isinstance(args, Mapping) else vars(args)
    values = {field.name: given[field.name] for field in fields(Sampling) if field.name in given}
    for name in ("stop", "stop_token_ids"):
        if name in values:
            values[name] = tuple(values[name] or ())
    return Sampling(**values)
