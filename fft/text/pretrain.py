"""The task ``pretrain``: texts to rows of ``input_ids``, every one of which is trained on."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fft.data.arrow_lists import int_lists, lists_of_one
from fft.data.manifest import TokenizerInfo
from fft.text.encoder import Encoder, load_recipe, surround
from fft.text.engines import Recipe
from fft.text.records import Keys


@dataclass(frozen=True)
class Pretrain:
    """The task ``pretrain``, one text a document; see :class:`fft.text.records.RecordEncoder`."""

    keys: Keys
    recipe: Recipe
    max_len: int | None

    columns_out = ("input_ids", "doc_ids")
    tallies = ()
    vision, pairs, bytes_beside = None, False, 0

    def held(self, document: str) -> int:
        """Nothing but a text."""
        return 0

    def columns(self, schema: pa.Schema, where: str) -> list[str]:
        """The columns of text and id."""
        return self.keys.columns(schema, where)

    def rows(self, batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str | None]]:
        """Texts as bytes, and ids."""
        return self.keys.rows(batch)

    def parse(
        self, kind: str, record: bytes | None, doc_id: str | None, unused: Counter[str] | None = None
    ) -> tuple[str, str]:
        """The text and the id, else a hash. Raises :class:`Malformed`."""
        return self.keys.parse(kind, record, doc_id, unused)

    def token_rows(self, documents: Sequence[tuple[str, str]], encoder: Encoder) -> tuple[pa.RecordBatch, Counter[str]]:
        """Rows of a batch's texts; a text without any ids is empty, and has none."""
        ids, offsets, checked = encoder.encode([text for text, _ in documents])
        full = np.flatnonzero(np.diff(offsets))
        counts = Counter(documents_out=len(full), empty=len(documents) - len(full), checked=checked)
        offsets = np.append(offsets[:-1][full], offsets[-1])
        ids, offsets = surround(ids, offsets, self.recipe.prefix, self.recipe.suffix)
        document = np.arange(len(full))
        if self.max_len is not None:
            cuts = -(-np.diff(offsets) // self.max_len)
            document = np.repeat(document, cuts)
            number = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
            offsets = np.append(offsets[:-1][document] + number * self.max_len, offsets[-1])
        names = pa.array([doc_id for _, doc_id in documents], pa.string()).take(pa.array(full[document]))
        columns = [int_lists(ids, offsets), lists_of_one(names)]
        return pa.RecordBatch.from_arrays(columns, self.columns_out), counts

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """What the user should know about the tokenizer."""
        return list(self.recipe.notes)


def load_pretrain(
    tokenizer: Path, keys: Keys, max_len: int | None, eos: str, parse_special_tokens: bool
) -> tuple[Pretrain, TokenizerInfo]:
    """The task and what the manifest says about its tokenizer; see :func:`fft.text.encoder.load_recipe`."""
    recipe, info = load_recipe(tokenizer, eos, parse_special_tokens)
    return Pretrain(keys, recipe, max_len), info
