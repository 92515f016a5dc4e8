"""Preferences of random tokens, as a table of the job's would have them."""

from pathlib import Path

import numpy as np
from device.token_tables import write_table

from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest

Side = tuple[list[int], list[int]]


def random_pairs(count: int, vocabulary: int, seed: int = 0, longest: int = 12) -> list[tuple[Side, Side]]:
    """So many pairs of (ids, labels): a prompt that both begin with, and what follows it."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(0, vocabulary, rng.integers(1, 6)).tolist()
        answers = [rng.integers(0, vocabulary, rng.integers(1, longest)).tolist() for _ in range(2)]
        pairs.append(tuple((prompt + answer, [-100] * len(prompt) + answer) for answer in answers))
    return pairs


def write_pairs(
    folder: Path, pairs: list[tuple[Side, Side]], files: int = 2, datasets: list[str] | None = None
) -> Path:
    """A table of them, a pair a row; with names of ``datasets``, one a pair, which its manifest counts."""
    rows = [np.array(chosen[0] + rejected[0], np.int32) for chosen, rejected in pairs]
    labels = [chosen[1] + rejected[1] for chosen, rejected in pairs]
    bounds = [[0, len(chosen[0]), len(chosen[0]) + len(rejected[0])] for chosen, rejected in pairs]
    named = {} if datasets is None else {"dataset": [[name] * 2 for name in datasets]}
    table = write_table(folder, rows, files, labels=labels, cu_seqlens=bounds, **named)
    written = tuple(FileInfo(p.name, 0, 0, p.stat().st_size) for p in sorted(table.glob("*.parquet")))
    counts = {name: {"rows": datasets.count(name)} for name in datasets or ()}
    lineage = {"counts": {"datasets": counts}}
    commit(table, Manifest(written, len(rows), sum(map(len, rows)), pairs=True, lineage=lineage))
    return table
