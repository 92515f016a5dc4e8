"""From characters to tokens: which tokens of an encoded text cover a stretch of it. Exact, without a loop over tokens.

The fast encoder gives no offsets. But the tokens of most tokenizers spell their text: byte for byte, one after the
other, or but for a space that sentence-piece tokenizers put before every stretch without special tokens. Where they do
- proven for every row by comparing all bytes - the sums of their lengths are the offsets. Any other row (a normalizer
changed the text, a special token swallowed spaces) is encoded by ``tokenizers`` with offsets.

A token that lies across the edge of a stretch belongs to it: else nobody would learn to write it.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fft.text.encoder import Encoder
from fft.text.engines import Recipe, byte_level_alphabet, encode_slow, encode_with_offsets

NOT_TRAINED = -100
_ROWS = 512  # rows whose bytes are compared at once


@dataclass(frozen=True)
class Spelling:
    """What each id spells: ``data[starts[i]:starts[i] + lengths[i]]``, in bytes. An unknown id spells nothing.

    ``added`` says which ids are added tokens, between which a tokenizer works on each stretch of text for itself.
    """

    data: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    added: np.ndarray

    @classmethod
    def of(cls, surfaces: Sequence[bytes], added: Collection[int] = ()) -> "Spelling":
        """From the bytes of every id."""
        lengths = np.array([len(surface) for surface in surfaces], np.int64)
        flags = np.zeros(len(surfaces), bool)
        flags[list(added)] = True
        return cls(np.frombuffer(b"".join(surfaces), np.uint8), np.cumsum(lengths) - lengths, lengths, flags)

    def spell(self, ids: np.ndarray, firsts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bytes of all ids end to end, begin and end of each id in them).

        With ``firsts``, where texts begin in ``ids``, without a space before the first id of each stretch. An id that
        was nothing but that space shares the first byte of the next.
        """
        starts, lengths = self.starts[ids], self.lengths[ids]
        opening = np.zeros(len(ids), bool)
        if firsts is not None:
            opening = np.append(True, self.added[ids[:-1]])
            opening[firsts] = True
            opening &= (lengths > 0) & ~self.added[ids]
            opening[opening] = self.data[starts[opening]] == ord(" ")
            starts, lengths = starts + opening, lengths - opening
        ends = np.cumsum(lengths)
        begins = ends - lengths
        data = self.data[np.repeat(starts - begins, lengths) + np.arange(ends[-1] if len(ends) else 0)]
        return data, begins, ends + (opening & (lengths == 0))


def encode_stretches(
    encoder: Encoder, texts: Sequence[str], positions: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]], int]:
    """Encode texts, and find the tokens at some of their characters.

    ``positions[i]`` are rising character positions in text ``i``. Returns (int32 ids, int64 offsets of the texts in
    them, per text (after, at), number of texts checked against Hugging Face): ``after[j]`` tokens of the text begin
    before position ``j``, and ``at[j]`` of them end at it or before it.
    """
    ids, offsets, checked = encoder.encode(texts)
    if encoder.recipe.slow:
        rows = zip(texts, np.split(ids, offsets[1:])[:-1], positions, strict=True)
        return ids, offsets, [_by_prefixes(encoder.recipe, *row) for row in rows], checked
    spelling = spelling_of(encoder.recipe)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    own_ids = np.split(ids, offsets[1:])[:-1]
    for first in range(0, len(texts), _ROWS):
        rows = list(range(first, min(first + _ROWS, len(texts))))
        for spaced in (True, False):
            rows = _by_spelling(spelling, spaced, own_ids, texts, positions, rows, found)
    others = [row for row in range(len(texts)) if row not in found]
    if others:
        for row, (row_ids, starts, ends) in zip(
            others, encode_with_offsets(encoder.recipe, [texts[row] for row in others]), strict=True
        ):
            own_ids[row] = row_ids
            found[row] = _tokens_at(starts, ends, np.array(positions[row], np.int64))
        ids = np.concatenate(own_ids)
        offsets = np.append(0, np.cumsum([len(ids_of_row) for ids_of_row in own_ids]))
    return ids, offsets, [found[row] for row in range(len(texts))], checked


def label(ids: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``ids`` from ``begins[i]`` to ``ends[i]``, -100 elsewhere. Stretches may be empty and may overlap."""
    steps = np.zeros(len(ids) + 1, np.int32)
    np.add.at(steps, begins, 1)
    np.add.at(steps, np.maximum(begins, ends), -1)
    return np.where(np.cumsum(steps[:-1]) > 0, ids, np.int32(NOT_TRAINED))


def _tokens_at(starts: np.ndarray, ends: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.searchsorted(starts, positions, side="left"), np.searchsorted(ends, positions, side="right")


def _by_spelling(
    spelling: Spelling,
    spaced: bool,
    own_ids: Sequence[np.ndarray],
    texts: Sequence[str],
    positions: Sequence[Sequence[int]],
    rows: list[int],
    found: dict[int, tuple[np.ndarray, np.ndarray]],
) -> list[int]:
    """Put token positions of ``rows`` into ``found`` by spelled bytes; returns those whose ids do not spell their text.

    ``spaced``: with the spaces that are in the ids, else without one before each stretch.
    """
    if not rows:
        return []
    bounds = np.append(0, np.cumsum([len(own_ids[row]) for row in rows]))
    ids = np.concatenate([own_ids[row] for row in rows])
    spelled, begins, ends = spelling.spell(ids, None if spaced else bounds[:-1][np.diff(bounds) > 0])
    byte_bounds = np.append(begins, len(spelled))[bounds].tolist()
    left = []
    for i, row in enumerate(rows):
        first, last = byte_bounds[i], byte_bounds[i + 1]
        encoded = texts[row].encode()
        if spelled[first:last].tobytes() != encoded:
            left.append(row)
            continue
        tokens = slice(bounds[i], bounds[i + 1])
        at = np.array(positions[row], np.int64)
        if len(encoded) != len(texts[row]):
            at = _byte_positions(texts[row], positions[row])
        found[row] = _tokens_at(begins[tokens], ends[tokens], at + first)
    return left


def _byte_positions(text: str, positions: Sequence[int]) -> np.ndarray:
    stretches = zip([0, *positions], positions, strict=False)
    return np.cumsum([len(text[begin:end].encode()) for begin, end in stretches], dtype=np.int64)


def _by_prefixes(recipe: Recipe, text: str, ids: np.ndarray, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token positions of a tokenizer that knows no offsets: how many ids the text up to each place has in common
    with the whole text's. Where a place lies inside a token, that token is the first that differs."""
    prefixes, at = encode_slow(recipe, [text[:position] for position in positions])
    same, whole = [], []
    for prefix in np.split(prefixes, at[1:-1]) if len(positions) else []:
        size = min(len(prefix), len(ids))
        differing = np.flatnonzero(prefix[:size] != ids[:size])
        same.append(int(differing[0]) if len(differing) else size)
        whole.append(len(prefix))
    same = np.array(same, np.int64)
    return same + (same < np.array(whole, np.int64)), same


@lru_cache(maxsize=2)
def spelling_of(recipe: Recipe) -> Spelling:
    """What the ids of a ``tokenizer.json`` spell. A wrong guess costs only time: no row will be proven by it."""
    spec = json.loads(recipe.json)
    vocabulary = spec["model"].get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    byte_level = '"ByteLevel"' in json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
    spell = _byte_level if byte_level else _sentence_piece
    added = {token["id"]: token["content"].encode() for token in spec.get("added_tokens", ())}
    surfaces = [b""] * (max([-1, *vocabulary.values(), *added]) + 1)
    for token, i in vocabulary.items():
        surfaces[i] = spell(token)
    for i, content in added.items():
        surfaces[i] = content
    return Spelling.of(surfaces, added)


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return b""


_BYTES = byte_level_alphabet()


def _sentence_piece(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
