"""From texts to ids in bulk: ``fastokens`` where it proves equal to the Hugging Face tokenizer, else the latter."""

import functools
import json
import os
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fft.data.manifest import TokenizerInfo, tokenizer_sha256
from fft.errors import UserError

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
)
_SLOW = 3

_SAMPLES = 16
_SAMPLE_CHARACTERS = 4096


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to encode: the tokenizer itself travels, so no file need be on every machine.

    ``prefix`` and ``suffix`` are put around every document's ids. A tokenizer without ``tokenizer.json`` travels as
    the pickled object of transformers, ``slow``.
    """

    packed_json: bytes
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    parse_special_tokens: bool = False
    slow: bytes = b""

    @property
    def json(self) -> str:
        """The ``tokenizer.json``."""
        return zlib.decompress(self.packed_json).decode()


def load_recipe(directory: Path, eos: str, parse_special_tokens: bool) -> tuple[Recipe, TokenizerInfo]:
    """Read a Hugging Face tokenizer directory on the driver. Raises :class:`UserError` when it is none.

    ``eos`` is "auto" (append the end-of-sequence token where the tokenizer does not), "always" or "never".
    """
    tokenizer = load_tokenizer(directory)
    end = tokenizer.eos_token_id
    if eos == "always" and end is None:
        raise UserError(f'`eos="always"`: the tokenizer {directory} has no end-of-sequence token; give `eos="auto"`.')
    prefix, suffix = added_around(tokenizer)
    if eos == "never":
        suffix = tuple(i for i in suffix if i != end)
    elif end is not None and end not in suffix:
        suffix = (*suffix, end)
    return recipe_of(tokenizer, prefix, suffix, parse_special_tokens), info_of(tokenizer, directory)


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The transformers tokenizer of a folder. Raises :class:`UserError` when there is none."""
    if not directory.is_dir():
        raise UserError(f"`tokenizer` {directory} is not a folder: give one that holds tokenizer.json.")
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((directory / name).is_file() for name in names):
        raise UserError(f"`tokenizer` {directory} holds no tokenizer: give a folder with tokenizer.json in it.")
    from transformers import AutoTokenizer  # takes seconds: never in a worker, never for --help

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        return cast("PreTrainedTokenizerBase", tokenizer)
    except Exception as error:  # whatever its files make transformers stumble over
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"`tokenizer` {directory} cannot be loaded ({reason[0]}): save it again.") from error


def recipe_of(
    tokenizer: "PreTrainedTokenizerBase", prefix: tuple[int, ...], suffix: tuple[int, ...], parse_special_tokens: bool
) -> Recipe:
    """What a worker needs of a transformers tokenizer."""
    if not tokenizer.is_fast:
        return Recipe(b"", prefix, suffix, parse_special_tokens, pickle.dumps(tokenizer))
    text = _without_truncation(tokenizer.backend_tokenizer.to_str())
    return Recipe(zlib.compress(text.encode(), 1), prefix, suffix, parse_special_tokens)


def info_of(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> TokenizerInfo:
    """What the manifest says about a tokenizer."""
    return TokenizerInfo(
        name=directory.resolve().name,
        sha256=tokenizer_sha256(directory),
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _without_truncation(text: str) -> str:
    spec = json.loads(text)
    return json.dumps({**spec, "truncation": None, "padding": None}, ensure_ascii=False)


def added_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a transformers tokenizer puts before and after a text."""
    inside = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    at = next((i for i in range(len(whole)) if whole[i : i + len(inside)] == inside), 0)
    return tuple(whole[:at]), tuple(whole[at + len(inside) :])


class Encoder:
    """Encodes batches of texts; the first batch of a task decides the engine."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.engine: int | None = None

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """Encode without prefix and suffix: (int32 ids of all texts, int64 offsets, number of texts checked).

        No texts are no batch: they give no ids, and decide nothing.
        """
        checked = 0
        if not texts:
            return np.empty(0, np.int32), np.zeros(1, np.int64), checked
        if self.engine is None:
            self.engine, checked = self._choose(texts)
        encode = {0: encode_fast, _SLOW: encode_slow}.get(self.engine, encode_exact)
        ids, offsets = encode(self.recipe, texts)
        return ids, offsets, checked

    def _choose(self, texts: Sequence[str]) -> tuple[int, int]:
        if self.recipe.slow:
            return _SLOW, 0
        # Short stretches of texts all over the batch: cut alike for both, they are as good as whole documents.
        sample = [text[:_SAMPLE_CHARACTERS] for text in texts[:: max(1, len(texts) // _SAMPLES)]]
        if _fast(self.recipe) is None:
            return 1, 0
        fast, exact = encode_fast(self.recipe, sample), encode_exact(self.recipe, sample)
        same = all(np.array_equal(a, b) for a, b in zip(fast, exact, strict=True))
        return (0 if same else 2), len(sample)


def encode_fast(recipe: Recipe, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode with ``fastokens``: (int32 ids, int64 offsets). Raises RuntimeError when it cannot load the tokenizer."""
    tokenizer = _fast(recipe)
    if tokenizer is None:
        raise RuntimeError("fastokens cannot load this tokenizer")
    ids, offsets = tokenizer.encode_batch_flat(list(texts), False, not recipe.parse_special_tokens)
    return np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64)


def encode_exact(recipe: Recipe, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode with Hugging Face ``tokenizers``: (int32 ids, int64 offsets)."""
    encodings = _exact(recipe).encode_batch_fast(list(texts), add_special_tokens=False)
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


def surround(
    ids: np.ndarray, offsets: np.ndarray, prefix: Sequence[int], suffix: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Put the same few ids before and after each document, by array operations alone."""
    extra = len(prefix) + len(suffix)
    if not extra:
        return ids, offsets
    around = offsets + np.arange(len(offsets)) * extra
    out = np.empty(around[-1], ids.dtype)
    inside = np.ones(len(out), bool)
    for position, token in enumerate(prefix):
        out[around[:-1] + position] = token
        inside[around[:-1] + position] = False
    for position, token in enumerate(reversed(suffix), 1):
        out[around[1:] - position] = token
        inside[around[1:] - position] = False
    out[inside] = ids
    return out, around


# A Python worker serves many tasks: it builds each engine once. One Spark task is one core, so no threads below it.


@functools.lru_cache(maxsize=2)
def _fast(recipe: Recipe) -> "fastokens.Tokenizer | None":
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    try:
        from fastokens import Tokenizer

        return Tokenizer.from_json_str(recipe.json)
    except Exception:  # not installed, or a model or normalizer that it does not know: the caller counts it
        return None


@functools.lru_cache(maxsize=2)
def _exact(recipe: Recipe) -> "tokenizers.Tokenizer":
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
