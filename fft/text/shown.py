"""Rows of token tables as text: where their documents begin, and what of them is trained on.

Trained is what the loss counts: tokens with a label, all where the table has none, but never a document's first token,
which nothing predicts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from fft.data.known import DOC_IDS, IGNORE
from fft.data.manifest import tokenizer_sha256, trained_by
from fft.data.model_files import check_directory
from fft.data.samples import Samples
from fft.data.table import Rows, Table
from fft.data.trace import document_names
from fft.data.views import view
from fft.errors import UserError, one_line
from fft.redaction import harmless
from fft.text.encoder import read_tokenizer

#: Escapes of a terminal: what is trained, what is not, and their end.
_TRAINED, _OTHER, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"
#: Tokens of what is shown unasked.
_SHOWN = 512


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
    in_pair: bool = False

    @property
    def heading(self) -> str:
        """Where it is, which side of a pair it is, and how much of it is trained."""
        which = f"document {self.number}"
        if self.in_pair:
            which = f"pair {self.number // 2}, {('chosen', 'rejected')[self.number % 2]}"
        name = f" {self.name}" if self.name else ""
        end, count = self.begin + len(self.ids), int(self.trained.sum())
        return f"row {self.row:,}, {which}{name}: tokens {self.begin:,} to {end:,}, {count:,} trained"

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
    length = int(rows.offsets[row + 1] - rows.offsets[row])
    return _documents_within(rows, row, (0, length), names[row] if names else [], before, table.has_pairs)


def documents_of_sample(samples: Samples, index: int) -> list[ShownDocument]:
    """What a sample of a run is made of, in its order: documents, or stretches of them, as they stand in their rows.

    Raises :class:`UserError` for rows that cannot be read.
    """
    member, own = samples.for_stage(ids=True, labels=True).member(index)
    (spans,) = member.samples([own])
    found: list[ShownDocument] = []
    for span, rows in spans:
        before = sum(group.rows for group in member.table.row_groups[: span.group])
        names = document_names(member.table, span.group)
        own_names = names[span.row] if names else []
        found += _documents_within(rows, span.row, (span.start, span.stop), own_names, before, member.table.has_pairs)
    return found


def _documents_within(
    rows: Rows, row: int, within: tuple[int, int], names: Sequence[str], before: int, in_pairs: bool
) -> list[ShownDocument]:
    """The documents of a row of a row group, ``before`` which a table has so many, as far as they lie ``within``."""
    first, last = int(rows.offsets[row]), int(rows.offsets[row + 1])
    found = []
    for number, (begin, end) in enumerate(pairwise([0, *rows.document_ends(row, 0, last - first)])):
        begin, end = max(begin, within[0]), min(end, within[1])
        if begin < end:
            ids, trained = rows.input_ids[first + begin : first + end], _trained(rows, first + begin, first + end)
            name = names[number] if names else ""
            found.append(ShownDocument(before + row, number, name, begin, ids, trained, in_pairs))
    return found


def _trained(rows: Rows, begin: int, end: int) -> np.ndarray:
    """Which of a document's tokens the loss counts, bool [tokens]."""
    trained = np.ones(end - begin, bool) if rows.labels is None else rows.labels[begin:end] != IGNORE
    trained[:1] = False
    return trained


def beginning(documents: Sequence[ShownDocument], decoder: Decoder, colour: bool, tokens: int = _SHOWN) -> str:
    """The text of the first so many tokens, as :func:`as_text`, and how many more there are."""
    kept, left = [], tokens
    for document in documents:
        if left > 0:
            kept.append(replace(document, ids=document.ids[:left], trained=document.trained[:left]))
        left -= len(document.ids)
    return as_text(kept, decoder, False, colour) + (f"\n... and {-left:,} tokens more" if left < 0 else "")


def first_sample(samples: Samples, tokenizer: str | None, colour: bool) -> str:
    """How the first sample of a run begins. Raises :class:`UserError` as :func:`load_decoder`."""
    decoder = load_decoder(samples.tables[0], tokenizer)
    return f"the first sample begins:\n{beginning(documents_of_sample(samples, 0), decoder, colour)}"


def summary_of(table: Table) -> str:
    """How many rows and tokens a table has, and how many of them are trained, in a line."""
    trained = trained_by(table.manifest)
    if trained is None:
        share = "how many of them are trained is unknown"
    else:
        share = f"{trained:,} trained, {table.tokens - trained:,} not"
    return f"{table.source}: {table.rows:,} rows, {table.tokens:,} tokens: {share}"


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
        lines.append(f"--- {_in_letters(' '.join(document.heading.split()))} ---")
        if ids:
            lines += [
                f"{document.begin + place:>8}  {token:>8}  {'+' if trained else ' '}  {text!r}"
                for place, token, trained, text in shown_tokens(document, decoder)
            ]
            continue
        shown = ""
        for text, trained in ((_in_letters(text), trained) for text, trained in texts(document, decoder)):
            if colour:
                shown += f"{_TRAINED if trained else _OTHER}{text}{_END}"
            else:
                shown += f"⟦{text}⟧" if trained else text
        lines.append(shown)
    return "\n".join(lines)


def _in_letters(text: str) -> str:
    """Also for a file, which ends up on a terminal: not even our own colours are a text's to use."""
    return harmless(text.replace("\x1b", ascii("\x1b")[1:-1]))


def shown_tokens(document: ShownDocument, decoder: Decoder) -> Iterator[tuple[int, int, bool, str]]:
    """Place in the document, id, whether it is trained, and text of each token."""
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
