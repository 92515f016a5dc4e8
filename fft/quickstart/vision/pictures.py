"""Pictures of coloured shapes, drawn with Pillow, and questions about them that cannot be answered unseen."""

import io
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three", "four")
#: What is asked about.
KINDS = ("everything", "colour", "shape", "neighbour", "count")

#: A picture has this many places a side, of so many pixels each: an image token of the model sees one.
PLACES, CELL = 2, 28
#: Pixels by which a shape is off the middle of its place at most, and half its size.
_OFF, _HALF = 2, (9, 11)
_BACKGROUND, _LEVELS = 235, 20
#: One scene in so many is never trained on.
_HELD_OUT = 8
_HEIGHTS, _WIDTHS = ("top", "bottom"), ("left", "right")
_SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Thing:
    """A shape in a place of a picture; ``column`` and ``row`` count from 0."""

    colour: str
    shape: str
    column: int
    row: int


@dataclass(frozen=True)
class PictureQuestion:
    """What is asked, of which of :data:`KINDS` that is, and the one answer that is right."""

    kind: str
    question: str
    answer: str


def scene(dice: random.Random, held_out: bool) -> tuple[Thing, ...]:
    """One to four things, no two of a colour, of a shape, or in a place. No scene that is ``held_out`` is one that is
    not: which ones are depends on the things alone."""
    while True:
        count = dice.randint(1, len(NUMBERS))
        colours, shapes = dice.sample(list(COLOURS), count), dice.sample(SHAPES, count)
        places = sorted(dice.sample(range(PLACES**2), count))
        things = tuple(Thing(c, s, p % PLACES, p // PLACES) for c, s, p in zip(colours, shapes, places, strict=True))
        if (zlib.crc32(repr(things).encode()) % _HELD_OUT == 0) == held_out:
            return things


def draw(things: Sequence[Thing], dice: random.Random) -> bytes:
    """A picture of a scene as a PNG, each thing a little off its place and of a size of its own."""
    level = _BACKGROUND + dice.randint(-_LEVELS, _LEVELS)
    image = Image.new("RGB", (PLACES * CELL,) * 2, (level,) * 3)
    pencil = ImageDraw.Draw(image)
    for thing in things:
        x, y = (place * CELL + CELL // 2 + dice.randint(-_OFF, _OFF) for place in (thing.column, thing.row))
        _draw(pencil, thing, (x, y), dice.randint(*_HALF))
    return _png(image)


def blank() -> bytes:
    """A picture of nothing, as large as the others."""
    return _png(Image.new("RGB", (PLACES * CELL,) * 2, (_BACKGROUND,) * 3))


def questions(things: Sequence[Thing]) -> list[PictureQuestion]:
    """All questions about a scene, first that for everything. Of each wording of the others, every answer is as likely
    as every other."""
    seen = (f"{thing.colour} {thing.shape} {_HEIGHTS[thing.row]} {_WIDTHS[thing.column]}" for thing in things)
    found = [PictureQuestion("everything", "What do you see?", ", ".join(seen))]
    found.append(PictureQuestion("count", "How many shapes are there?", NUMBERS[len(things) - 1]))
    by_place = {(thing.column, thing.row): thing for thing in things}
    for thing in things:
        found.append(PictureQuestion("colour", f"What colour is the {thing.shape}?", thing.colour))
        found.append(PictureQuestion("shape", f"What shape is {thing.colour}?", thing.shape))
        for side, (right, down) in _SIDES.items():
            other = by_place.get((thing.column + right, thing.row + down))
            if other is not None:
                text = f"What is {side} the {thing.colour} {thing.shape}?"
                found.append(PictureQuestion("neighbour", text, f"{other.colour} {other.shape}"))
    return found


def _draw(pencil: ImageDraw.ImageDraw, thing: Thing, middle: tuple[int, int], half: int) -> None:
    (x, y), fill = middle, COLOURS[thing.colour]
    box = (x - half, y - half, x + half, y + half)
    if thing.shape == "circle":
        pencil.ellipse(box, fill)
    elif thing.shape == "square":
        pencil.rectangle(box, fill)
    elif thing.shape == "triangle":
        pencil.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill)
    else:
        arm = half // 3
        pencil.rectangle((x - half, y - arm, x + half, y + arm), fill)
        pencil.rectangle((x - arm, y - half, x + arm, y + half), fill)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
