"""A file of prompts is checked, answered and written: what :mod:`fft.serve.batch_infer` does."""

import argparse
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fft.console import live, say
from fft.data.known import LeftOut
from fft.data.owner import owned
from fft.errors import UserError
from fft.files import hidden
from fft.serve.asked import ERROR, FINISH, LOGPROBS, TEXT, Reading
from fft.serve.columns import output_schema
from fft.serve.engines import Completion, Engine, engine_options_of
from fft.serve.engines.checked import CheckedModel, check_model
from fft.serve.engines.choice import start_engine
from fft.serve.inputs import find_inputs
from fft.serve.outputs import PARQUET, Partial, check_output
from fft.serve.prompt_flags import image_settings_of
from fft.serve.prompts import Renderer
from fft.serve.rows import Facts, PromptRows, Row
from fft.serve.sampling import Sampling, sampling_of
from fft.serve.stopping import Stopped
from fft.serve.window import Question, answers

#: Models take room for so many tokens at once: lengths are rounded up to a multiple.
_ROUND = 64


@dataclass
class Tally:
    """Prompts and new tokens so far, of ``total`` prompts, of which ``before`` were there at the begin."""

    total: int
    before: int = 0
    prompts: int = 0
    tokens: int = 0

    def line(self, seconds: float) -> str:
        """How many are done after so many seconds, and how fast."""
        rates = f"{self.prompts / seconds:,.1f} prompts/s  {self.tokens / seconds:,.0f} new tokens/s"
        missing = self.total - self.before - self.prompts
        left = f"  {seconds * missing / self.prompts:,.0f} s left" if self.prompts else ""
        return f"{self.before + self.prompts:,}/{self.total:,} prompts  {rates}{left}"


def answer_file(args: argparse.Namespace) -> None:
    """Check all, generate, write. Raises :class:`UserError` for what cannot be read, written or answered."""
    output = check_output(args.output, args.overwrite)
    reserved = (TEXT, FINISH, *([LOGPROBS] if args.logprobs is not None else []))
    reserved += (ERROR,) if args.on_error == "quarantine" else ()
    images = image_settings_of(vars(args))
    reading = Reading(args.prompt_key, sampling_of(args), reserved, images is not None)
    model = check_model(_model_folder(args.model), engine_options_of(args), images=images)
    left_out = LeftOut()
    renderer = Renderer.of(model.tokenizer, model.limit, args.chat, args.system, model.images)
    rows = PromptRows(find_inputs(args.inputs, left_out), reading, renderer, args.on_error == "quarantine")
    for file in rows.files:
        if os.path.realpath(file.name) == os.path.realpath(output):
            raise UserError(f"`output` {output} is an input, too: name another file.")
    for note in left_out.notes():
        say(note)
    facts = Facts()
    with live(lambda seconds: f"{facts.rows:,} prompts looked at, {facts.rows / seconds:,.0f} a second"):
        rows.check(facts, typed=output.suffix == PARQUET)
    for key, count in renderer.unused.most_common():
        say(f"note: the chat template does not read {key} ({count:,} times).")
    schema = output_schema(facts.schema, reading.sampling, rows.quarantine) if output.suffix == PARQUET else None
    about = _about(args, model, facts)
    with ExitStack() as held:
        held.enter_context(owned(hidden(output, "owner"), f"--output {output}"))
        partial = Partial(output, about, args.resume == "auto")
        held.callback(partial.close)
        if partial.done < facts.rows:
            _generate(rows, model, facts, partial)
        if schema is None:
            partial.become_lines()
        else:
            partial.become_parquet((row.shown for row in rows.read()), schema)
    faults = f", {facts.faults:,} of {facts.rows:,} rows with an error in them" if facts.faults else ""
    say(f"wrote {output}{faults}")


def _generate(rows: PromptRows, model: CheckedModel, facts: Facts, partial: Partial) -> None:
    """Answer what is not answered yet, and keep it."""
    engine: Engine | None = None
    tally = Tally(facts.rows, partial.done)
    try:
        begin = time.monotonic()
        if facts.longest:  # else nothing is asked at all
            engine = start_engine(model, min(model.limit, -(-facts.longest // _ROUND) * _ROUND))
        again = f", {partial.done:,} of them answered before" if partial.done else ""
        say(f"{facts.rows:,} prompts, {model.engine}{again}; loaded in {time.monotonic() - begin:,.0f} s")
        digest = hashlib.sha256()
        with live(tally.line, last=True):
            for row, completions in _answered(engine, rows.read(partial.done, digest)):
                partial.add(row.answered(completions) if partial.is_parquet else row.line(completions))
                tally.prompts += 1
                tally.tokens += sum(one.tokens for one in completions)
        if digest.hexdigest() != facts.sha256:
            raise UserError("`inputs` changed while they were read: run again when they are whole.")
    except Stopped as stopped:
        say(
            f"stopped by {stopped.signal}: {tally.before + tally.prompts:,} of {tally.total:,} prompts are answered in "
            f"{partial.path}; give the same command again to go on"
        )
        raise
    finally:
        if engine is not None:
            engine.close()


def _answered(engine: Engine | None, rows: Iterable[Row]) -> Iterator[tuple[Row, tuple[Completion, ...]]]:
    if engine is None:
        yield from ((row, ()) for row in rows)
        return
    default = Sampling()
    questions = (
        Question(row, row.number, row.ids, row.asked.sampling if row.asked else default, row.images) for row in rows
    )
    for question, completions in answers(engine, questions):
        yield question.item, completions


def _model_folder(model: str) -> str:
    """Raise :class:`UserError` for what is no model directory."""
    if not Path(model).is_dir():
        raise UserError(f"--model {model} is not a folder: give a Hugging Face model directory.")
    if not (Path(model) / "config.json").is_file():
        remedy = "give a Hugging Face model directory"
        if (Path(model) / "adapter_config.json").is_file():
            remedy = "name the model that it adapts, and the adapter with --lora"
        raise UserError(f"--model {model} has no config.json: {remedy}.")
    return model


def _about(args: argparse.Namespace, model: CheckedModel, facts: Facts) -> dict[str, Any]:
    """What answers depend on."""
    return {
        "model": model.identity(),
        "input": {"rows": facts.rows, "sha256": facts.sha256} | ({"images": facts.images} if facts.images else {}),
        "reading": {name: getattr(args, name) for name in ("prompt_key", "chat", "system", "on_error")},
        "sampling": asdict(sampling_of(args)),
        "output": "parquet" if args.output.endswith(PARQUET) else "lines",
    }
