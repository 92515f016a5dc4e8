"""All model types that transformers knows: exact, refused and why, or untested; each compared with transformers now.

python -m fft.models                            # all, as the page docs/models.md: some twenty seconds
python -m fft.models --types llama,gpt_oss      # these
python -m fft.models --check docs/models.md     # does the page say what is measured? exit code 1 where it does not

A small model of each type, with random weights, goes through our layers and through transformers. What is printed is
Markdown. The exit code is 1, too, where a type that is trained differs from transformers: that is a fault of this
release.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from fft.console import say
from fft.errors import Parser, UserError, run_cli


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="python -m fft.models", description=__doc__)
    parser.add_argument("--types", help="model types to look at, separated by commas (default: all)")
    parser.add_argument("--check", type=Path, metavar="PAGE", help="compare with this page, and print what differs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print a page, or check one; returns 0, or 1 where something differs.

    Raises :class:`UserError` for a type that is none, and a page that is not there.
    """
    args = build_parser().parse_args(argv)
    if args.check and not args.check.is_file():
        raise UserError(f"--check {args.check} does not exist: write it with python -m fft.models > {args.check}.")
    # Not before: --help need not wait for torch.
    from transformers.utils import logging

    from fft.models import table

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    known = table.every_type()
    asked = args.types.split(",") if args.types else known
    if unknown := [kind for kind in asked if kind not in known]:
        raise UserError(f"--types {unknown[0]}: no model type that transformers knows; choose of {', '.join(known)}.")
    say(f"comparing {len(asked)} model types with transformers ...")
    with redirect_stdout(sys.stderr):  # what libraries print is no part of a page
        rows = [table.measured(kind) for kind in asked]
    wrong = [f"{row.kind} differs from transformers: {row.why}" for row in rows if row.verdict == table.DIFFERS]
    if args.check:
        written = table.rows_in(args.check.read_text(encoding="utf-8"))
        wrong += [
            f"{row.kind}: measured {row}, the page has {written.get(row.kind)}"
            for row in rows
            if row.kind not in written or not row.same_as(written[row.kind])
        ]
        wrong += [f"{kind} is no model type" for kind in written if kind not in known]
    else:
        print(table.page(rows), end="")
    for line in wrong:
        say(line)
    return 1 if wrong else 0


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
