"""Every public entry that opens what a stranger can have made, as the fuzz calls it, by the folders that it gets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from image_tables import GRID_RULES
from unit.security.strangers import REFERENCE

from fft.arguments import resolve
from fft.checkpoint.convert import main as convert
from fft.checkpoint.folder import fault
from fft.checkpoint.stored_run import run_at
from fft.corpus.files import Source, spans_of
from fft.corpus.local import text_input
from fft.corpus.splits import deal
from fft.corpus.tokenize_parts import tokenize_part
from fft.data.blend import parse_evaluations
from fft.data.known import GRIDS, IMAGES, LeftOut
from fft.data.pairs import read_reference
from fft.data.part_files import PartFolder
from fft.data.table import Table
from fft.data.trace import document_names
from fft.data.worker_notes import WorkerNotes
from fft.images.rules import ImageLimits, load_rules
from fft.models.directory import load_config
from fft.plan.hardware import read_machine
from fft.planning.identity import weights_hash
from fft.planning.preflight import lay_out
from fft.report.__main__ import main as report
from fft.serve.engines.checked import check_model
from fft.serve.inputs import find_inputs, read_rows
from fft.show import main as show
from fft.text.chat_template import load_chat_template
from fft.text.convert_tokenizer import main as convert_tokenizer
from fft.text.encoder import load_tokenizer
from fft.training.sample_answers import read_prompts


def tokenize(place: Path) -> None:
    tokenizer = load_tokenizer(place / "model")
    load_chat_template(tokenizer, place / "model")


def read_table(place: Path) -> None:
    for path in parse_evaluations(f"web={place / 'table'}").values():
        table = Table.open(path)
        for group in range(len(table.row_groups)):
            table.read(group)
            document_names(table, group)


def read_pairs(place: Path) -> None:
    table = Table.open(place / "pairs")
    reference = read_reference(table.storage, REFERENCE, table.tokens)
    for group, where in enumerate(table.row_groups):
        table.read(group)
        if reference is not None:
            reference.in_group(group, np.full(where.rows, 2), str(where))


def read_processor(place: Path) -> None:
    load_tokenizer(place / "sees")  # which looks through the directory, as for all who ask for its rules
    load_rules(place / "sees", ImageLimits(), (5, 6))


def read_run(place: Path) -> None:
    run = run_at(place / "run")
    run.losses()
    for name in ("latest", "best", "step-1"):
        if run.text(name) is not None:
            fault(run.view(run.tag_of(name)))
    fault(place / "run" / "step-1")


def begin_from_run(place: Path) -> None:
    lay_out(resolve({"from_ckpt": str(place / "run"), "train_data": "x", "max_steps": 0, "dry_run": True}), 1)


def read_model(place: Path) -> None:
    load_config(str(place / "model"), init=False)
    weights_hash(place / "model")


def read_images(place: Path) -> None:
    table = Table.open(place / "images")
    for group in range(len(table.row_groups)):
        table.check(group, table.load(group, more=(GRIDS, IMAGES)), rules=GRID_RULES)


def ask(place: Path) -> None:
    tokenizer = load_tokenizer(place / "model")
    template = load_chat_template(tokenizer, place / "model") if tokenizer.chat_template else None
    read_prompts(str(place / "texts" / "prompts.jsonl"), tokenizer, template, 64)


def read_texts(place: Path) -> None:
    for _ in read_rows(find_inputs([str(place / "texts")], LeftOut())):
        continue


def tokenize_texts(place: Path) -> None:
    text = text_input(place / "texts" / "chats.jsonl", place / "model", 32)
    (place / "out").mkdir()
    splits = deal(spans_of([Source.of_file(text.path, "json")], text.encoder))
    tokenize_part(text.encoder, PartFolder(place / "out", WorkerNotes(str(place / "out"))), 0, splits)


#: Commands by the folders that each is given.
COMMANDS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "convert a model": (("model", "out"), lambda p: convert([str(p / "model"), str(p / "out")])),
    "convert a run": (("run", "out"), lambda p: convert([str(p / "run"), str(p / "out")])),
    "convert an InternVL": (("internvl", "out"), lambda p: convert([str(p / "internvl"), str(p / "out")])),
    "merge": (
        ("model", "adapter", "out"),
        lambda p: convert([str(p / "model"), str(p / "out"), "--lora", str(p / "adapter")]),
    ),
    "merge two": (
        ("model", "adapter", "dora", "out"),
        lambda p: convert([str(p / "model"), str(p / "out"), "--lora", str(p / "dora"), "--lora", str(p / "adapter")]),
    ),
    "convert a tokenizer": (("model", "out"), lambda p: convert_tokenizer([str(p / "model"), str(p / "out")])),
    "convert Qwen's tokenizer": (("ranks", "out"), lambda p: convert_tokenizer([str(p / "ranks"), str(p / "out")])),
    "convert pieces": (("pieces", "out"), lambda p: convert_tokenizer([str(p / "pieces"), str(p / "out")])),
    "tokenize": (("model",), tokenize),
    "read a model": (("model",), read_model),
    "check a model to serve": (("model",), lambda p: check_model(str(p / "model"))),
    "read processor files": (("sees",), read_processor),
    "read a run": (("run",), read_run),
    "begin from a run": (("run",), begin_from_run),
    "report": (("run", "out"), lambda p: report([str(p / "run"), "-o", str(p / "out")])),
    "read a table": (("table",), read_table),
    "read pairs": (("pairs",), read_pairs),
    "read images": (("images",), read_images),
    "show": (("table", "model"), lambda p: show([str(p / "table"), "--tokenizer", str(p / "model")])),
    "show a page": (
        ("table", "model", "out"),
        lambda p: show([str(p / "table"), "--tokenizer", str(p / "model"), "--html", str(p / "out")]),
    ),
    "plan": (("machine",), lambda p: read_machine(p / "machine" / "machine.yaml")),
    "sample prompts": (("texts", "model"), ask),
    "prompts to answer": (("texts",), read_texts),
    "texts to train on": (("texts", "model", "out"), tokenize_texts),
}
