"""How many orders were answered rightly: ``python -m fft.quickstart.chat.scores``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fft.errors import Parser, UserError, run_cli
from fft.json_text import json_value


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = Parser(
        prog="python -m fft.quickstart.chat.scores",
        description="Say of how many rows the text is the right answer, and show the first.",
    )
    parser.add_argument(
        "answers", nargs="+", type=Path, metavar="FILE", help="what batch inference wrote: JSON lines with text, answer"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line and an example for each file. Raises :class:`UserError` for files that cannot be read."""
    for path in build_parser().parse_args(argv).answers:
        print(score_page(path))
    return 0


def read_answered(path: Path) -> list[dict]:
    """Rows with ``prompt``, the right ``answer``, and the ``text`` of a model. Raises :class:`UserError` for a file
    that has others."""
    try:
        rows = [json_value(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows and all({"prompt", "answer", "text"} <= set(row) for row in rows):
            return rows
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name what batch inference wrote.") from error
    raise UserError(f"{path} has rows without prompt, answer and text: name what batch inference wrote.")


def count_right(rows: Sequence[dict]) -> int:
    """How many rows have the ``text`` that is their ``answer``."""
    return sum(row["text"].strip() == row["answer"] for row in rows)


def score_page(path: Path) -> str:
    """The score of a file, and its first row."""
    rows = read_answered(path)
    first = rows[0]
    said = json.dumps(first["text"].strip(), ensure_ascii=False)
    return f"{path}: {count_right(rows)} of {len(rows)} right\n  {first['prompt'][-1]['content']}\n  {said}"


if __name__ == "__main__":
    run_cli(main)
