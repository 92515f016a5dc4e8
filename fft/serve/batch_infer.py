"""Complete a file of prompts with a model: ``python -m fft.serve.batch_infer``. ``--help`` shows how."""

import argparse
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fft.console import live, say
from fft.errors import Parser, UserError, run_cli
from fft.files import atomic_file, hidden
from fft.serve.engines import Completion, add_engine_flags, engine_options_of
from fft.serve.engines.choice import load_engine
from fft.serve.prompts import CHAT, Renderer, load_model_tokenizer
from fft.serve.sampling import add_sampling_flags, sampling_of
from fft.serve.window import Question, answers
from fft.text.records import Malformed

_EXAMPLES = """examples:
  # one prompt a line, greedy
  python -m fft.serve.batch_infer --model runs/model --input prompts.txt --output out.jsonl

  # JSON lines with the key "question"; the other fields travel along to the output
  python -m fft.serve.batch_infer --model Qwen3-8B --input test.jsonl --prompt_key question --output out.jsonl \\
      --max_new_tokens 512 --temperature 0.7 --top_p 0.9 --seed 1

Every output line holds prompt, text, finish_reason ("stop" or "length") and the input's other fields, in the
input's order.
"""

#: Keys of an output line that the input may not bring itself.
_RESULT_KEYS = ("prompt", "text", "finish_reason")


@dataclass(frozen=True)
class Prompt:
    """A prompt and the fields that came with it."""

    text: str
    fields: dict = field(default_factory=dict)


def read_prompts(path: Path, key: str) -> list[Prompt]:
    """Read prompts from ``.jsonl`` or ``.parquet`` (under ``key``), or from ``.txt`` (one a line; blank lines skipped).

    Raises :class:`UserError` naming file and line or row of the first one that is none.
    """
    if not path.is_file():
        raise UserError(f"--input {path} does not exist: give a .jsonl, .txt or .parquet file of prompts.")
    if path.suffix == ".txt":
        lines = (line.removesuffix("\n").removesuffix("\r") for line, _ in _lines(path))
        prompts = [Prompt(line) for line in lines if line.strip()]
    elif path.suffix == ".jsonl":
        prompts = [_prompt(record, key, where) for record, where in _json_lines(path)]
    elif path.suffix == ".parquet":
        prompts = [_prompt(record, key, where) for record, where in _parquet_rows(path)]
    else:
        raise UserError(f"--input {path}: prompts are read from .jsonl, .txt or .parquet files, not {path.suffix!r}.")
    if not prompts:
        raise UserError(f"--input {path} holds no prompts.")
    return prompts


def write_completions(path: Path, prompts: Sequence[Prompt], batches: Iterable[list[Completion]]) -> None:
    """Write one JSON line a prompt, completions in the prompts' order; ``path`` appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    completions = itertools.chain.from_iterable(batches)
    with atomic_file(path) as aside, open(aside, "w", encoding="utf-8") as stream:
        for prompt, completion in zip(prompts, completions, strict=True):
            result = {"prompt": prompt.text, "text": completion.text, "finish_reason": completion.finish_reason}
            stream.write(json.dumps(result | prompt.fields, ensure_ascii=False, default=str) + "\n")


@dataclass
class Tally:
    """Prompts and new tokens so far, of ``total`` prompts."""

    total: int
    prompts: int = 0
    tokens: int = 0

    def count(self, batches: Iterable[list[Completion]]) -> Iterator[list[Completion]]:
        """Pass batches on; each is counted when the next one is asked for, that is, when it is written."""
        for batch in batches:
            yield batch
            self.prompts += len(batch)
            self.tokens += sum(completion.tokens for completion in batch)

    def line(self, seconds: float) -> str:
        """How many are done after so many seconds, and how fast."""
        rates = f"{self.prompts / seconds:,.1f} prompts/s  {self.tokens / seconds:,.0f} new tokens/s"
        left = f"  {seconds * (self.total - self.prompts) / self.prompts:,.0f} s left" if self.prompts else ""
        return f"{self.prompts:,}/{self.total:,} prompts  {rates}{left}"


def build_parser() -> Parser:
    """Flags of the command."""
    parser = Parser(
        prog="python -m fft.serve.batch_infer",
        description="Complete every prompt of a file with a Hugging Face model.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument("--input", required=True, type=Path, metavar="FILE", help="prompts: .jsonl, .txt or .parquet")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON lines to write")
    parser.add_argument("--prompt_key", default="prompt", help="key or column of the prompt (default: %(default)s)")
    parser.add_argument(
        "--chat", choices=CHAT, default="auto", help="a text is a user's turn (auto: where there is a chat template)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system turn of every chat that has none")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    add_sampling_flags(parser)
    add_engine_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Read, check, generate, write. Raises :class:`UserError` for inputs that cannot be read and outputs that exist."""
    parser = build_parser()
    with parser.naming_flags():
        _run(parser.parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    sampling, options = sampling_of(args), engine_options_of(args)
    if not Path(args.model).is_dir():
        raise UserError(f"--model {args.model} is not a folder: give a Hugging Face model directory.")
    if not (Path(args.model) / "config.json").is_file():
        adapter = (Path(args.model) / "adapter_config.json").is_file()
        remedy = (
            "merge the adapter by python -m fft.checkpoint.convert"
            if adapter
            else "give a Hugging Face model directory"
        )
        raise UserError(f"--model {args.model} has no config.json: {remedy}.")
    _check_output(args.output, args.overwrite)
    prompts = read_prompts(args.input, args.prompt_key)
    engine = load_engine(args.model, options)
    try:
        say(f"{len(prompts):,} prompts, {engine.name}")
        renderer = Renderer.of(load_model_tokenizer(args.model), engine.limit, args.chat, args.system)
        questions = []
        for row, (prompt, ids) in enumerate(zip(prompts, renderer.render_many([p.text for p in prompts]), strict=True)):
            if isinstance(ids, Malformed):
                raise UserError(f"prompt {row + 1}: {ids}.")
            questions.append(Question(prompt, row, ids, sampling))
        tally = Tally(len(prompts))
        batches = (list(found) for _, found in answers(engine, questions))
        with live(tally.line, last=True):
            write_completions(args.output, prompts, tally.count(batches))
    finally:
        engine.close()
    say(f"wrote {args.output}")


def _check_output(path: Path, overwrite: bool) -> None:
    """Raise :class:`UserError` where what takes hours could not be written at its end."""
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file.")
    if path.exists() and not overwrite:
        raise UserError(f"--output {path} exists: choose another file or add --overwrite.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = hidden(path, f"{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {path} cannot be made ({error.strerror}): choose another place.") from error


def _prompt(record: object, key: str, where: str) -> Prompt:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object.")
    if key not in record:
        raise UserError(f"{where} has no {key!r} (it has {', '.join(record) or 'nothing'}): name it with --prompt_key.")
    text = record[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {key!r} must be a string, not {type(text).__name__}.")
    fields = {name: value for name, value in record.items() if name != key}
    if taken := [name for name in _RESULT_KEYS if name in fields]:
        raise UserError(f"{where} has a field {taken[0]!r}, which the output needs for itself: rename it.")
    return Prompt(text, fields)


def _json_lines(path: Path) -> Iterator[tuple[object, str]]:
    for line, where in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}).") from error
        yield record, where


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines and where they stand. Bytes are split first, so that the line that is not UTF-8 can be named."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}, line {number}"
            try:
                yield line.decode("utf-8"), where
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 ({error.reason}): save the file as UTF-8.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[dict, str]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--input {path} is no readable parquet file ({error}): write it again.") from error
    for number, row in enumerate(rows):
        yield row, f"{path}, row {number}"


if __name__ == "__main__":
    run_cli(main)
