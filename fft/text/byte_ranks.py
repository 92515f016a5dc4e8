"""tiktoken's files of ranks (``qwen.tiktoken``) as ``tokenizer.json``: same ids, without the package tiktoken."""

import base64
from pathlib import Path

from fft.errors import UserError
from fft.text.engines import byte_level_alphabet


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are their ids. Raises :class:`UserError` for a file that is not of that kind."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no lines of a token in base64 and a rank ({error}): fetch it again.") from error
    if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} does not rank each token once, all 256 bytes among them: fetch it again.")
    return ranks


def ranked_tokenizer(ranks: dict[bytes, int], pattern: str, normalizer: dict | None) -> dict:
    """As the content of ``tokenizer.json``: byte-level BPE over the matches of ``pattern``, without special tokens."""
    letters = {byte: letter for letter, byte in byte_level_alphabet().items()}
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [[written[a], written[b]] for *_, a, b in sorted(pairs)]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a match that is a token is not made of parts
            "vocab": {written[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
