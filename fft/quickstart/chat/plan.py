"""The six stages from conversations to a chat model that follows them: which command makes what from what."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fft.quickstart.chat import orders
from fft.quickstart.chat.inputs import MODEL, START
from fft.quickstart.chat.scores import count_right, read_answered
from fft.quickstart.commands import ROOT, QuickstartPlace, shown
from fft.quickstart.places import Place
from fft.quickstart.stages import Stage, run_command

BASE_CONFIG = "conf/quickstart-chat-base.yaml"
CONFIG = "conf/quickstart-chat.yaml"
#: Tokens of the longest answer, three lines, and more.
_ANSWER = 48


@dataclass(frozen=True)
class ChatFolders(QuickstartPlace):
    """What else lies below the output folder, on a disk."""

    output: Path

    @property
    def start(self) -> Path:
        """The small model's config and tokenizer."""
        return self.output / START

    @property
    def base(self) -> Path:
        """The chat model that is fine-tuned."""
        return self.output / "base"

    @property
    def base_run(self) -> Path:
        """The run folder of its training."""
        return self.output / "base-run"

    @property
    def adapter(self) -> Path:
        """What fine-tuning makes."""
        return self.output / "adapter"

    @property
    def before(self) -> Path:
        """What the base model answered."""
        return self.output / "before.jsonl"

    @property
    def after(self) -> Path:
        """What the fine-tuned model answered."""
        return self.output / "after.jsonl"


def chat_stages(folders: ChatFolders, max_steps: int | None = None) -> list[Stage]:
    """The stages in order. ``max_steps`` overrides the configured length of both trainings."""
    talk, chats, validation, asked = (
        folders.output / name for name in (orders.TALK, orders.CHATS, orders.VALIDATION, orders.ASKED)
    )
    steps = ("--max_steps", str(max_steps)) if max_steps is not None else ()
    base = (
        *("fft.train", "--config", BASE_CONFIG, "--init", "--model", shown(folders.start)),
        *("--train_data", shown(talk), "--output_dir", shown(folders.base), "--checkpoint", shown(folders.base_run)),
        *("--overwrite", *steps),
    )
    tune = (
        *("fft.train", "--config", CONFIG, "--model", shown(folders.base)),
        *("--train_data", shown(chats), "--eval_data", shown(validation)),
        *("--output_dir", shown(folders.adapter), "--checkpoint", shown(folders.run), "--overwrite", *steps),
    )
    merge = ("fft.checkpoint.convert", shown(folders.base), shown(folders.model), "--lora", shown(folders.adapter))
    return [
        _stage(
            "inputs",
            ("fft.quickstart.chat.inputs", shown(folders.output), "--overwrite"),
            (ROOT / MODEL,),
            (talk, chats, validation, asked, folders.start),
        ),
        _stage("base", base, (talk, folders.start, ROOT / BASE_CONFIG), (folders.base, folders.base_run)),
        _answers("before", folders.base, asked, folders.before),
        _stage("adapter", tune, (folders.base, chats, validation, ROOT / CONFIG), (folders.adapter, folders.run)),
        _stage("merge", (*merge, "--overwrite"), (folders.base, folders.adapter), (folders.model,)),
        _answers("after", folders.model, asked, folders.after),
    ]


def _answers(name: str, model: Place, asked: Path, output: Path) -> Stage:
    """What a model answers to held-out orders, and how many of the answers are right."""
    command = (
        *("fft.serve.batch_infer", "--model", shown(model), "--input", shown(asked), "--prompt_key", "messages"),
        *("--output", shown(output), "--max_new_tokens", str(_ANSWER), "--batch_size", "50", "--overwrite"),
    )

    def facts() -> dict:
        rows = read_answered(output)
        return {"right": count_right(rows), "asked": len(rows)}

    return _stage(name, command, (model, asked), (output,), facts)


def _stage(
    name: str,
    command: tuple[str, ...],
    inputs: tuple[Place, ...],
    outputs: tuple[Place, ...],
    facts: Callable[[], dict] = dict,
) -> Stage:
    """``python -m command`` as a stage; ``facts`` are what is remembered of it."""

    def work() -> dict:
        run_command(name, [sys.executable, "-m", *command], ROOT, {})
        return facts()

    return Stage(name, ("python", "-m", *command), inputs, outputs, work)
