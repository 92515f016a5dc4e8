"""``python -m fft.report RUN``: a run's curves, data, checkpoints, settings and plan on one page of HTML."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fft.console import say
from fft.errors import Parser, check_new_file, run_cli

_ABOUT = """\
Write a page about a run, or about several beside one another, that opens in any browser and needs no network.

    python -m fft.report runs/a                       # runs/a.html
    python -m fft.report runs/a runs/b -o both.html   # their curves in one picture, their settings side by side

It reads what --checkpoint RUN keeps: metrics.jsonl, arguments, data and environment, checkpoints. A run that is under
way may be looked at, too.
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="python -m fft.report", description=_ABOUT)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that --checkpoint named")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (the first RUN with .html)")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page. Raises :class:`UserError` for folders that are no runs, and for a page that is there."""
    args = build_parser().parse_args(argv)
    from fft.report.shown import report_on  # not before: --help need not wait for torch

    report = report_on(*args.runs)
    output = args.output or args.runs[0].with_name(f"{args.runs[0].resolve().name}.html")
    check_new_file(output, args.overwrite)
    report.save(output)
    say(f"written to {output}")
    return 0


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
