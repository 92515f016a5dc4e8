"""The task ``pretrain``: texts to rows of ``input_ids``, every one of which is trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists
from fft.data.manifest import TokenizerInfo
from fft.text.encoder import Encoder, Recipe, load_recipe, surround
from fft.text.outcomes import with_outcomes
from fft.text.records import Keys


@dataclass(frozen=True)
class Pretrain:
    """The task ``pretrain``, one text a document; see :class:`fft.text.records.Task`."""

    keys: Keys
    recipe: Recipe
    max_len: int | None

    columns_out = ("input_ids", "doc_ids")
    #: Nothing is counted but what every task counts.
    tallies = ()

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The columns of text and id."""
        return self.keys.columns(schema, where)

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Texts as bytes, and ids."""
        return self.keys.rows(batch)

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[str, str]:
        """The text and the id, else a hash. Raises :class:`Malformed`."""
        return self.keys.parse(kind, record, doc_id)

    def token_rows(self, documents: list[tuple[str, str]], malformed: int, encoder: Encoder) -> pa.RecordBatch:
        """Rows of a batch's texts, those that are empty or malformed without tokens."""
        ids, offsets, checked = encoder.encode([text for text, _ in documents]) if documents else (_NO_IDS, _ZERO, 0)
        full = np.flatnonzero(np.diff(offsets))  # no ids at all: an empty document
        empty = len(documents) - len(full)
        offsets = np.append(offsets[:-1][full], offsets[-1])
        ids, offsets = surround(ids, offsets, self.recipe.prefix, self.recipe.suffix)
        piece, document = np.zeros(len(full), np.int64), np.arange(len(full))
        if self.max_len is not None:
            counts = -(-np.diff(offsets) // self.max_len)
            document = np.repeat(document, counts)
            piece = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
            offsets = np.append(offsets[:-1][document] + piece * self.max_len, offsets[-1])
        names = pa.array([doc_id for _, doc_id in documents], pa.string()).take(pa.array(full[document]))
        return with_outcomes({"input_ids": int_lists(ids, offsets)}, names, piece, empty, malformed, encoder, checked)

    def notes(self, counts: dict) -> list[str]:
        """Nothing to say about the counts."""
        return []


def load_pretrain(
    tokenizer: Path, keys: Keys, max_len: int | None, eos: str, parse_special_tokens: bool
) -> tuple[Pretrain, TokenizerInfo]:
    """The task and what the manifest says about its tokenizer; see :func:`fft.text.encoder.load_recipe`."""
    recipe, info = load_recipe(tokenizer, eos, parse_special_tokens)
    return Pretrain(keys, recipe, max_len), info


_NO_IDS, _ZERO = np.empty(0, np.int32), np.zeros(1, np.int64)
