"""Chats about drawn pictures: those to train on, and questions about pictures that are not in them."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fft.files import new_file, remove_path, write_file
from fft.quickstart.vision.pictures import KINDS, PictureQuestion, blank, draw, questions, scene

#: Below the folder that :func:`write_chats` makes.
CHATS, ASKED, IMAGES = "chats.jsonl", "asked.jsonl", "images"
#: Chats about a picture at most, each of one question: an answer tells nothing of another's.
QUESTIONS = 5
#: What a user's turn begins with, in the place of its picture.
MARK = "<image>"
_BLANK = "blank.png"


@dataclass(frozen=True)
class ChatSummary:
    """What :func:`write_chats` wrote: pictures and questions to train on, and those that are held out."""

    pictures: int
    questions: int
    held_out_pictures: int
    held_out_questions: int


def write_chats(output: Path, pictures: int, held_out: int, seed: int) -> ChatSummary:
    """Draw ``pictures`` to train on and ``held_out`` others, with chats about them; the same for the same ``seed``.

    Below ``output``, which is replaced, are ``images/``; ``chats.jsonl``, up to :data:`QUESTIONS` chats a picture; and
    ``asked.jsonl``, a question of each of :data:`KINDS` for every picture that is held out, twice: ``seen`` with its
    picture, and not, with a blank one in its place.
    """
    remove_path(output)
    (output / IMAGES).mkdir(parents=True)
    write_file(output / IMAGES / _BLANK, blank())
    trained = asked = 0
    with open(new_file(output / CHATS), "w", encoding="utf-8") as stream:
        for number in range(pictures):
            name, found = _picture(output, f"{number:05}.png", random.Random(f"{seed} trained {number}"), False)
            for turn, question in enumerate(found[:QUESTIONS]):
                messages = [_asks(question, name), {"assistant": question.answer}]
                stream.write(json.dumps({"id": f"{name} {turn}", "messages": messages}) + "\n")
                trained += 1
    with open(new_file(output / ASKED), "w", encoding="utf-8") as stream:
        for number in range(held_out):
            dice = random.Random(f"{seed} held out {number}")
            name, found = _picture(output, f"held-out-{number:05}.png", dice, True)
            for question in (next((q for q in found if q.kind == kind), None) for kind in KINDS):
                if question is not None:
                    stream.write("".join(json.dumps(line) + "\n" for line in _asked(question, name)))
                    asked += 1
    return ChatSummary(pictures, trained, held_out, asked)


def read_chats(folder: Path) -> Iterator[tuple[str, str]]:
    """PictureQuestion and answer of each chat to train on."""
    with open(folder / CHATS, encoding="utf-8") as stream:
        for line in stream:
            asks, answers = json.loads(line)["messages"]
            yield asks["user"][0].removeprefix(MARK), answers["assistant"]


def _picture(folder: Path, name: str, dice: random.Random, held_out: bool) -> tuple[str, list[PictureQuestion]]:
    """Draw one; returns its name and its questions, that for everything and the others shuffled."""
    things = scene(dice, held_out)
    write_file(folder / IMAGES / name, draw(things, dice))
    everything, *others = questions(things)
    return name, [everything, *dice.sample(others, len(others))]


def _asks(question: PictureQuestion, name: str) -> dict:
    """A user's turn, in the form that ``jllm`` has."""
    return {"user": [MARK + question.question, name]}


def _asked(question: PictureQuestion, name: str) -> Iterator[dict]:
    for seen in (True, False):
        messages = [_asks(question, name if seen else _BLANK)]
        yield {"messages": messages, "seen": seen, "picture": name, **asdict(question)}
