"""From texts to ids in bulk: ``fastokens`` where it proves equal to the Hugging Face tokenizer, else the latter."""

import functools
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fft.data.manifest import TokenizerInfo, tokenizer_sha256
from fft.errors import UserError

#: Which engine encoded a row, as a small integer: the first means all is well, the others say why it is slow.
ENGINES = ("fastokens", "tokenizers: fastokens cannot load this tokenizer", "tokenizers: fastokens gave other ids")

_SAMPLES = 16
_SAMPLE_CHARACTERS = 4096


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to encode: the tokenizer itself travels, so no file need be on every machine.

    ``prefix`` and ``suffix`` are put around every document's ids.
    """

    packed_json: bytes
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    parse_special_tokens: bool = False

    @property
    def json(self) -> str:
        """The ``tokenizer.json``."""
        return zlib.decompress(self.packed_json).decode()


def load_recipe(directory: Path, eos: str, parse_special_tokens: bool) -> tuple[Recipe, TokenizerInfo]:
    """Read a Hugging Face tokenizer directory on the driver. Raises :class:`UserError` when it is none.

    ``eos`` is "auto" (append the end-of-sequence token where the tokenizer does not), "always" or "never".
    """
    if not directory.is_dir():
        raise UserError(f"--tokenizer {directory} is not a folder: give one that holds tokenizer.json.")
    if not any((directory / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(f"--tokenizer {directory} holds no tokenizer: give a folder with tokenizer.json in it.")
    from transformers import AutoTokenizer  # takes seconds: never in a worker, never for --help

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # whatever its files make transformers stumble over
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--tokenizer {directory} cannot be loaded ({reason[0]}): save it again.") from error
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer {directory} has no fast form: save it with save_pretrained as tokenizer.json.")
    text = _without_truncation(tokenizer.backend_tokenizer.to_str())
    prefix, suffix = added_around(tokenizer.backend_tokenizer)
    end = tokenizer.eos_token_id
    if eos == "always" and end is None:
        raise UserError(f"--eos always: the tokenizer {directory} has no end-of-sequence token; give --eos auto.")
    if eos == "never":
        suffix = tuple(i for i in suffix if i != end)
    elif end is not None and end not in suffix:
        suffix = (*suffix, end)
    recipe = Recipe(zlib.compress(text.encode(), 1), prefix, suffix, parse_special_tokens)
    info = TokenizerInfo(
        name=directory.resolve().name,
        sha256=tokenizer_sha256(directory),
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    return recipe, info


def _without_truncation(text: str) -> str:
    spec = json.loads(text)
    return json.dumps({**spec, "truncation": None, "padding": None}, ensure_ascii=False)


def added_around(tokenizer: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a ``tokenizers.Tokenizer``'s post-processor puts before and after a text."""
    inside = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(inside)] == inside), 0)
    return tuple(whole[:at]), tuple(whole[at + len(inside) :])


class Encoder:
    """Encodes batches of texts; the first batch of a task decides the engine."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.engine: int | None = None

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """Encode without prefix and suffix: (int32 ids of all texts, int64 offsets, number of texts checked)."""
        checked = 0
        if self.engine is None:
            self.engine, checked = self._choose(texts)
        encode = encode_fast if self.engine == 0 else encode_exact
        ids, offsets = encode(self.recipe, texts)
        return ids, offsets, checked

    def _choose(self, texts: Sequence[str]) -> tuple[int, int]:
        # Short stretches of texts all over the batch: cut alike for both, they are as good as whole documents.
        sample = [text[:_SAMPLE_CHARACTERS] for text in texts[:: max(1, len(texts) // _SAMPLES)]]
        if _fast(self.recipe) is None:
            return 1, 0
        fast, exact = encode_fast(self.recipe, sample), encode_exact(self.recipe, sample)
        same = all(np.array_equal(a, b) for a, b in zip(fast, exact, strict=True))
        return (0 if same else 2), len(sample)


def encode_fast(recipe: Recipe, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode with ``fastokens``: (int32 ids, int64 offsets)."""
    ids, offsets = _fast(recipe).encode_batch_flat(list(texts), False, not recipe.parse_special_tokens)
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
    for place, token in enumerate(prefix):
        out[around[:-1] + place] = token
        inside[around[:-1] + place] = False
    for place, token in enumerate(reversed(suffix), 1):
        out[around[1:] - place] = token
        inside[around[1:] - place] = False
    out[inside] = ids
    return out, around


# A Python worker serves many tasks: it builds each engine once. One Spark task is one core, so no threads below it.


@functools.lru_cache(maxsize=2)
def _fast(recipe: Recipe) -> object | None:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    try:
        from fastokens import Tokenizer

        return Tokenizer.from_json_str(recipe.json)
    except Exception:  # not installed, or a model or normalizer that it does not know: the caller counts it
        return None


@functools.lru_cache(maxsize=2)
def _exact(recipe: Recipe) -> object:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.json)
    tokenizer.encode_special_tokens = not recipe.parse_special_tokens
    return tokenizer
