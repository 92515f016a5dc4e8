"""SentencePiece's BPE models (``tokenizer.model``) as ``tokenizer.json``: same ids, without the package sentencepiece.

A model is a protobuf message (sentencepiece_model.proto), of which the pieces and a few settings are read. What would
make other ids in Hugging Face ``tokenizers`` is refused: models that are no BPE, and normalizers other than identity.
"""

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fft.errors import UserError, one_line

#: Kinds of pieces.
NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)
#: What a space is, within pieces.
SPACE = "▁"
_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its place there is its id."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class PieceModel:
    """What a ``tokenizer.model`` says.

    With ``prefix`` a space is put before every text. What no piece is made of becomes bytes with ``byte_fallback``,
    else the unknown piece. ``roles`` are ids of ``unk_token``, ``bos_token``, ``eos_token`` and ``pad_token``, -1 for
    none.
    """

    pieces: tuple[Piece, ...]
    prefix: bool
    byte_fallback: bool
    roles: dict[str, int]

    def tokenizer(self, names: dict[int, str]) -> dict:
        """As the content of ``tokenizer.json``, without tokens put around a text; ``names`` replace pieces' own, by id.

        Raises :class:`UserError` where that would not have the same ids.
        """
        # SentencePiece ends a piece at a NUL, so that it never finds one that begins with it, as InternLM2 has.
        names = {i: p.text.replace("\0", "\\0") for i, p in enumerate(self.pieces) if "\0" in p.text} | names
        unknown = next((i for i, piece in enumerate(self.pieces) if piece.kind == UNKNOWN), None)
        texts = [names.get(i, piece.text) for i, piece in enumerate(self.pieces)]
        if len(set(texts)) < len(texts):
            raise UserError("two tokens of the tokenizer have one name, by the names that its settings give them.")
        # Of those with spaces SentencePiece never sees one: it has replaced them.
        whole = [i for i, p in enumerate(self.pieces) if p.kind == DEFINED and i not in names and " " not in p.text]
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else texts[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": self.byte_fallback,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": self._merges(set(names)),
        }
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        before = [{"type": "Prepend", "prepend": SPACE}] if self.prefix else []
        found: dict[str, Any] = {
            "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": _decoders(self.prefix)},
            "model": model,
        }
        added = [_added(i, texts[i], special=True) for i, p in enumerate(self.pieces) if p.kind in (UNKNOWN, CONTROL)]
        if whole and self.prefix:
            # Added tokens would cut the text before a space is put in front of it, and have each stretch get one. What
            # this gets wrong: the name of a control piece, alone between two of these, is taken for the piece.
            model["ignore_merges"] = True
            found["pre_tokenizer"] = _split_off([texts[i] for i in whole])
            self._check_reachable(found)
        else:
            added += [{**_added(i, texts[i], special=False), "normalized": True} for i in whole]
        return {**found, "added_tokens": added}

    def _merges(self, renamed: set[int]) -> list[list[str]]:
        """All pairs of pieces that make a piece, in the order in which SentencePiece would join them."""
        normal = {p.text: i for i, p in enumerate(self.pieces) if p.kind == NORMAL and i not in renamed}
        pairs = []
        for text, i in normal.items():
            cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
            parts = sorted((normal[a], normal[b], a, b) for a, b in cuts if a in normal and b in normal)
            pairs += [(-self.pieces[i].score, i, *part) for part in parts]
        return [[a, b] for *_, a, b in sorted(pairs)]

    def _check_reachable(self, found: dict) -> None:
        """Raise :class:`UserError` unless each piece's text is joined to the piece, as ``ignore_merges`` has it."""
        from tokenizers import Tokenizer

        plain = {**found, "pre_tokenizer": None, "normalizer": None, "decoder": None, "added_tokens": []}
        plain["model"] = {**found["model"], "ignore_merges": False}
        joined = Tokenizer.from_str(json.dumps({"version": "1.0", "post_processor": None, **plain}))
        for i, piece in enumerate(self.pieces):
            if piece.kind == NORMAL and joined.encode(piece.text, add_special_tokens=False).ids != [i]:
                raise UserError(
                    f"the tokenizer's piece {piece.text!r} is made of no others, and the model has both pieces defined "
                    "by a user and a space before each text: it cannot be converted exactly."
                )


def read_piece_model(path: Path) -> PieceModel:
    """Read a ``tokenizer.model``. Raises :class:`UserError` for none, and for one that cannot be converted exactly."""
    try:
        _, parts = _message(path.read_bytes())
        pieces = tuple(_piece(part) for part in parts.get(1, ()))
        (trainer, _), (normalizer, tables) = (_message(b"".join(parts.get(number, ()))) for number in (2, 3))
    except (OSError, ValueError, struct.error, IndexError) as error:
        raise UserError(f"{path} is no model of SentencePiece ({one_line(error)}): fetch it again.") from error
    roles = {role: _int32(trainer.get(number, default)) for role, number, default in _ROLES}
    if not pieces:
        raise UserError(f"{path} holds no pieces: fetch it again.")
    faults = (
        (trainer.get(3, 1) != _BPE, "is no BPE"),
        (any(tables.get(2, ())) or any(tables.get(6, ())), "has a normalizer other than identity"),
        (normalizer.get(4, 1), "removes extra spaces"),
        (not normalizer.get(5, 1), "does not escape spaces"),
        (trainer.get(24, 0), "puts spaces behind words"),
        (any(piece.kind == UNUSED for piece in pieces), "has unused pieces"),
        (len({piece.text for piece in pieces}) < len(pieces), "has a piece twice"),
    )
    for wrong, what in faults:
        if wrong:
            raise UserError(f"{path} {what}, which is not converted: tokenize with another tool.")
    return PieceModel(pieces, bool(normalizer.get(3, 1)), bool(trainer.get(35, 0)), roles)


#: Ids of tokens: their fields in the trainer's settings, and what they are by default.
_ROLES = (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2), ("pad_token", 43, -1))


def _piece(message: bytes) -> Piece:
    numbers, parts = _message(message)
    text, score = parts.get(1, [b""])[-1], parts.get(2, [bytes(4)])[-1]
    return Piece(text.decode(), struct.unpack("<f", score)[0], numbers.get(3, NORMAL))


def _message(message: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """Fields of a protobuf message by number: the last of integers, and all of those that are bytes."""
    numbers: dict[int, int] = {}
    parts: dict[int, list[bytes]] = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            numbers[number], at = _varint(message, at)
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"a field of wire type {kind}")
        size, at = _varint(message, at) if kind == _BYTES else (8 if kind == _FIXED64 else 4, at)
        if at + size > len(message):
            raise ValueError("it is cut off")
        parts.setdefault(number, []).append(message[at : at + size])
        at += size
    return numbers, parts


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def _int32(value: int) -> int:
    """Negative ones are written as if they had 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _added(i: int, text: str, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": special}


def _decoders(prefix: bool) -> list[dict]:
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]


def _split_off(texts: Sequence[str]) -> dict:
    """Have these texts stand alone, the longest first."""
    pattern = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
