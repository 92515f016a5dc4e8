"""``python -m fft.show TABLE``: a row of a token table as text, with what is trained of it marked."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fft.console import say
from fft.errors import Parser, UserError, check_new_file, run_cli
from fft.files import write_atomically

_ABOUT = """\
Show a row of a token table as text: where its documents begin, and what of them is trained on.

    python -m fft.show runs/chats --tokenizer Qwen3-8B     # its first row; what is trained is in colour, or in ⟦ ⟧
    python -m fft.show runs/chats --tokenizer Qwen3-8B --row 7 --ids   # a token a line: place, id, + if trained, text
    python -m fft.show s3://lake/chats --tokenizer Qwen3-8B --doc chats/12 --html page.html

Trained is what the loss counts: tokens with a label, all where the table has none, but never a document's first token,
which nothing predicts.
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="python -m fft.show", description=_ABOUT)
    parser.add_argument("table", metavar="TABLE", help="a token table, a path or URL (PATH@v3: version 3)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", type=int, default=0, metavar="N", help="which row, counted from 0 over all files (0)")
    which.add_argument("--doc", metavar="ID", help="the document of this id, as doc_ids has it")
    parser.add_argument("--tokenizer", metavar="DIR", help="its tokenizer's directory (that which it names, if here)")
    parser.add_argument("--ids", action="store_true", help="a token a line")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Show it. Raises :class:`UserError` for what cannot be read, and for a page that is there."""
    args = build_parser().parse_args(argv)
    check_new_file(args.html, args.overwrite)
    # Not before: --help need not wait for Arrow.
    from fft.data.table import Table
    from fft.data.views import naming_places
    from fft.text.shown import as_text, documents_named, documents_of_row, load_decoder, summary_of
    from fft.text.shown_page import as_page

    with naming_places():
        table = Table.open(args.table)
        found = documents_named(table, args.doc) if args.doc else documents_of_row(table, args.row)
        decoder = load_decoder(table, args.tokenizer)
    say(summary := summary_of(table))
    if args.html is None:
        print(as_text(found, decoder, args.ids, sys.stdout.isatty()))
        return
    try:
        write_atomically(args.html, as_page(table.source, found, decoder, args.ids, summary))
    except OSError as error:
        raise UserError(f"{args.html} cannot be written ({error.strerror}): name another place.") from error
    say(f"written to {args.html}")


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
