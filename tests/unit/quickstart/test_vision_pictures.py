import io
import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fft.quickstart.vision.chats import ASKED, CHATS, IMAGES, read_chats, write_chats
from fft.quickstart.vision.pictures import CELL, COLOURS, KINDS, NUMBERS, SHAPES, blank, draw, questions, scene

SCENES = 400
UP, ACROSS = ("top", "bottom"), ("left", "right")


@pytest.fixture(scope="module")
def scenes():
    return [scene(random.Random(number), number % 2 == 1) for number in range(SCENES)]


def seen(picture):
    """By place, the colour that a picture has there, and how many pixels of it."""
    pixels = np.asarray(Image.open(io.BytesIO(picture))).astype(int)
    found = {}
    for row in range(2):
        for column in range(2):
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].reshape(-1, 3)
            counts = {name: int((cell == rgb).all(1).sum()) for name, rgb in COLOURS.items()}
            colour = max(counts, key=counts.__getitem__)
            if counts[colour]:
                found[column, row] = colour, counts[colour]
    return found


def test_a_picture_shows_its_scene(scenes):
    areas = {shape: [] for shape in SHAPES}
    for things in scenes:
        places = seen(draw(things, random.Random(0)))
        assert {place: colour for place, (colour, _) in places.items()} == {(t.column, t.row): t.colour for t in things}
        for thing in things:
            areas[thing.shape].append(places[thing.column, thing.row][1])
    mean = {shape: np.mean(found) for shape, found in areas.items()}
    assert mean["square"] > mean["circle"] > mean["triangle"] > 0
    assert mean["cross"] < mean["circle"]
    assert not seen(blank())


def test_questions_have_one_right_answer_each(scenes):
    kinds = Counter()
    for things in scenes:
        found = questions(things)
        kinds.update(q.kind for q in found)
        assert len({q.question for q in found}) == len(found)
        by_colour = {t.colour: t for t in things}
        for q in found:
            words = q.question.rstrip("?").split()
            if q.kind == "everything":
                places = [f"{t.colour} {t.shape} {UP[t.row]} {ACROSS[t.column]}" for t in things]
                assert q.answer.split(", ") == places
            elif q.kind == "count":
                assert q.answer == NUMBERS[len(things) - 1]
            elif q.kind == "colour":
                assert by_colour[q.answer].shape == words[-1]
            elif q.kind == "shape":
                assert by_colour[words[-1]].shape == q.answer
            else:
                one, (colour, shape) = by_colour[words[-2]], q.answer.split()
                other = by_colour[colour]
                assert (one.shape, other.shape) == (words[-1], shape)
                way = (other.column - one.column, other.row - one.row)
                assert way == {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[words[2]]
    assert tuple(sorted(kinds)) == tuple(sorted(KINDS))


def test_no_answer_can_be_guessed_from_the_words():
    dice, answers = random.Random(1), {}
    for _ in range(4000):
        for q in questions(scene(dice, False)):
            answers.setdefault((q.kind, q.question if q.kind != "neighbour" else ""), Counter())[q.answer] += 1
    most = {"everything": 0.02, "neighbour": 0.1}
    for (kind, _), counts in answers.items():
        assert max(counts.values()) / counts.total() < most.get(kind, 0.33), counts


def test_held_out_scenes_are_never_trained_on():
    dice = random.Random(0)
    trained, asked = ({scene(dice, held_out) for _ in range(2000)} for held_out in (False, True))
    assert len(asked) > 100
    assert not trained & asked


def test_chats_and_questions(tmp_path):
    summary = write_chats(tmp_path / "a", 20, 10, 0)
    write_chats(tmp_path / "b", 20, 10, 0)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert len(files) == 20 + 10 + 3
    assert len(list(read_chats(tmp_path / "a"))) == summary.questions > 40
    chat = json.loads((tmp_path / "a" / CHATS).read_text().splitlines()[0])
    assert chat["messages"][0]["user"][0].startswith("<image>")
    asked = [json.loads(line) for line in (tmp_path / "a" / ASKED).read_text().splitlines()]
    assert len(asked) == 2 * summary.held_out_questions
    for one, other in zip(asked[::2], asked[1::2], strict=True):
        assert (one["seen"], other["seen"]) == (True, False)
        assert one["messages"][0]["user"][0] == other["messages"][0]["user"][0]
        assert other["messages"][0]["user"][1] == "blank.png"
        assert one["messages"][0]["user"][1] == one["picture"]
        assert (tmp_path / "a" / IMAGES / one["picture"]).is_file()
    write_chats(tmp_path / "a", 2, 1, 0)
    assert len(list((tmp_path / "a" / IMAGES).iterdir())) == 4  # what was there is replaced
