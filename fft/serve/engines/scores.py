"""How transformers' ``generate`` chooses tokens and ends rows, in vLLM's order: penalties, temperature, ``min_p``,
``top_k``, ``top_p``, the draw. Needs torch; all rows of a batch have one sampling."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    StoppingCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fft.serve.engines import Request
from fft.serve.engines.texts import decode_answer, first_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Choice(LogitsProcessor):
    """Has the likeliest token of every row be the one to take: where tokens are drawn, one drawn at random.

    With q drawn from an exponential distribution, log p - log q is largest for each token with its probability p. Each
    row draws from a generator of its own. ``width`` is the padded length of the prompts. ``steps`` has, where log
    probabilities are asked for, of every row and step those of the likeliest tokens and of the one that was taken.
    """

    def __init__(self, batch: Sequence[Request], width: int, vocabulary: int, device: torch.device) -> None:
        sampling = self._sampling = batch[0].sampling
        self._width = width
        self._filters: list[LogitsProcessor] = []
        self._generators = [torch.Generator(device).manual_seed(request.seed) for request in batch]
        if sampling.min_p > 0:
            self._filters.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k > 0:
            self._filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._filters.append(TopPLogitsWarper(sampling.top_p))
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._penalized = penalties != (1.0, 0.0, 0.0)
        if self._penalized:
            self._in_prompt = torch.zeros(len(batch), vocabulary, dtype=torch.bool, device=device)
            for row, request in enumerate(batch):
                self._in_prompt[row, torch.tensor(request.ids, device=device)] = True
            self._counts = torch.zeros(len(batch), vocabulary, device=device)
        self.steps: list[list[list[tuple[int, float]]]] = [[] for _ in batch]
        self._raw: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] -> scores whose largest is to be taken."""
        scores = scores.float()
        self._raw = None if self._sampling.logprobs is None else scores.log_softmax(-1)
        if self._penalized:
            scores = self._penalize(input_ids, scores)
        if self._sampling.temperature == 0:
            return scores
        likely = scores / self._sampling.temperature
        for filter_ in self._filters:
            likely = filter_(input_ids, likely)
        rows = zip(likely, self._generators, strict=True)
        drawn = torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])
        return likely - drawn.log()

    def _penalize(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self._width:
            self._counts.scatter_add_(1, input_ids[:, -1:], torch.ones_like(input_ids[:, -1:], dtype=torch.float))
        sampling, answered = self._sampling, self._counts > 0
        by = sampling.repetition_penalty
        repeated = torch.where(scores > 0, scores / by, scores * by)
        scores = torch.where(self._in_prompt | answered, repeated, scores)
        return scores - sampling.frequency_penalty * self._counts - sampling.presence_penalty * answered

    def record(self, taken: Tensor) -> None:
        """Note the log probabilities of a step of which these tokens [rows] were taken."""
        if self._raw is None:
            return
        count = min(self._sampling.logprobs or 0, self._raw.shape[1])
        values, tokens = self._raw.topk(count)
        own = self._raw.gather(1, taken[:, None])[:, 0].tolist()
        ranked = zip(tokens.tolist(), values.tolist(), strict=True)
        for steps, token, logprob, (ids, logprobs) in zip(self.steps, taken.tolist(), own, ranked, strict=True):
            steps.append(list({**dict(zip(ids, logprobs, strict=True)), token: logprob}.items()))


class Ends(StoppingCriteria):
    """Ends each row at a token or text that ends it, or when its room is used up.

    ``found`` has of every row the length that counts, and "stop" or "length". ``after`` is told every step's tokens.
    """

    def __init__(
        self,
        batch: Sequence[Request],
        width: int,
        ends: frozenset[int],
        tokenizer: "PreTrainedTokenizerBase",
        after: Callable[[Tensor], None],
    ) -> None:
        sampling = batch[0].sampling
        self._batch, self._width, self._tokenizer, self._after = batch, width, tokenizer, after
        self._ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else ends)
        self._stops = sampling.stop
        self.found: list[tuple[int, str]] = [(-1, "")] * len(batch)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Whether each row [rows] has ended, with the tokens [rows, length] that there are."""
        self._after(input_ids[:, -1])
        length = input_ids.shape[1] - self._width
        last = input_ids[:, -1].tolist()
        for row, request in enumerate(self._batch):
            if self.found[row][1]:
                continue
            if last[row] in self._ends:
                self.found[row] = length - 1, "stop"
            elif self._stops and self._says_stop(request, input_ids[row, self._width :].tolist()):
                self.found[row] = length, "stop"
            elif length >= request.room:
                self.found[row] = length, "length"
        return torch.tensor([bool(reason) for _, reason in self.found], device=input_ids.device)

    def _says_stop(self, request: Request, ids: list[int]) -> bool:
        return first_stop(decode_answer(self._tokenizer, request.ids, ids), self._stops) is not None
