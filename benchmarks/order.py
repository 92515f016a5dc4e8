"""How well an epoch's order is shuffled: ours, a full permutation, and the schemes of other loaders.

python -m benchmarks.order            # a table of 1,024 row groups of 1,024 rows in 16 files, in a few seconds

The others' schemes are restated here in a few lines each, so that none need be installed: MosaicML streaming's py1e
(shards in random order, each sample moved at random within a block of 262,144), Hugging Face's buffer (files in random
order, a sample drawn from the 10,000 rows read ahead), litdata's (chunks of 64 MB, 8,192 rows of 2,048 tokens, in
random order, each shuffled inside).
"""

import numpy as np

from fft.console import format_table
from fft.data.order import EpochOrder, lanes_for

GROUPS, ROWS, FILES, BATCH = 1024, 1024, 16, 256
TOTAL = GROUPS * ROWS


def main() -> None:
    """Print a table, a row for each scheme."""
    lines = [[name, *quality(order)] for name, order in orders(np.random.default_rng(0)).items()]
    print(f"{TOTAL:,} rows in {GROUPS:,} row groups and {FILES} files; batches of {BATCH}")
    print(
        format_table(("scheme", "rank correlation", "median apart %", "1 in 20 within %", "row groups a batch"), lines)
    )


def orders(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """For each scheme the rows of the table (by place) in the order in which an epoch has them."""
    buffer = buffered(blocks(rng, TOTAL // FILES), 10_000, rng)
    return {
        "fft, 32 lanes": ours(32),
        "fft, 128 lanes": ours(128),
        "full permutation": rng.permutation(TOTAL),
        "mosaic py1e": moved(blocks(rng, ROWS), 262_144 - ROWS, rng),
        "datasets buffer": buffer,
        "litdata": np.concatenate([rng.permutation(b) for b in blocks(rng, 8192).reshape(-1, 8192)]),
    }


def ours(lanes: int) -> np.ndarray:
    """The order of samples that are rows."""
    order = EpochOrder(np.full(GROUPS, ROWS), seed=0, epoch=0, lanes=lanes_for(GROUPS, TOTAL, lanes))
    inside = [order.row_order(group, ROWS) for group in range(GROUPS)]
    return np.array([g * ROWS + inside[g][at] for ((g, at, _),) in order.spans(np.arange(TOTAL))])


def blocks(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Files, shards or chunks of so many rows in random order."""
    return rng.permutation(np.arange(TOTAL).reshape(-1, rows)).ravel()


def moved(rows: np.ndarray, by: int, rng: np.random.Generator) -> np.ndarray:
    """Every row moved at random by up to half of ``by`` in either direction."""
    return rows[np.argsort(np.arange(TOTAL) + rng.uniform(-by / 2, by / 2, TOTAL))]


def buffered(rows: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Every row goes into a random place of a buffer, for the row that comes out."""
    buffer, out = rows[:size].copy(), []
    for row, place in zip(rows[size:], rng.integers(0, size, TOTAL - size), strict=True):
        out.append(buffer[place])
        buffer[place] = row
    return np.concatenate([out, rng.permutation(buffer)])


def quality(order: np.ndarray) -> list[float]:
    """Correlation of place in table and epoch; how far neighbours of the table are apart; row groups of a batch."""
    at = np.empty(TOTAL, np.int64)
    at[order] = np.arange(TOTAL)
    apart = np.abs(np.diff(at)) / TOTAL * 100
    groups = [len(np.unique(batch)) for batch in (order // ROWS).reshape(-1, BATCH)]
    correlation = float(np.corrcoef(np.arange(TOTAL), at)[0, 1])
    return [f"{correlation:+.3f}", f"{np.median(apart):.2f}", f"{np.quantile(apart, 0.05):.3f}", np.mean(groups)]


if __name__ == "__main__":
    main()
