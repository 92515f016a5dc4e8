"""Tokenizers in the files of Qwen, Baichuan and InternLM2, trained small on texts that every machine has.

The published files cannot be had where tests run. These have their formats, and all that makes the formats hard: byte
fallback or none, a space before texts or none, pieces that users define, tokens that are renamed.
"""

import base64
import json
import random
import sysconfig
from collections import Counter
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from fft.text.engines import byte_level_alphabet

#: As in tokenization_qwen.py.
PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
WORDS = ["春眠不觉晓处处闻啼鸟", "夜来风雨声花落知多少", "что", "такое", "хорошо", "ελληνικά", "नमस्ते"]
WORDS += ["안녕하세요", "ありがとう", "été", "naïve", "😀👍🏽"]


def sources(files: int = 25) -> list[str]:
    """Sources of the standard library, some with words of other scripts in between."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [p.read_text(encoding="utf-8") for p in sorted(root.glob("*.py"))[:files]]
    draw = random.Random(0)
    mixed = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(400)]
    return [line for text in found for line in text.splitlines()] + mixed


def strings(number: int, seed: int, words: list[str]) -> list[str]:
    """Strings of all kinds: of given words, any Unicode, repeated, white space, or parts of sources."""
    draw, lines = random.Random(seed), sources(8)
    spaces = [" ", "  ", "\t", "\n", "\r\n", "\u3000", "\xa0", "\u2028", "▁", "\x00", "\x1f", "\u200b", "\ufeff"]
    scripts = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500), (0x900, 0x980), (0x1100, 0x1200)]
    scripts += [(0x3040, 0x3100), (0x4E00, 0x9FA5), (0xAC00, 0xD7A4), (0x1F300, 0x1F650), (0xE000, 0xE100)]

    def character() -> str:
        low, high = draw.choice(scripts) if draw.random() < 0.9 else (1, 0x110000)
        code = draw.randrange(low, high)
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"

    makers = [
        lambda: "".join(character() for _ in range(draw.randint(1, 12))),
        lambda: draw.choice(["ab", "a", "=-", "  ", "哈", "0", "aab", character()]) * draw.randint(1, 20),
        lambda: draw.choice(spaces) * draw.randint(1, 4),
        lambda: draw.choice(words),
        lambda: draw.choice(WORDS),
        lambda: draw.choice(lines),
        lambda: draw.choice(lines)[draw.randint(0, 10) :][: draw.randint(1, 30)],
        lambda: draw.choice(["don't I'LL ſ'ſ", "x'S", "1234567", "3.14e-10", "e\u0301", "\u212b", "ﬁ"]),
    ]
    return ["".join(draw.choice(makers)() for _ in range(draw.randint(1, 6))) for _ in range(number)]


def write_pieces(folder: Path, tokenizer_class: str, size: int = 1200, config: dict | None = None, **settings) -> Path:
    """A directory with ``tokenizer.model``, of SentencePiece's BPE over :func:`sources`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sources()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        character_coverage=0.999,
        minloglevel=2,
        **given | {"byte_fallback": True} | settings,
    )
    (folder / "tokenizer.vocab").unlink()
    write_config(folder, {"tokenizer_class": tokenizer_class, **(config or {})})
    return folder


def write_ranks(folder: Path, size: int = 1500) -> Path:
    """A directory with ``qwen.tiktoken``: ranks of tokens of a byte-level BPE over :func:`sources`."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = byte_level_alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    trained.train_from_iterator(sources(), trainer)
    tokens = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    assert Counter(len(token) == 1 for token, _ in tokens)[True] == 256
    lines = (base64.b64encode(bytes(alphabet[letter] for letter in token)) for token, _ in tokens)
    (folder / "qwen.tiktoken").write_bytes(b"".join(b"%s %d\n" % (line, i) for i, line in enumerate(lines)))
    write_config(folder, {"tokenizer_class": "QWenTokenizer", "model_max_length": 8192})
    return folder


def write_config(folder: Path, config: dict) -> None:
    """``tokenizer_config.json``, which points at code that is not there, as published ones do."""
    maps = {"auto_map": {"AutoTokenizer": ["tokenization_original.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**maps, **config}), encoding="utf-8")
