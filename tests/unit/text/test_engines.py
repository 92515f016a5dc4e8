"""Both engines give the same ids, or one of them is not used: real differences, and planted ones."""

import json
import os
import zlib
from functools import partial

import numpy as np
import pytest
from spark.chat_templates import STYLES, save_chat_tokenizer
from spark.helpers import save_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fft.errors import UserError
from fft.text import agreement, encoder, engines
from fft.text.agreement import agreed
from fft.text.encoder import Encoder, added_around, load_recipe
from fft.text.engines import DIFFERENT, ELSEWHERE, EXACT, FAST, Recipe, encode_exact, encode_fast

#: cl100k's, as Hugging Face's conversions have it, with possessive repetitions: read by another library.
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
#: DeepSeek-V3's last one.
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: The Mongolian vowel separator was white space until Unicode 6.3.
SEPARATOR = "\u180e"
FAST_ENGINE = engines.fast_engine
TEXTS = ["plain", f"a  {SEPARATOR}b", "  é", "", f"{SEPARATOR}", "x = 1\n\n  y"]


def recipe_with(*patterns: str, dropout: float | None = None) -> Recipe:
    """A byte-level BPE that merges spaces, behind these patterns; engines not compared yet."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a  b   c    d  the cat  sat on\n\n  a mat  12 345 "] * 20, trainer)
    return Recipe(zlib.compress(tokenizer.to_str().encode()), (), ())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fft" / "agreement"


@pytest.fixture
def quick(monkeypatch):
    """Fewer code points are compared."""
    monkeypatch.setattr(agreement, "_RANGES", ((0, 0x400, 1, 0), (0x1800, 0x1810, 1, 0)))
    monkeypatch.setattr(agreement, "_MIXED", 500)


def rows_of(encode, texts):
    ids, offsets, *_ = encode(texts)
    return [row.tolist() for row in np.split(ids, offsets[1:-1])]


def test_every_code_point_is_compared():
    seen = [set(range(first, last, step)) for first, last, step, _ in agreement._RANGES]
    seen = set().union(*seen)
    assert set(range(0x40000)) | set(range(0xE0000, 0xE1000)) | {0x10FFFF} <= seen
    assert all(any(code in seen for code in range(at, at + 17)) for at in range(0x40000, 0x110000, 17))


@pytest.mark.parametrize("patterns", [(POSSESSIVE,), (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK)])
def test_a_code_point_that_libraries_read_in_two_ways_goes_to_the_exact_engine(patterns, cache, quick):
    recipe = recipe_with(*patterns)
    exact = rows_of(partial(encode_exact, recipe), TEXTS)
    assert rows_of(partial(encode_fast, recipe), TEXTS) != exact  # else this test shows nothing
    recipe = agreed(recipe)
    assert (recipe.engine, recipe.differing) == (FAST, (SEPARATOR,))
    for texts in (TEXTS, TEXTS[::-1], TEXTS[1:2], TEXTS[:1], [TEXTS[1]] * 3):
        assert rows_of(Encoder(recipe).encode, texts) == rows_of(partial(encode_exact, recipe), texts)


class Planted:
    """``fastokens`` with a fault: each text that ``wrong`` finds gets one id more."""

    def __init__(self, recipe, wrong):
        self._fast, self._wrong = FAST_ENGINE(recipe), wrong

    def encode_batch_flat(self, texts, *flags):
        ids, offsets = self._fast.encode_batch_flat(texts, *flags)
        rows = np.split(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.int64)[1:-1])
        rows = [np.append(row, [1]) if self._wrong(text) else row for row, text in zip(rows, texts, strict=True)]
        offsets = np.cumsum([0, *map(len, rows)])
        return np.concatenate(rows).astype(np.uint32).tobytes(), offsets.astype(np.uint64).tobytes()


@pytest.mark.parametrize(
    ("wrong", "engine", "differing"),
    [
        (lambda text: False, FAST, ()),
        (lambda text: "\u0105" in text, FAST, ("\u0105",)),
        (lambda text: "\u0105" in text or "  \u1803" in text, FAST, ("\u0105", "\u1803")),
        (lambda text: "<|user|>" in text, FAST, ("<|user|>",)),
        (lambda text: "1\r\n" in text, DIFFERENT, ()),
        (lambda text: " " * 2000 in text, DIFFERENT, ()),
        (lambda text: True, DIFFERENT, ()),
        (lambda text: len(text) > 1 and not text.isascii(), DIFFERENT, ()),
        (lambda text: text == " capital", DIFFERENT, ()),
    ],
)
def test_planted_differences_are_found(wrong, engine, differing, tmp_path, cache, quick, monkeypatch):
    folder = save_chat_tokenizer(tmp_path / "tok", "phi3")
    monkeypatch.setattr(engines, "fast_engine", planted := lambda recipe: Planted(recipe, wrong))
    monkeypatch.setattr(agreement, "fast_engine", planted)
    recipe, _ = load_recipe(folder, "never", True)
    assert (recipe.engine, recipe.differing) == (engine, differing)
    monkeypatch.setattr(encoder, "fast_engine", planted)
    texts = [*TEXTS, "\u0105", "a\u0105b", "  \u1803", "<|user|>\n  a", "x <|user|>", "1\r\n"]
    assert rows_of(Encoder(recipe).encode, texts) == rows_of(partial(encode_exact, recipe), texts)


def test_a_verdict_is_remembered_and_a_broken_one_is_not_believed(cache, quick, monkeypatch):
    recipe, asked = recipe_with(POSSESSIVE), []
    real = agreement._differing_characters
    monkeypatch.setattr(agreement, "_differing_characters", lambda rules: asked.append(1) or real(rules))
    first = agreed(recipe)
    assert agreed(recipe) == first
    assert asked == [1]
    verdicts = sorted(cache.glob("*.json"))
    assert [json.loads(file.read_text()) for file in verdicts] == [{"differing": [SEPARATOR]}] * 2
    for broken in ("", "[]", '{"differing": 5}', '{"differing": [1]}', '{"differing": [""]}', "{}"):
        for file in verdicts:
            file.write_text(broken)
        assert agreed(recipe) == first
    assert len(asked) == 7
    assert agreed(recipe_with(POSSESSIVE, "x")).differing == (SEPARATOR,)
    assert len(asked) == 8  # other rules


def test_without_a_cache_folder_engines_are_compared_each_time(tmp_path, quick, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert agreed(recipe_with(POSSESSIVE)).differing == (SEPARATOR,)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert agreed(recipe_with(POSSESSIVE)).differing == (SEPARATOR,)


def test_a_cache_folder_that_is_no_whole_path_counts_as_none(tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    agreed(recipe_with(POSSESSIVE))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert list(tmp_path.glob("home/.cache/fft/agreement/*.json"))


def test_a_worker_with_another_fastokens_encodes_exactly(cache, quick, monkeypatch):
    recipe = agreed(recipe_with(POSSESSIVE))
    monkeypatch.setattr(encoder, "fast_version", lambda: "0.0.1")
    engine = Encoder(recipe)
    assert rows_of(engine.encode, TEXTS) == rows_of(partial(encode_exact, recipe), TEXTS)
    assert engine.engine == ELSEWHERE


def test_a_difference_that_was_not_foreseen_ends_the_job(cache, quick, monkeypatch):
    recipe = agreed(recipe_with(POSSESSIVE))
    planted = Planted(recipe, lambda text: text == "unforeseen")
    monkeypatch.setattr(engines, "fast_engine", lambda recipe: planted)
    with pytest.raises(
        UserError, match=r"fastokens .* gives other ids than .* begins 'unforeseen': uninstall fastokens"
    ):
        Encoder(recipe).encode(["a", "unforeseen"])


def test_a_tokenizer_that_fastokens_cannot_load(cache):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert agreed(Recipe(zlib.compress(words.to_str().encode()), (), ())).engine == EXACT


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["byte-level", "nfc", "sentence-piece"])
def test_engines_agree_on_chats(style, kind, tmp_path):
    recipe, _ = load_recipe(save_chat_tokenizer(tmp_path, style, kind), "never", True)
    assert (recipe.engine, recipe.differing) == (FAST, ())


# What a tokenizer puts around a text


def dna(tmp_path, template: str) -> tuple[object, object]:
    """A tokenizer without the letter "a", and transformers' reading of it."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "AC": 5}, [("A", "C")]))
    tokens = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    return load_recipe(tmp_path, "auto", False)[0], AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("template", "around"),
    [("<s> $A </s>", ([0], [1])), ("<s> $A", ([0], [1])), ("$A </s>", ([], [1])), ("<s> <s> $A", ([0, 0], [1]))],
)
def test_what_is_put_around_a_text_needs_no_letter(template, around, tmp_path):
    recipe, peer = dna(tmp_path, template)
    assert (list(recipe.prefix), list(recipe.suffix)) == around
    assert [*recipe.prefix, 5, 4, *recipe.suffix][: len(peer.encode("ACG"))] == peer.encode("ACG")


def test_a_tokenizer_without_ids_for_any_text_is_refused():
    class Mute:
        name_or_path = "mute"

        def encode(self, text, add_special_tokens):
            return [0] if add_special_tokens else []

        def get_vocab(self):
            return {"<s>": 0}

        def decode(self, ids):
            return "<s>"

    with pytest.raises(UserError, match="mute has no ids for any text"):
        added_around(Mute())


def test_dropout_is_switched_off_and_told(tmp_path):
    folder = save_tokenizer(tmp_path, ["the cat sat on the mat"] * 9)
    expected, _ = load_recipe(folder, "auto", False)
    text = "the cat sat on the mat"
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    recipe, _ = load_recipe(folder, "auto", False)
    assert recipe.notes == (
        "note: the tokenizer's BPE dropout of 0.5 is switched off: with it, each run would have other ids.",
    )
    assert not expected.notes
    for encode in (encode_fast, encode_exact):
        (row,) = rows_of(partial(encode, expected), [text])
        assert rows_of(partial(encode, recipe), [text] * 20) == [row] * 20
