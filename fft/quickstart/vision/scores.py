"""How many questions about pictures were answered rightly, beside who did not see them; as numbers, and drawn."""

import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fft.files import atomic_file

#: Columns and rows of the sheet of answers, and letters of its lines.
_ACROSS, _DOWN, _LINE = 4, 2, 40


@dataclass(frozen=True)
class Score:
    """Of questions of one ``kind``: how many were ``asked``, and answered rightly by the model that saw the picture
    (``seen``), by the same with a blank picture (``blank``), and by the answer that is commonest in training to the
    same words (``guessed``)."""

    kind: str
    asked: int
    seen: int
    blank: int
    guessed: int

    @property
    def lead(self) -> float:
        """By how large a share of the questions who saw is ahead of the better of the two who did not."""
        return (self.seen - max(self.blank, self.guessed)) / self.asked


def commonest(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of (question, answer) pairs, the commonest answer by question; of equally common ones the first by letters."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        counts[question][answer] += 1
    return {question: min(found, key=lambda a: (-found[a], a)) for question, found in counts.items()}


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Rows that batch inference wrote: of each question ``kind``, ``question``, ``answer``, ``picture`` and ``seen``
    as it was asked, and ``text``, what the model said."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scores(answers: Sequence[dict[str, Any]], guesses: dict[str, str]) -> list[Score]:
    """The scores of each kind in order, and of ``all``."""
    counts: dict[str, Counter[str]] = {}
    for row in answers:
        for kind in (row["kind"], "all"):
            count = counts.setdefault(kind, Counter())
            right = row["text"].strip() == row["answer"]
            if row["seen"]:
                count["asked"] += 1
                count["seen"] += right
                count["guessed"] += guesses.get(row["question"]) == row["answer"]
            else:
                count["blank"] += right
    counts["all"] = counts.pop("all")
    names = ("asked", "seen", "blank", "guessed")
    return [Score(kind, *(count[name] for name in names)) for kind, count in counts.items()]


def table(found: Sequence[Score]) -> str:
    """The scores as shares of the questions."""
    lines = ["answered rightly, held-out pictures   asked    seen   blank  guessed"]
    for score in found:
        shares = [f"{n / score.asked:.1%}" for n in (score.seen, score.blank, score.guessed)]
        lines.append(f"  {score.kind:<34}  {score.asked:>5}  {shares[0]:>6}  {shares[1]:>6}  {shares[2]:>7}")
    return "\n".join(lines)


def draw_answers(answers: Sequence[dict[str, Any]], images: Path, output: Path) -> None:
    """Save a PNG of the first held-out pictures, each with a question and what the model said."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    # A picture once, and another kind of question every time.
    seen = [row for row in answers if row["seen"]]
    kinds, by_picture = list(dict.fromkeys(row["kind"] for row in seen)), defaultdict(dict)
    for row in seen:
        by_picture[row["picture"]][row["kind"]] = row
    whole = [rows for rows in by_picture.values() if len(rows) == len(kinds)] or list(by_picture.values())
    figure = Figure(figsize=(2.6 * _ACROSS, 3 * _DOWN), dpi=120, layout="constrained")
    for number, rows in enumerate(whole[: _ACROSS * _DOWN]):
        row = rows.get(kinds[number % len(kinds)]) or next(iter(rows.values()))
        right = row["text"].strip() == row["answer"]
        axes = figure.add_subplot(_DOWN, _ACROSS, number + 1)
        axes.imshow(Image.open(images / row["picture"]))
        axes.set_axis_off()
        said = row["text"] if right else f"{row['text']} (no: {row['answer']})"
        title = f"{row['question']}\n{textwrap.fill(said, _LINE)}"
        axes.set_title(title, fontsize=8, color="#1e7b34" if right else "#b03a2e")
    with atomic_file(output) as aside, open(aside, "wb") as stream:
        FigureCanvasAgg(figure).print_png(stream)
