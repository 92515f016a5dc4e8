"""``python -m fft.show TABLE``: a row of a token table as text, with what is trained of it marked."""

import argparse
import html
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from fft.console import say
from fft.data.known import DOC_IDS
from fft.data.manifest import tokenizer_sha256
from fft.data.model_files import check_directory
from fft.data.table import IGNORE, Rows, Table
from fft.data.trace import document_names
from fft.data.views import naming_places, view
from fft.errors import Parser, UserError, one_line, run_cli
from fft.files import write_atomically
from fft.text.encoder import read_tokenizer

_ABOUT = """\
Show a row of a token table as text: where its documents begin, and what of them is trained on.

    python -m fft.show runs/chats --tokenizer Qwen3-8B     # its first row; what is trained is in colour, or in ⟦ ⟧
    python -m fft.show runs/chats --tokenizer Qwen3-8B --row 7 --ids   # a token a line: place, id, + if trained, text
    python -m fft.show s3://lake/chats --tokenizer Qwen3-8B --doc chats/12 --html page.html

Trained is what the loss counts: tokens with a label, all where the table has none, but never a document's first token,
which nothing predicts.
"""
#: Escapes of a terminal: what is trained, what is not, and their end.
_TRAINED, _OTHER, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_STYLE = """:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
h2{font-size:1em;color:#5c6b7a;border-top:1px solid;padding-top:.6em}pre{white-space:pre-wrap;overflow-wrap:anywhere}
mark{background:#bfe3c0;color:#10240f}table{border-collapse:collapse}td{padding:0 1em 0 0;white-space:pre-wrap}"""


class Decoder(Protocol):
    """What of a tokenizer is needed here."""

    def decode(self, token_ids: list[int], **settings: bool) -> str:
        """The text of ids."""


@dataclass(frozen=True)
class ShownDocument:
    """A document as it stands in a row: tokens from ``begin`` on, and which of them are trained."""

    row: int
    number: int
    name: str
    begin: int
    ids: np.ndarray
    trained: np.ndarray

    @property
    def heading(self) -> str:
        """Where it is and how much of it is trained."""
        name = f" {self.name}" if self.name else ""
        end, count = self.begin + len(self.ids), int(self.trained.sum())
        return f"row {self.row:,}, document {self.number}{name}: tokens {self.begin:,} to {end:,}, {count:,} trained"

    def stretches(self) -> Iterator[tuple[int, int, bool]]:
        """Begin and end of the stretches of tokens that are all trained, or all not, counted in the document."""
        cuts = np.flatnonzero(np.diff(self.trained)) + 1
        for begin, end in pairwise([0, *cuts.tolist(), len(self.ids)]):
            yield begin, end, bool(self.trained[begin])


def documents_of_row(table: Table, row: int) -> list[ShownDocument]:
    """The documents of a row, counted over all files. Raises :class:`UserError` where there is no such row."""
    before = 0
    for group, where in enumerate(table.row_groups):
        if before <= row < before + where.rows:
            return _documents(table, group, row - before, before)
        before += where.rows
    raise UserError(f"--row {row}: {table.source} has rows 0 to {before - 1:,}.")


def documents_named(table: Table, name: str) -> list[ShownDocument]:
    """Every document of this id, wherever it stands; reads all ids until one is found, and then its row group.

    Raises :class:`UserError` where the table has no ids, or no such one.
    """
    if DOC_IDS not in table.columns:
        raise UserError(f"{table.source} has no column {DOC_IDS}: name a row with --row.")
    before = 0
    for group, where in enumerate(table.row_groups):
        rows = [row for row, names in enumerate(document_names(table, group)) if name in names]
        found = [document for row in rows for document in _documents(table, group, row, before)]
        if found:
            return [document for document in found if document.name == name]
        before += where.rows
    raise UserError(f"{table.source} holds no document with the id {name!r}.")


def _documents(table: Table, group: int, row: int, before: int) -> list[ShownDocument]:
    rows, names = table.read(group), document_names(table, group)
    first, last = int(rows.offsets[row]), int(rows.offsets[row + 1])
    ends = rows.document_ends(row, 0, last - first)
    found = []
    for number, (begin, end) in enumerate(pairwise([0, *ends])):
        ids, trained = rows.input_ids[first + begin : first + end], _trained(rows, first + begin, first + end)
        name = names[row][number] if names else ""
        found.append(ShownDocument(before + row, number, name, begin, ids, trained))
    return found


def _trained(rows: Rows, begin: int, end: int) -> np.ndarray:
    """Which of a document's tokens the loss counts, bool [tokens]."""
    trained = np.ones(end - begin, bool) if rows.labels is None else rows.labels[begin:end] != IGNORE
    trained[:1] = False
    return trained


def texts(document: ShownDocument, decoder: Decoder) -> Iterator[tuple[str, bool]]:
    """The text of each stretch, and whether it is trained; all of them make the text of the document.

    A character whose bytes are on both sides of a cut is shown with what follows it.
    """
    done = ""
    for begin, end, trained in document.stretches():
        whole = _decode(decoder, document.ids[:end])
        if end < len(document.ids):
            whole = whole.rstrip("\ufffd") if whole.startswith(done.rstrip("\ufffd")) else whole
        own = whole[len(done) :] if whole.startswith(done) else _decode(decoder, document.ids[begin:end])
        done = whole
        yield own, trained


def _decode(decoder: Decoder, ids: np.ndarray) -> str:
    return decoder.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def as_text(documents: Sequence[ShownDocument], decoder: Decoder, ids: bool, colour: bool) -> str:
    """For a terminal, or without ``colour`` for a file: what is trained stands in ``⟦ ⟧``."""
    lines = []
    for document in documents:
        lines.append(f"--- {document.heading} ---")
        if ids:
            lines += [
                f"{document.begin + place:>8}  {token:>8}  {'+' if trained else ' '}  {text!r}"
                for place, token, trained, text in _tokens(document, decoder)
            ]
            continue
        shown = ""
        for text, trained in texts(document, decoder):
            if colour:
                shown += f"{_TRAINED if trained else _OTHER}{_printable(text)}{_END}"
            else:
                shown += f"⟦{text}⟧" if trained else text
        lines.append(shown)
    return "\n".join(lines)


def as_page(title: str, documents: Sequence[ShownDocument], decoder: Decoder, ids: bool) -> str:
    """A page of HTML that needs nothing else; what is trained is marked."""
    parts = [f"<h1>{html.escape(title)}</h1>", "<p>Marked is what is trained on.</p>"]
    for document in documents:
        parts.append(f"<h2>{html.escape(document.heading)}</h2>")
        if ids:
            rows = "".join(
                f"<tr><td>{document.begin + place}<td>{token}<td>{_marked(repr(text), trained)}"
                for place, token, trained, text in _tokens(document, decoder)
            )
            parts.append(f"<table>{rows}</table>")
        else:
            parts.append(f"<pre>{''.join(_marked(*piece) for piece in texts(document, decoder))}</pre>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return f"<!doctype html><html lang=en>{head}<style>{_STYLE}</style>{''.join(parts)}</html>\n"


def _marked(text: str, trained: bool) -> str:
    return f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)


def _printable(text: str) -> str:
    """Without what a terminal would obey: a text may hold its escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _tokens(document: ShownDocument, decoder: Decoder) -> Iterator[tuple[int, int, bool, str]]:
    for place, token in enumerate(document.ids.tolist()):
        yield place, token, bool(document.trained[place]), _decode(decoder, document.ids[place : place + 1])


def load_decoder(table: Table, given: str | None) -> Decoder:
    """The tokenizer of a table: the one given, or that whose directory its manifest names.

    Raises :class:`UserError` where there is none, it cannot be loaded, or is not the table's.
    """
    made_by = table.manifest.tokenizer if table.manifest else None
    place = given or (made_by.name if made_by else None)
    if place is None or (given is None and not Path(place).is_dir()):
        named = f" the tokenizer {place} is not here;" if place else ""
        raise UserError(f"{table.source}:{named} name the directory of its tokenizer with --tokenizer.")
    directory = view(place)
    check_directory(directory)
    if made_by is not None and tokenizer_sha256(directory) != made_by.sha256:
        raise UserError(
            f"{table.source} was tokenized with {made_by.name}, not with {place}: name the right --tokenizer."
        )
    try:
        return cast(Decoder, read_tokenizer(directory))
    except Exception as error:  # the library behind it raises Exception itself
        raise UserError(f"{place} is no tokenizer that can be loaded ({one_line(error)[:120]}).") from error


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
    if args.html and args.html.exists() and not args.overwrite:
        raise UserError(f"{args.html} exists: give --overwrite to replace it, or another name.")
    with naming_places():
        table = Table.open(args.table)
        found = documents_named(table, args.doc) if args.doc else documents_of_row(table, args.row)
        decoder = load_decoder(table, args.tokenizer)
    if args.html is None:
        print(as_text(found, decoder, args.ids, sys.stdout.isatty()))
        return
    try:
        write_atomically(args.html, as_page(table.source, found, decoder, args.ids))
    except OSError as error:
        raise UserError(f"{args.html} cannot be written ({error.strerror}): name another place.") from error
    say(f"written to {args.html}")


def cli() -> None:
    """Console entry point."""
    run_cli(main)


if __name__ == "__main__":
    cli()
