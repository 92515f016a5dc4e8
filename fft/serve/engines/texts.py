"""From the ids of an answer to its text, alike for every engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of the prompt that an answer's first ones are read with: some tokenizers write them otherwise at a beginning.
_BEFORE = 6


def decode_answer(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` as it goes on after the prompt, without special tokens."""
    before = list(prompt[-_BEFORE:])
    head, whole = _decode(tokenizer, before), _decode(tokenizer, [*before, *ids])
    return whole[len(head) :] if whole.startswith(head) else _decode(tokenizer, ids)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the one of these texts begins that is complete first; None if there is none."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def told_logprobs(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], steps: Sequence[Sequence[tuple[int, float]]], count: int
) -> tuple[dict[str, Any], ...]:
    """What :class:`fft.serve.engines.Completion` tells of each of ``ids``, by the log probabilities of tokens at that
    step: the ``count`` likeliest are told beside its own, likeliest first."""
    told = []
    for token, known in zip(ids, steps, strict=True):
        ranked = sorted(known, key=lambda pair: (-pair[1], pair[0]))[:count]
        entry = _token(tokenizer, token, dict(known)[token])
        told.append(entry | {"top_logprobs": [_token(tokenizer, *pair) for pair in ranked]})
    return tuple(told)


def _token(tokenizer: "PreTrainedTokenizerBase", token: int, logprob: float) -> dict[str, Any]:
    return {"token": tokenizer.decode([token], clean_up_tokenization_spaces=False), "id": token, "logprob": logprob}


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
