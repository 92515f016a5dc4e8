"""Random numbers that belong to a token of a run's order, or to a column of a matrix, whoever asks for them.

Nothing is drawn one after the other: a number is a hash of what it is for, so that no layout, no recomputation and no
resumption draws another.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def token_draws(seed: int, samples: Sequence[int], starts: Sequence[int], tokens: int) -> np.ndarray:
    """An odd number of 32 bits, as int64 [tokens], for every token of a row: by ``seed``, sample and place in it.

    ``samples``, by their numbers in the run's order, begin at ``starts``; the last has the tokens that are left.
    """
    places, bases = np.empty(tokens, dtype=np.uint64), np.empty(tokens, dtype=np.uint64)
    own = _mixed(np.asarray(samples, dtype=np.uint64) + _mixed(np.array([seed], dtype=np.uint64)))
    for base, start, stop in zip(own, starts, [*starts[1:], tokens], strict=True):
        bases[start:stop], places[start:stop] = base, np.arange(stop - start, dtype=np.uint64)
    return _odd(_mixed(bases + places)).astype(np.int64)


def column_draws(name: str, columns: int) -> np.ndarray:
    """An odd number of 32 bits, as int32 [columns], for every column of the matrix of this name."""
    own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return _odd(_mixed(np.arange(columns, dtype=np.uint64) + np.array([own], dtype=np.uint64)))


def _odd(mixed: np.ndarray) -> np.ndarray:
    return ((mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)).view(np.int32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Each number's own random one (SplitMix64)."""
    x = (x + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))
