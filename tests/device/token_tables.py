"""Token tables, as a job would leave them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_table(
    folder: Path, rows: list[np.ndarray], files: int = 2, row_group_size: int = 16, **columns: list
) -> Path:
    """Write rows of token ids as a Spark job would: some parquet files, several row groups each."""
    folder.mkdir(parents=True, exist_ok=True)
    per_file = -(-len(rows) // files)
    for file in range(files):
        part = slice(file * per_file, (file + 1) * per_file)
        data = {"input_ids": pa.array(rows[part], pa.list_(pa.int32()))}
        for name, values in columns.items():
            data[name] = pa.array(values[part], pa.list_(pa.string() if name == "dataset" else pa.int32()))
        pq.write_table(pa.table(data), folder / f"part-{file:05d}.parquet", row_group_size=row_group_size)
    return folder


def chain(count: int, longest: int, vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """So many documents of 1 to ``longest`` tokens, in which a token leaves two for the next: something to learn."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in rng.integers(1, longest + 1, count):
        ids = [int(rng.integers(vocabulary))]
        while len(ids) < length:
            ids.append((3 * ids[-1] + int(rng.integers(2))) % vocabulary)
        documents.append(np.array(ids, dtype=np.int32))
    return documents
