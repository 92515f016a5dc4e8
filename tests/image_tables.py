"""Small token tables with images, made without Spark: every document can be told by its first token."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fft.data.commits import commit
from fft.data.manifest import FileInfo, Manifest
from fft.data.table import Table
from fft.images.grids import grid_of, tokens_of
from fft.images.rules import ImageRules

IMAGE, START, END = 7, 5, 6
GRID_RULES = ImageRules("qwen2_vl", 4, 2, 2, IMAGE, START, END, min_pixels=64, max_pixels=640)
TILE_RULES = ImageRules("internvl", 4, 2, 1, IMAGE, START, END, tile=8, min_tiles=1, max_tiles=4)


@dataclass(frozen=True)
class Document:
    """Ids, and the images among them: bytes and grids."""

    ids: list[int]
    files: list[bytes]
    grids: list[tuple[int, int, int]]


def png(rng, width, height):
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def document(rng, rules, number, most_images=3):
    """Begins with the token 100 + number; its images stand anywhere after it, also side by side."""
    ids, files, grids = [100 + number], [], []
    for _ in range(int(rng.integers(0, most_images + 1))):
        ids += rng.integers(10, 100, int(rng.integers(0, 3))).tolist()
        width, height = rng.integers(1, 30, 2).tolist()
        grids.append(grid_of(rules, width, height))
        files.append(png(rng, width, height))
        ids += [START] * int(rng.integers(0, 2)) + [IMAGE] * tokens_of(rules, grids[-1])
    ids += rng.integers(10, 100, int(rng.integers(0, 4))).tolist()
    return Document(ids, files, grids)


def rows_table(rows):
    """The columns of rows of documents."""
    ids = [[token for document in row for token in document.ids] for row in rows]
    lists = {
        "input_ids": ids,
        "cu_seqlens": [[0, *np.cumsum([len(document.ids) for document in row]).tolist()] for row in rows],
        "image_grids": [[n for document in row for grid in document.grids for n in grid] for row in rows],
    }
    columns = {name: pa.array(values, pa.list_(pa.int32())) for name, values in lists.items()}
    columns["doc_ids"] = pa.array([[f"d{document.ids[0] - 100}" for document in row] for row in rows])
    files = [[file for document in row for file in document.files] for row in rows]
    return pa.table(columns | {"images": pa.array(files, pa.list_(pa.binary()))})


def write_rows(folder, table, rules, seq_len=None, row_group_size=3):
    """A table of such columns, with ``rules`` in its manifest if it has images."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    path = folder / "part-0.parquet"
    pq.write_table(table, path, row_group_size=row_group_size)
    tokens = sum(map(len, table["input_ids"].to_pylist()))
    files = (FileInfo(path.name, table.num_rows, tokens, path.stat().st_size),)
    vision = rules.facts() if "images" in table.column_names else None
    commit(folder, Manifest(files, table.num_rows, tokens, seq_len=seq_len, vision=vision))
    return Table.open(folder)


def packed_rows(rng, rules, seq_len, count, first=0):
    """Rows of at most ``seq_len`` tokens, filled with documents from number ``first`` on."""
    rows, number = [], first
    while len(rows) < count:
        row, left = [], seq_len
        while len(rows) < count:
            one = document(rng, rules, number)
            if len(one.ids) > seq_len:
                continue
            number += 1
            if len(one.ids) > left:
                rows.append(row)
                row, left = [one], seq_len - len(one.ids)
            else:
                row.append(one)
                left -= len(one.ids)
    return rows
