"""Where ``fastokens`` has other ids than Hugging Face ``tokenizers``: found once for each tokenizer, by trying to.

The two read the same ``tokenizer.json``, but with other libraries for regular expressions and other tables of Unicode.
So they may differ in how they cut a text, at a few code points. Two comparisons find these.

- *Rules.* Every code point that Unicode uses, in contexts that make its classes seen, goes through both engines with
  the tokenizer's own normalizer and pre-tokenizer, and a vocabulary that hides no cut: whatever stands side by side in
  one piece is merged. Tokenizers with the same rules, as most of a model family have, share what was found.
- *The tokenizer itself*: every entry of its vocabulary, its added tokens between all kinds of neighbours, and texts
  made of the ends of all that a pattern may tell apart.

Texts that hold what differs are encoded by ``tokenizers``; where too much differs, all are. The verdict is made on the
driver and travels with the recipe, so that ids are the same in every task and on every engine. It is remembered in the
user's cache folder under a hash of all that it depends on.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fft.console import say
from fft.files import alone, write_atomically
from fft.text.engines import (
    DIFFERENT,
    EXACT,
    FAST,
    SLOW,
    Recipe,
    byte_level_alphabet,
    encode_exact,
    encode_fast,
    fast_engine,
    fast_version,
    ids_of_each,
)

#: To be raised when more is compared: older verdicts are then forgotten.
_VERSION = 1
#: So many strings may differ; where more do, all texts go to ``tokenizers``.
_MOST = 256
#: Characters of context: letters of both cases, white space, a digit, punctuation. Any three in a piece are merged.
_BESIDE = "aA \n\r\t1!'/"
_CONTEXTS = (
    "a{0}a {0}A  {0}!{0}\n{0}\r\n{0}1{0}111!{0}'{0}/ \t{0}  \n\n{0} \n{0}{0}1  {0}   ",
    "a  {0}a 1{0}111!{0}\n'{0}",
    "a  {0}a",
)
#: Code points from, to and by which step, and in which of the contexts: the more, the more that patterns say of them.
#: No Unicode has assigned any of those that are left out, and none but the private use areas are in any table.
_RANGES = (
    (0, 0x3000, 1, 0),
    (0x3000, 0x20000, 1, 1),
    (0x20000, 0x40000, 1, 2),
    (0x40000, 0xE0000, 17, 2),
    (0xE0000, 0xE1000, 1, 2),
    (0xE1000, 0x110000, 17, 2),
    (0x10FFFE, 0x110000, 1, 2),
)
_TEXT = 32  # code points of a text
_BATCH = 512  # texts encoded at once
#: What patterns tell apart, of several scripts, and what is known to be read in more than one way.
_KINDS = (
    *"aZéßſ\u212a中か한עहไ\u0301\u093f1٣²½Ⅷ \t\n\r\v\f\x1c\x85\u00a0\u3000\u2028\u200b\u200d\ufeff\u00ad\x00",
    *"!.'\u2019_-/\\<|>$€+^😀▁",
    *("  ", "\r\n", "'s", "'LL", "'\u017f", "ing", "123", "\u1100\u1161", "\U0001f468\u200d\U0001f469"),
)
_MIXED = 20_000  # texts of a few kinds each
_RUN = 3000  # characters of one kind in a row


def agreed(recipe: Recipe) -> Recipe:
    """The recipe with the engine that encodes its texts, and the strings whose texts it leaves to ``tokenizers``."""
    if recipe.slow:
        return replace(recipe, engine=SLOW)
    if fast_engine(recipe) is None:
        return replace(recipe, engine=EXACT)
    facts = [recipe.json, recipe.parse_special_tokens]
    differing = _remembered("tokenizer", facts, functools.partial(_compare, recipe))
    if differing is None:
        return replace(recipe, engine=DIFFERENT)
    return replace(recipe, engine=FAST, differing=tuple(differing), compared=fast_version())


def _compare(recipe: Recipe) -> list[str] | None:
    """The strings in whose texts the engines differ; None when these are too many, or are not found."""
    probe = _probe(json.loads(recipe.json))
    rules = probe if probe is not None and fast_engine(probe) is not None else recipe
    characters = _remembered("rules", [rules.json], functools.partial(_differing_characters, rules))
    if characters is None:
        return None
    added = [token["content"] for token in json.loads(recipe.json)["added_tokens"]]
    beside = [f"{a}{{0}}{b}" for a in ("", "a", " ", "  ", "\n", "{0}") for b in ("", "a", " ", "  ", "\n")]
    tokens = [t for t in added if _differ(recipe, [pattern.format(t) for pattern in beside])]
    differing = [*characters, *tokens]
    rest = itertools.chain(_surfaces(recipe), _mixtures([t for t in added if t not in tokens]))
    texts = [text for text in rest if not any(string in text for string in differing)]
    return None if len(differing) > _MOST or _differ(recipe, texts) else differing


def _differing_characters(recipe: Recipe) -> list[str] | None:
    """The code points with which texts get other ids; None when these are too many, or not found one by one."""
    start, found, told = time.monotonic(), [], False
    for first, last, step, context in _RANGES:
        points = [chr(code) for code in range(first, last, step) if not 0xD800 <= code < 0xE000]
        texts = ["".join(map(_CONTEXTS[context].format, points[i : i + _TEXT])) for i in range(0, len(points), _TEXT)]
        for text in _differ(recipe, texts):
            at = texts.index(text) * _TEXT
            singly = [c for c in points[at : at + _TEXT] if _differ(recipe, [_CONTEXTS[context].format(c)])]
            found += singly
            if not singly or len(found) > _MOST or min(singly) < "\x80":  # nearly all texts hold an ASCII character
                return None
        if not told and time.monotonic() - start > 1:
            say("comparing fastokens with Hugging Face tokenizers at every code point, once for this tokenizer ...")
            told = True
    if told:
        say(f"compared in {time.monotonic() - start:.0f} s: {len(found)} of all code points have other ids.")
    return found


def _differ(recipe: Recipe, texts: Iterable[str]) -> list[str]:
    """Those of the texts of which the engines make other ids."""
    found, stream = [], iter(texts)
    while batch := list(itertools.islice(stream, _BATCH)):
        (fast, starts), (exact, ends) = encode_fast(recipe, batch), encode_exact(recipe, batch)
        if not np.array_equal(starts, ends) or not np.array_equal(fast, exact):
            rows = zip(ids_of_each(fast, starts), ids_of_each(exact, ends), batch, strict=True)
            found += [text for a, b, text in rows if not np.array_equal(a, b)]
    return found


def _probe(spec: dict[str, Any]) -> Recipe | None:
    """A tokenizer with the same rules whose ids show where a text is cut; None for a model that is no plain BPE."""
    model = spec["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("normalizer")]):
        letters = {byte: letter for letter, byte in byte_level_alphabet().items()}
        beside = [letters[ord(c)] for c in _BESIDE]
        others = [letters[byte] for byte in range(256) if chr(byte) not in _BESIDE]
    else:  # code points beside these are bytes, or unknown
        beside = ["▁" if c == " " else c for c in _BESIDE]
        others = [chr(code) for code in range(0x21, 0x7F) if chr(code) not in _BESIDE]
    pairs = [pair for x in beside for y in others for pair in ((x, y), (y, x))]
    pairs += itertools.product(beside, beside)
    pairs += [(x + y, z) for x, y, z in itertools.product(beside, repeat=3)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
    unknown = [model["unk_token"]] if model.get("unk_token") else []
    entries = dict.fromkeys([*unknown, *bytes_, *beside, *others, *(a + b for a, b in pairs)])
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    model = {**model, "vocab": vocabulary, "merges": [list(pair) for pair in pairs]}
    text = json.dumps({**spec, "model": model, "added_tokens": [], "post_processor": None, "decoder": None})
    return Recipe(zlib.compress(text.encode(), 1), (), (), parse_special_tokens=True)


def _surfaces(recipe: Recipe) -> Iterator[str]:
    """A text for every entry of the vocabulary, as far as one can be written."""
    alphabet = byte_level_alphabet()
    for token in json.loads(recipe.json)["model"]["vocab"]:
        if not isinstance(token, str):
            token = token[0]
        try:
            yield bytes(map(alphabet.__getitem__, token)).decode()
        except (KeyError, UnicodeDecodeError):
            yield token.replace("▁", " ")


def _mixtures(added: Sequence[str]) -> Iterator[str]:
    draw = random.Random(0)
    kinds = [*_KINDS, *draw.sample(added, min(len(added), 8))]
    yield from ("".join(pair) for pair in itertools.product(kinds, repeat=2))
    yield from ("".join(draw.choices(kinds, k=draw.randint(3, 12))) for _ in range(_MIXED))
    yield from (kind * (_RUN // len(kind)) for kind in _KINDS)
    yield "".join(draw.choices(kinds, k=10 * _RUN))


def _remembered(name: str, facts: Sequence[object], find: Callable[[], list[str] | None]) -> list[str] | None:
    """What ``find`` gives, from the user's cache folder if it was found before; whoever else asks waits meanwhile."""
    versions = [_VERSION, fast_version(), importlib.metadata.version("tokenizers")]
    key = hashlib.sha256(json.dumps([*facts, *versions]).encode()).hexdigest()[:32]
    with _locked(f"{name}-{key}") as path:
        verdict = _read(path)
        if verdict is None:
            verdict = {"differing": find()}
            if path is not None:
                _write(path, verdict)
        return verdict["differing"]


@contextlib.contextmanager
def _locked(name: str) -> Iterator[Path | None]:
    """The file of a verdict, under its lock; None where there is no folder to remember it in."""
    with contextlib.ExitStack() as held:
        file = None
        with contextlib.suppress(OSError, RuntimeError):  # no home, or it is read-only: it is found again each time
            cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
            cache = cache if cache.is_absolute() else Path("~/.cache").expanduser()  # a relative one counts as none
            folder = cache / "fft" / "agreement"
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(folder / f"{name}.lock", 0o600))
            file = folder / f"{name}.json"
        yield file


def _read(path: Path | None) -> dict[str, Any] | None:
    try:
        verdict = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):  # none yet, or no longer whole
        return None
    strings = verdict.get("differing", 0) if isinstance(verdict, dict) else 0
    known = strings is None or (isinstance(strings, list) and all(isinstance(s, str) and s for s in strings))
    return verdict if known else None


def _write(path: Path, verdict: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(verdict))
    except OSError as error:
        say(f"note: {path} cannot be written ({error}): engines are compared again next time.")
