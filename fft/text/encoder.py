"""From a tokenizer's folder to a recipe, and from texts to ids in bulk, by the engine that the recipe names."""

import json
import os
import pickle
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fft.data.manifest import TokenizerInfo, tokenizer_sha256
from fft.data.model_files import check_directory
from fft.errors import UserError
from fft.text.agreement import agreed
from fft.text.convert_tokenizer import check_converted
from fft.text.engines import (
    ELSEWHERE,
    FAST,
    SLOW,
    Recipe,
    encode_exact,
    encode_fast,
    encode_slow,
    fast_engine,
    fast_version,
    ids_of_each,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Attributes of tokenizers with the tokens around an image, and how these are called where there are none.
_AROUND_IMAGES = {"start_image_token": "<img>", "end_image_token": "</img>"}

_SAMPLES = 16
_SAMPLE_CHARACTERS = 4096


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
    check_directory(directory)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((directory / name).is_file() for name in names):
        raise UserError(f"`tokenizer` {directory} holds no tokenizer: give a folder with tokenizer.json in it.")
    check_converted(directory, "`tokenizer`")
    try:
        return read_tokenizer(directory)
    except Exception as error:  # whatever its files make transformers stumble over
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"`tokenizer` {directory} cannot be loaded ({reason[0]}): save it again.") from error


def read_tokenizer(directory: str | os.PathLike[str], **options: str) -> "PreTrainedTokenizerBase":
    """What transformers makes of a folder, whose code is not run and of which nothing is kept elsewhere.

    Raises whatever its files make transformers stumble over.
    """
    from transformers import AutoTokenizer  # takes seconds: never in a worker, never for --help

    # tiktoken would keep a copy of what it reads in the machine's temporary folder, under a name that anybody can know.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")
    found = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, **options)
    return cast("PreTrainedTokenizerBase", found)


def recipe_of(
    tokenizer: "PreTrainedTokenizerBase", prefix: tuple[int, ...], suffix: tuple[int, ...], parse_special_tokens: bool
) -> Recipe:
    """What a worker needs of a transformers tokenizer, engines compared: see :mod:`fft.text.agreement`.

    Raises :class:`UserError` for one that draws its ids at random and cannot be kept from it.
    """
    if not tokenizer.is_fast:
        if getattr(tokenizer, "sp_model_kwargs", None) and tokenizer.sp_model_kwargs.get("enable_sampling"):
            raise UserError(
                f"`tokenizer` {tokenizer.name_or_path} draws its ids at random (sp_model_kwargs, enable_sampling): "
                "switch that off in tokenizer_config.json."
            )
        return agreed(Recipe(b"", prefix, suffix, parse_special_tokens, pickle.dumps(tokenizer)))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    dropout = spec["model"].get("dropout")
    if dropout:
        spec["model"]["dropout"] = None
    text = json.dumps({**spec, "truncation": None, "padding": None}, ensure_ascii=False)
    note = f"note: the tokenizer's BPE dropout of {dropout} is switched off: with it, each run would have other ids."
    notes = (note,) if dropout else ()
    return agreed(Recipe(zlib.compress(text.encode(), 1), prefix, suffix, parse_special_tokens, notes=notes))


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


@dataclass(frozen=True)
class ImageIds:
    """Of a tokenizer: the ids of the tokens ``around`` an image, -1 for none, and its added tokens by id."""

    around: tuple[int, int]
    added: dict[int, str]


def image_ids_of(tokenizer: "PreTrainedTokenizerBase") -> ImageIds:
    """What a tokenizer has for images. Those that name no tokens around them may have InternVL's."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    by_name = {token: i for i, token in added.items()}
    start, end = (getattr(tokenizer, name, None) or other for name, other in _AROUND_IMAGES.items())
    return ImageIds((by_name.get(start, -1), by_name.get(end, -1)), added)


def added_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a transformers tokenizer puts before and after a text.

    Found by a text that has ids, none of which is put around it. Raises :class:`UserError` when no text has.
    """
    around = tokenizer.encode("", add_special_tokens=True)
    for text in _texts(tokenizer):
        inside = tokenizer.encode(text, add_special_tokens=False)
        if not inside or not set(inside).isdisjoint(around):
            continue
        whole = tokenizer.encode(text, add_special_tokens=True)
        for at in range(len(whole) - len(inside) + 1):
            if whole[at : at + len(inside)] == inside:
                return tuple(whole[:at]), tuple(whole[at + len(inside) :])
    raise UserError(f"`tokenizer` {tokenizer.name_or_path} has no ids for any text: save it again.")


def _texts(tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Texts one of which has ids: a letter, and what the entries of the vocabulary stand for."""
    yield "a"
    for i in sorted(tokenizer.get_vocab().values()):
        yield str(tokenizer.decode([i]))


class Encoder:
    """Encodes batches of texts by the engine of the recipe; a sample of the first batch goes through both engines."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.engine: int | None = None

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """Encode without prefix and suffix: (int32 ids of all texts, int64 offsets, number of texts checked).

        No texts are no batch: they give no ids, and decide nothing. Raises :class:`UserError` when ``fastokens`` gives
        ids that the comparison of the engines did not foresee.
        """
        checked = 0
        if not texts:
            return np.empty(0, np.int32), np.zeros(1, np.int64), checked
        if self.engine is None:
            self.engine = self._own_engine()
            checked = self._check(texts) if self.engine == FAST else 0
        if self.engine != FAST:
            ids, offsets = (encode_slow if self.engine == SLOW else encode_exact)(self.recipe, texts)
            return ids, offsets, checked
        exactly = [i for i, text in enumerate(texts) if self._differs(text)] if self.recipe.differing else []
        if not exactly:
            return *encode_fast(self.recipe, texts), checked
        return *self._encode_both(texts, exactly), checked

    def _own_engine(self) -> int:
        """The recipe's engine, or the exact one where this machine has another ``fastokens`` than was compared."""
        if self.recipe.engine != FAST:
            return self.recipe.engine
        same = self.recipe.compared == fast_version() and fast_engine(self.recipe) is not None
        return FAST if same else ELSEWHERE

    def _differs(self, text: str) -> bool:
        return any(string in text for string in self.recipe.differing)

    def _encode_both(self, texts: Sequence[str], exactly: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids by ``fastokens``, and by ``tokenizers`` of the texts with these numbers."""
        fast, exact = list(texts), [texts[i] for i in exactly]
        for i in exactly:
            fast[i] = ""
        rows = ids_of_each(*encode_fast(self.recipe, fast))
        for i, row in zip(exactly, ids_of_each(*encode_exact(self.recipe, exact)), strict=True):
            rows[i] = row
        return np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64)

    def _check(self, texts: Sequence[str]) -> int:
        # Short stretches of texts all over the batch: cut alike for both, they are as good as whole documents.
        sample = [text[:_SAMPLE_CHARACTERS] for text in texts[:: max(1, len(texts) // _SAMPLES)]]
        sample = [text for text in sample if not self._differs(text)]
        fast, exact = ids_of_each(*encode_fast(self.recipe, sample)), ids_of_each(*encode_exact(self.recipe, sample))
        for text, a, b in zip(sample, fast, exact, strict=True):
            if not np.array_equal(a, b):
                raise UserError(
                    f"fastokens {fast_version()} gives other ids than Hugging Face tokenizers for a text that begins "
                    f"{text[:40]!r}: uninstall fastokens, and all is encoded by the latter; please report the text."
                )
        return len(sample)


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
