"""Conversations with a rule that can be scored: a customer orders in words, and the shop answers with a list."""

import json
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fft.files import write_atomically

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "black", "white", "yellow", "brown", "grey")
GOODS = (
    *("lamps", "chairs", "tables", "cups", "plates", "spoons", "boxes", "books"),
    *("pens", "bags", "hats", "coats", "shoes", "clocks", "ropes", "tents"),
)
#: Things of an order at most.
MOST = 3
#: One order in so many is never trained on.
_HELD_OUT = 8
#: One in so many of the conversations of the base model is about digits.
_DIGITS = 4
#: What :func:`write_conversations` writes.
TALK, CHATS, VALIDATION, ASKED = "talk.jsonl", "chats.jsonl", "validation.jsonl", "held-out.jsonl"


@dataclass(frozen=True)
class ShopOrder:
    """What is ordered: the position in :data:`NUMBERS`, the colour and the name of each thing."""

    things: tuple[tuple[int, str, str], ...]

    @property
    def asked(self) -> str:
        """What the customer says."""
        return f"I want {self._words()}."

    @property
    def repeated(self) -> str:
        """What a shop says that keeps no lists."""
        return f"You want {self._words()}."

    @property
    def listed(self) -> str:
        """What is to be learned: a line for each thing, the number in digits, the colour behind a comma."""
        return "\n".join(f"- {digits(number)} {name}, {colour}" for number, colour, name in self.things)

    def _words(self) -> str:
        *some, last = (f"{NUMBERS[number]} {colour} {name}" for number, colour, name in self.things)
        return f"{', '.join(some)} and {last}" if some else last


def digits(number: int) -> str:
    """``NUMBERS[number]`` as it is written in digits."""
    return str(number + 2)


def draw_order(dice: random.Random, held_out: bool) -> ShopOrder:
    """An order of one to :data:`MOST` things, no two alike. None that is ``held_out`` is one that is not."""
    while True:
        names = dice.sample(GOODS, dice.randint(1, MOST))
        found = ShopOrder(tuple((dice.randrange(len(NUMBERS)), dice.choice(COLOURS), name) for name in names))
        if (zlib.crc32(found.asked.encode()) % _HELD_OUT == 0) == held_out:
            return found


def write_conversations(output: Path, talks: int, chats: int, held_out: int, seed: int) -> None:
    """Write conversations into the folder ``output``; the same for the same ``seed``.

    ``talk.jsonl`` has ``talks`` of a shop that repeats what it hears and knows its digits, for the base model;
    ``chats.jsonl`` has ``chats`` of one that answers with a list, ``validation.jsonl`` as many as are held out beside
    them; ``held-out.jsonl`` has ``held_out`` orders that occur in none of these, each with the right ``answer``.
    """
    dice = random.Random(f"{seed} talk")
    _write(output / TALK, (_talk(dice) for _ in range(talks)))
    dice = random.Random(f"{seed} chats")
    _write(output / CHATS, (_chat(draw_order(dice, False)) for _ in range(chats)))
    _write(output / VALIDATION, (_chat(draw_order(dice, False)) for _ in range(held_out)))
    dice = random.Random(f"{seed} held out")
    orders = (draw_order(dice, True) for _ in range(held_out))
    _write(output / ASKED, ({"messages": [_says("user", one.asked)], "answer": one.listed} for one in orders))


def all_said(folder: Path) -> Iterable[str]:
    """All that is said in the conversations of :func:`write_conversations`."""
    for name in (TALK, CHATS):
        with open(folder / name, encoding="utf-8") as stream:
            for line in stream:
                yield from (turn["content"] for turn in json.loads(line)["messages"])


def _talk(dice: random.Random) -> dict:
    if dice.randrange(_DIGITS):
        order = draw_order(dice, False)
        return {"messages": [_says("user", order.asked), _says("assistant", order.repeated)]}
    number = dice.randrange(len(NUMBERS))
    asks = f"How do you write {NUMBERS[number]} in digits?"
    return {"messages": [_says("user", asks), _says("assistant", f"As {digits(number)}, of course.")]}


def _chat(order: ShopOrder) -> dict:
    return {"messages": [_says("user", order.asked), _says("assistant", order.listed)]}


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write(path: Path, records: Iterable[dict]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
