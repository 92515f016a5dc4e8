"""The six stages from drawn pictures to answers about others: which command makes what from what."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from fft.data.manifest import MANIFEST_NAME
from fft.quickstart.commands import ROOT, QuickstartPlace, run_trainer, shown, spark_stage
from fft.quickstart.stages import Stage, run_command
from fft.quickstart.vision import scores
from fft.quickstart.vision.chats import ASKED, CHATS, IMAGES, read_chats, write_chats
from fft.quickstart.vision.model import write_directory

#: Pictures to train on, and to ask about.
PICTURES, HELD_OUT = 4000, 200
SEED = 0
MODEL = "conf/models/qwen2-vl-1m.json"
CONFIG = "conf/quickstart-vision.yaml"
#: Tokens of the longest answer, four things and their places, and more.
_ANSWER = 32


@dataclass(frozen=True)
class VisionFolders(QuickstartPlace):
    """What else lies below the output folder, on a disk."""

    output: Path

    @property
    def pictures(self) -> Path:
        """Pictures, and chats about them."""
        return self.output / "pictures"

    @property
    def start(self) -> Path:
        """The model's directory without weights."""
        return self.output / "start"

    @property
    def answers(self) -> Path:
        """What the model said of held-out pictures, and of blank ones."""
        return self.output / "answers.jsonl"

    @property
    def sheet(self) -> Path:
        """Some of the pictures with their answers."""
        return self.output / "answers.png"


def vision_stages(folders: VisionFolders, max_steps: int | None = None) -> list[Stage]:
    """The stages in order. ``max_steps`` overrides the configured length of the training."""
    return [*_chat_stages(folders), *_answer_stages(folders, max_steps)]


def _chat_stages(folders: VisionFolders) -> list[Stage]:
    """From nothing to a table of chats with pictures."""
    chats = folders.pictures / CHATS
    tokenize = (
        *("--task", "chat", "-i", shown(chats), "-o", shown(folders.tokens), "--tokenizer", shown(folders.start)),
        *("--image_path", shown(folders.pictures / IMAGES)),
    )
    return [
        Stage(
            "pictures",
            ("draw", "--pictures", str(PICTURES), "--held_out", str(HELD_OUT), "--seed", str(SEED)),
            (),
            (folders.pictures,),
            lambda: asdict(write_chats(folders.pictures, PICTURES, HELD_OUT, SEED)),
        ),
        Stage(
            "tokenizer",
            ("byte-level-bpe", "--config", MODEL),
            (chats, ROOT / MODEL),
            (folders.start,),
            lambda: {"entries": write_directory(ROOT / MODEL, _texts(folders), folders.start)},
        ),
        spark_stage("tokenize", tokenize, (folders.pictures, folders.start), folders.tokens),
    ]


def _answer_stages(folders: VisionFolders, max_steps: int | None) -> list[Stage]:
    """From the table to a model, its answers and their scores."""
    train = [
        *("deepspeed", "--num_gpus", "2", "fft/train.py", "--config", CONFIG, "--init"),
        *("--model", shown(folders.start), "--train_data", shown(folders.tokens)),
        *("--output_dir", shown(folders.model), "--checkpoint", shown(folders.run), "--overwrite"),
        *(("--max_steps", str(max_steps)) if max_steps is not None else ()),
    ]
    asked = folders.pictures / ASKED
    infer = [
        *("python", "-m", "fft.serve.batch_infer", "--model", shown(folders.model)),
        *("--input", shown(asked), "--prompt_key", "messages", "--image_path", shown(folders.pictures / IMAGES)),
        *("--output", shown(folders.answers), "--max_new_tokens", str(_ANSWER), "--temperature", "0", "--overwrite"),
    ]
    return [
        Stage(
            "train",
            tuple(train),
            (folders.tokens / MANIFEST_NAME, folders.start, ROOT / CONFIG),
            (folders.model, folders.run),
            partial(run_trainer, train),
        ),
        Stage("answer", tuple(infer), (folders.model, asked), (folders.answers,), partial(_answer, infer)),
        Stage(
            "report",
            ("scores-and-sheet",),
            (folders.answers, folders.pictures / CHATS),
            (folders.sheet,),
            partial(_report, folders),
        ),
    ]


def _texts(folders: VisionFolders) -> Iterator[str]:
    for pair in read_chats(folders.pictures):
        yield from pair


def _answer(command: list[str]) -> dict:
    # So small a model gains nothing from threads, and loses much where others have the cores, too.
    run_command("answer", [sys.executable, *command[1:]], ROOT, {"OMP_NUM_THREADS": "1"})
    return {}


def _report(folders: VisionFolders) -> dict:
    answers = scores.read_answers(folders.answers)
    guesses = scores.commonest(read_chats(folders.pictures))
    scores.draw_answers(answers, folders.pictures / IMAGES, folders.sheet)
    return {"scores": [asdict(score) for score in scores.scores(answers, guesses)]}
