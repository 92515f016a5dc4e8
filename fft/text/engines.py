"""The engines that make ids of texts: ``fastokens``, Hugging Face ``tokenizers``, transformers' own Python."""

import functools
import importlib.metadata
import json
import os
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import fastokens
    import tokenizers
    from transformers import PreTrainedTokenizerBase

#: Which engine encoded a row, as a small integer: the first means all is well, the others say why it is slow.
ENGINES = (
    "fastokens",
    "tokenizers: fastokens cannot load this tokenizer",
    "tokenizers: fastokens gave other ids",
    "transformers: this tokenizer is written in Python",
    "tokenizers: a worker has no fastokens, or another version than the driver",
)
FAST, EXACT, DIFFERENT, SLOW, ELSEWHERE = range(len(ENGINES))


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to encode: the tokenizer itself travels, so no file need be on every machine.

    ``prefix`` and ``suffix`` are put around every document's ids. A tokenizer without ``tokenizer.json`` travels as
    the pickled object of transformers, ``slow``. ``engine`` encodes all texts but those that hold one of the strings
    ``differing``, for which ``fastokens``, in the version ``compared``, has other ids: see :mod:`fft.text.agreement`.
    ``notes`` are for the user.
    """

    packed_json: bytes
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    parse_special_tokens: bool = False
    slow: bytes = b""
    engine: int = EXACT
    differing: tuple[str, ...] = ()
    compared: str = ""
    notes: tuple[str, ...] = ()

    @property
    def json(self) -> str:
        """The ``tokenizer.json``."""
        return zlib.decompress(self.packed_json).decode()


def encode_fast(recipe: Recipe, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode with ``fastokens``: (int32 ids, int64 offsets). Raises RuntimeError when it cannot load the tokenizer."""
    tokenizer = fast_engine(recipe)
    if tokenizer is None:
        raise RuntimeError("fastokens cannot load this tokenizer")
    ids, offsets = tokenizer.encode_batch_flat(list(texts), False, not recipe.parse_special_tokens)
    return np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64)


def encode_exact(recipe: Recipe, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode with Hugging Face ``tokenizers``: (int32 ids, int64 offsets)."""
    encodings = exact_engine(recipe).encode_batch_fast(list(texts), add_special_tokens=False)
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(encoding) for encoding in encodings], out=offsets[1:])
    ids = np.empty(offsets[-1], np.int32)
    for encoding, begin, end in zip(encodings, offsets[:-1], offsets[1:], strict=True):
        ids[begin:end] = encoding.ids
    return ids, offsets


def encode_with_offsets(recipe: Recipe, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Encode with Hugging Face ``tokenizers``: int32 ids, and the character offsets of each id's begin and end.

    White space that an added token swallows (``lstrip``, ``rstrip``) is none of its characters.
    """
    rows, tokenizer, stripping = [], _offsets_exact(recipe), _stripping(recipe)
    for text, encoding in zip(texts, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True):
        offsets, ids = np.array(encoding.offsets, np.int64).reshape(-1, 2), np.array(encoding.ids, np.int32)
        for at in np.flatnonzero(np.isin(ids, stripping)).tolist() if len(stripping) else ():
            begin, end = offsets[at].tolist()
            inside = text[begin:end].rstrip()
            offsets[at] = begin + len(inside) - len(inside.lstrip()), begin + len(inside)
        rows.append((ids, offsets[:, 0], offsets[:, 1]))
    return rows


def encode_slow(recipe: Recipe, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode with a tokenizer written in Python: (int32 ids, int64 offsets)."""
    tokenizer, split = _slow(recipe), not recipe.parse_special_tokens
    rows = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split) for text in texts]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(rows), np.int32, offsets[-1]), offsets


def ids_of_each(ids: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    """The ids of each text, from what encoding gave of all."""
    return np.split(ids, offsets[1:-1]) if len(offsets) > 1 else []


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others are moved above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


# A Python worker serves many tasks: it builds each engine once. One Spark task is one core, so no threads below it.


def fast_version() -> str:
    """The version of ``fastokens``, "" where there is none."""
    try:
        return importlib.metadata.version("fastokens")
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.lru_cache(maxsize=2)
def fast_engine(recipe: Recipe) -> "fastokens.Tokenizer | None":
    """The tokenizer in ``fastokens``; None where that is missing or cannot load it."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    try:
        from fastokens import Tokenizer

        return Tokenizer.from_json_str(recipe.json)
    except Exception:  # not installed, or a model or normalizer that it does not know: the caller counts it
        return None


@functools.lru_cache(maxsize=2)
def exact_engine(recipe: Recipe) -> "tokenizers.Tokenizer":
    """The tokenizer in Hugging Face ``tokenizers``."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.json)
    tokenizer.encode_special_tokens = not recipe.parse_special_tokens
    return tokenizer


@functools.lru_cache(maxsize=2)
def _offsets_exact(recipe: Recipe) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer

    # A post-processor adds nothing here, but some trim white space from offsets.
    tokenizer = Tokenizer.from_str(json.dumps({**json.loads(recipe.json), "post_processor": None}))
    tokenizer.encode_special_tokens = not recipe.parse_special_tokens
    return tokenizer


@functools.lru_cache(maxsize=2)
def _stripping(recipe: Recipe) -> np.ndarray:
    """Ids of added tokens that swallow white space beside them, and neither begin nor end with any."""
    added = json.loads(recipe.json)["added_tokens"]
    return np.array(
        [t["id"] for t in added if (t["lstrip"] or t["rstrip"]) and t["content"] == t["content"].strip()], np.int32
    )


@functools.lru_cache(maxsize=2)
def _slow(recipe: Recipe) -> "PreTrainedTokenizerBase":
    return pickle.loads(recipe.slow)
