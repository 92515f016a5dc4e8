"""Answers of the model that is being trained, at every evaluation: greedy, by the pipeline that trains, on any layout.

The prompts lie in rows like those that are trained on, each a document of its own, and a forward of the pipeline gives
the next token of each. No keys are cached: an evaluation costs as many forwards as its longest answer has tokens.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fft.arguments import TrainArguments
from fft.checkpoint.folder import SAMPLES
from fft.checkpoint.run import RunFolder
from fft.data.batches import BatchPlan, MicroBatch
from fft.data.table import IGNORE
from fft.errors import UserError, one_line
from fft.json_text import json_value, small_text
from fft.models.causal_lm import StageBuilder
from fft.ops.cross_entropy import Vocabulary
from fft.ops.documents import lse_dtype
from fft.parallel.groups import tell_all
from fft.planning.preflight import Plan, batch_plan
from fft.text.chat_template import ChatTemplate, load_chat_template
from fft.text.encoder import load_tokenizer
from fft.text.formats import PROMPTS
from fft.text.messages import check_unicode, read_conversation
from fft.text.records import Malformed, load_json
from fft.training.engine import StageEngine
from fft.training.feed import own_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of an answer, at most; samples of an evaluation that are told, and how many letters of each text.
_TOKENS, _TOLD, _LETTERS = 64, 3, 80


@dataclass
class AskedSample:
    """A prompt as it was ``given``, its ``ids``, those of its ``answer`` so far, and whether that has ended."""

    given: object
    ids: list[int]
    answer: list[int] = field(default_factory=list)
    ended: bool = False


class SampleAnswers:
    """The prompts of ``--sample_prompts`` and their answers. Collective: every rank creates it, and asks together.

    Answers are put into the folders of ``runs``, behind those of earlier steps. ``control`` is a group of all ranks
    that sends what is in host memory. Raises :class:`UserError` for prompts that cannot be read or differ between
    machines, and for a run with images.
    """

    def __init__(
        self,
        args: TrainArguments,
        plan: Plan,
        builder: StageBuilder,
        engine: StageEngine,
        runs: Sequence[RunFolder],
        control: dist.ProcessGroup,
    ) -> None:
        if plan.images is not None:
            raise UserError("--sample_prompts are texts, and rows of this run hold images: leave the flag out.")
        if plan.tokenizer is None:
            raise UserError("--sample_prompts are texts, and --model has no tokenizer: name one with --tokenizer.")
        self._engine, self._sequence, self._runs = engine, builder.ranks.sequence, runs
        self._batches, self._length = batch_plan(args, plan.mesh, 0), args.seq_len
        self._most = min(_TOKENS, args.seq_len // 2)
        self._tokenizer = load_tokenizer(Path(plan.tokenizer))
        name = str(args.tokenizer or args.model)
        template = load_chat_template(self._tokenizer, name) if self._tokenizer.chat_template else None
        self._ends = answer_ends(self._tokenizer, template, plan.config.get_text_config().eos_token_id)
        self._samples = read_prompts(str(args.sample_prompts), self._tokenizer, template, args.seq_len - self._most)
        _check_same([sample.ids for sample in self._samples], str(args.sample_prompts), control)
        self._chosen = HighestTokens(builder.vocabulary, len(self._samples), engine.device)

    def take(self, step: int, log: Callable[[str], None]) -> None:
        """Have all prompts answered, tell the first, and keep all. Collective."""
        for sample in self._samples:
            sample.answer, sample.ended = [], False
        while not all(sample.ended for sample in self._samples):
            self._one_more()
        told = [self._told(step, sample) for sample in self._samples]
        for one in told[:_TOLD]:
            log(f"step {step}  sample  {_short(one['prompt'])} -> {_short(one['answer'])}")
        if dist.get_rank() == 0:
            for run in self._runs:
                keep_samples(run, step, told, log)

    def _one_more(self) -> None:
        """A token of each answer."""
        rows = prompt_rows(self._samples, self._most, self._length, self._batches)
        batches = [own_share(row, self._sequence) for row in rows]
        with self._chosen.in_place_of_loss(self._engine):
            self._engine.sum_losses(batches, len(batches))
        for sample, token in zip(self._samples, self._chosen.tokens(), strict=True):
            if not sample.ended:
                sample.answer.append(token)
                sample.ended = token in self._ends or len(sample.answer) == self._most

    def _told(self, step: int, sample: AskedSample) -> dict:
        whole = sample.answer[-1] in self._ends
        ids = sample.answer[:-1] if whole else sample.answer
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return {"step": step, "prompt": sample.given, "answer": text, "tokens": len(sample.answer), "ended": whole}


class HighestTokens:
    """In place of a loss: the tokens of the highest scores, where labels are numbers of prompts."""

    def __init__(self, vocabulary: Vocabulary, prompts: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._found = torch.full((prompts,), -1, dtype=torch.int64, device=device)

    def __call__(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, Tensor]) -> Tensor:
        """Takes what :class:`fft.training.loss.TokenMeanLoss` takes. Collective where ranks share the vocabulary."""
        (hidden, weight, *bias), (places, prompts) = outputs, labels
        scores = (hidden[places] @ weight.t()).to(lse_dtype(hidden))
        scores = scores + bias[0] if bias else scores
        highest, ids = scores.max(1)
        ids, ranks = ids + self._vocabulary.first, self._vocabulary.ranks
        if ranks is not None:
            own = highest == ranks.all_reduce(highest.clone(), dist.ReduceOp.MAX)
            ids = ranks.all_reduce(ids.masked_fill(~own, torch.iinfo(ids.dtype).max), dist.ReduceOp.MIN)
        self._found[prompts] = ids
        return hidden.new_zeros((), dtype=torch.float32)

    @contextmanager
    def in_place_of_loss(self, engine: StageEngine) -> Iterator[None]:
        """Have ``engine`` ask this for its losses."""
        module, self._found = engine.deepspeed.module, self._found.fill_(-1)
        own, module.loss_fn = module.loss_fn, self
        try:
            yield
        finally:
            module.loss_fn = own

    def tokens(self) -> list[int]:
        """The token of each prompt, on all ranks. Collective."""
        dist.all_reduce(self._found, dist.ReduceOp.MAX)
        return self._found.tolist()


def prompt_rows(samples: Sequence[AskedSample], most: int, length: int, plan: BatchPlan) -> list[MicroBatch]:
    """Micro-batches of ``plan``'s size, of samples of ``length`` tokens, with all prompts and their answers so far.

    Answers may come to ``most`` tokens. Each is a document that does not cross samples; the label of its last token is
    its number.
    """
    rows: list[list[list[int]]] = [[[]]]  # micro-batches of samples of numbers
    used = 0
    for number, sample in enumerate(samples):
        room = len(sample.ids) + most  # the same at every token
        if used + room > length:
            rows[-1].append([]) if len(rows[-1]) < plan.micro_batch_size else rows.append([[]])
            used = 0
        rows[-1][-1].append(number)
        used += room
    return [_row(row, samples, length, plan) for row in rows]


def _row(row: Sequence[Sequence[int]], samples: Sequence[AskedSample], length: int, plan: BatchPlan) -> MicroBatch:
    ids, labels, ends = [], [], [0]
    for numbers in row:
        for number in numbers:
            own = [*samples[number].ids, *samples[number].answer]
            ids += own
            labels += [*[IGNORE] * (len(own) - 1), number]
            ends.append(len(ids))
    used, tokens = len(ids), length * plan.micro_batch_size
    tokens = tokens if plan.multiple is None else min(tokens, -(-used // plan.multiple) * plan.multiple)
    last = tokens if plan.multiple is None else used
    ends += [last] * (tokens + 1 - len(ends))
    return MicroBatch(
        np.pad(np.array(ids, dtype=np.int32), (0, tokens - used))[None],
        np.pad(np.array(labels, dtype=np.int64), (0, tokens - used), constant_values=IGNORE),
        np.array(ends, dtype=np.int32),
        sum(map(len, row)),
        draws=None if plan.draws is None else np.ones(tokens, dtype=np.int64),  # nothing is dropped now
    )


def read_prompts(
    path: str, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate | None, longest: int
) -> list[AskedSample]:
    """The prompts of a file of JSON lines, of at most ``longest`` tokens: texts under ``prompt``, which are a user's
    turn where there is a ``template``, or conversations.

    Raises :class:`UserError` for a file that cannot be read, or has none, or a line that is no such prompt.
    """
    try:
        lines = small_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--sample_prompts {path} cannot be read ({one_line(error)}): name JSON lines.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = load_json(line)
            check_unicode(record)
            given, ids = _prompt(record, tokenizer, template)
            if not 0 < len(ids) <= longest:
                raise Malformed(f"it has {len(ids):,} tokens, and may have {longest:,}: its answer needs room")
        except Malformed as error:
            raise UserError(f"--sample_prompts {path}, line {number}: {error}.") from error
        found.append(AskedSample(given, ids))
    if not found:
        raise UserError(f"--sample_prompts {path} is empty: give a JSON object with a prompt or messages on each line.")
    return found


def _prompt(
    record: object, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate | None
) -> tuple[object, list[int]]:
    """What was asked, and its ids."""
    text = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(text, str):
        if template is None:
            return text, tokenizer(text, verbose=False).input_ids
        turns: object = [{"role": "user", "content": text}]
    elif template is None:
        raise Malformed("it has no text under prompt, and the tokenizer no chat template")
    else:
        turns = record
    raw = read_conversation(turns, template.keys, formats=PROMPTS)
    if not raw.messages or raw.messages[-1]["role"] == "assistant":
        raise Malformed("it ends with an answer, or has no turns: end it with the turn that is to be answered")
    written = template.render(raw.messages, True, raw.tools)
    ids = tokenizer(written, add_special_tokens=False, verbose=False).input_ids
    return text if isinstance(text, str) else raw.messages, ids


def _check_same(ids: list[list[int]], path: str, control: dist.ProcessGroup) -> None:
    """Raise :class:`UserError` where ranks have read other prompts. Collective."""
    if len({*tell_all(hashlib.sha256(repr(ids).encode()).hexdigest(), control)}) > 1:
        raise UserError(f"--sample_prompts {path} is not the same on all machines: copy it there.")


def answer_ends(
    tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate | None, named: int | list[int] | None
) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, the config's, and what ends a turn."""
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    if template is not None and template.end_of_turn:
        ends.add(tokenizer(template.end_of_turn, add_special_tokens=False).input_ids[-1])
    return frozenset(end for end in ends if end is not None)


def keep_samples(run: RunFolder, step: int, told: Sequence[dict], log: Callable[[str], None]) -> None:
    """Put answers behind those of earlier steps; a folder that cannot be written is told of."""
    try:
        before = [line for line in (run.text(SAMPLES) or "").splitlines() if _earlier(line, step)]
        run.put(SAMPLES, "".join(f"{line}\n" for line in (*before, *map(_line, told))))
    except (OSError, UserError) as error:  # samples are not worth a run
        log(f"warning: {run.shown(SAMPLES)} could not be written ({one_line(error)})")


def _line(told: dict) -> str:
    return json.dumps(told, ensure_ascii=False)


def _earlier(line: str, step: int) -> bool:
    try:
        return json_value(line)["step"] < step
    except (ValueError, TypeError, KeyError):
        return False


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return repr(text if len(text) <= _LETTERS else f"{text[:_LETTERS]} ...")
