"""Sums over what is predicted, by dataset: which document is of which, and what a dataset's documents add up to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fft.data.document_ids import as_many, id_lists
from fft.data.known import DATASET
from fft.data.lengths import document_lengths, documents_by_row
from fft.data.table import Rows, Table
from fft.errors import UserError

#: What documents are counted under that say of no dataset.
UNNAMED = "unnamed"


@dataclass(frozen=True)
class DatasetBatch:
    """Of a micro-batch: int32 ``documents`` [tokens] says in which document a token is (what is blank may have any
    number), int32 ``numbers`` [documents] of which dataset that is.
    """

    documents: np.ndarray
    numbers: np.ndarray


def dataset_names(table: Table) -> list[str]:
    """The names of the datasets that a table's documents are of, in order; none of a table without such a column.

    Reads the whole column. Raises :class:`UserError` where it holds no names.
    """
    return sorted({name or UNNAMED for texts in _columns(table) for name in pc.unique(texts).to_pylist()})


def counted_names(table: Table) -> list[str]:
    """The names of the datasets of which a table's manifest counts tokens, in order; none where the table does not say
    of which its documents are.
    """
    if table.manifest is None or DATASET not in table.columns:
        return []
    return sorted({name or UNNAMED for name in table.manifest.datasets})


def whole_datasets(tables: Sequence[Table]) -> dict[str, str]:
    """By source, of several tables, those that are a dataset as a whole, since they count none: their names are what
    tells their paths from the others'.
    """
    paths = list(dict.fromkeys(table.source for table in tables))
    if len(paths) < 2:
        return {}
    names = dict(zip(paths, _distinguished(paths), strict=True))
    return {table.source: names[table.source] for table in tables if not counted_names(table)}


def _distinguished(paths: Sequence[str]) -> list[str]:
    """Paths without the parts that all begin, and those that all end with."""
    parts = [path.rstrip("/").split("/") for path in paths]
    first = sum(1 for _ in takewhile(lambda own: len(set(own)) == 1, zip(*parts, strict=False)))
    parts = [own[first:] for own in parts]
    last = sum(1 for _ in takewhile(lambda own: len(set(own)) == 1, zip(*map(reversed, parts), strict=False)))
    return ["/".join(own[: len(own) - last]) or path for own, path in zip(parts, paths, strict=True)]


def _columns(table: Table) -> Iterator[pa.Array]:
    wanted = [name for name in (DATASET, "cu_seqlens") if name in table.columns]
    for where in table.row_groups if DATASET in wanted else ():
        yield _of_documents(where.columns(wanted, table.filesystem), str(where))


def _of_documents(rows: pa.Table, where: str) -> pa.Array:
    """What each document says, also those without a token."""
    lists = id_lists(rows.column(DATASET).combine_chunks(), where, DATASET)
    return as_many(lists, documents_by_row(rows), pa.array([UNNAMED] * len(rows), pa.string())).flatten()


def dataset_numbers(rows: pa.Table, names: Sequence[str], where: str) -> np.ndarray:
    """Of the documents that have tokens, the number of their dataset among ``names``, which are all: int32 [documents].

    Raises :class:`UserError`, naming a row group, where the column holds no names, or others.
    """
    texts = pc.replace_with_mask(found := _of_documents(rows, where), pc.equal(found, ""), pa.scalar(UNNAMED))
    indices = pc.index_in(texts, value_set=pa.array(names, pa.string()))
    if indices.null_count:
        other = texts.filter(pc.is_null(indices))[0].as_py()
        raise UserError(
            f"{where} has the dataset {other!r}, which the table's manifest does not count: write it again."
        )
    numbers = indices.to_numpy().astype(np.int32)
    return numbers[document_lengths(rows) > 0] if "cu_seqlens" in rows.column_names else numbers


def datasets_within(rows: Rows, row: int, start: int, stop: int) -> np.ndarray:
    """The numbers of the datasets of the documents in tokens [start, stop) of a row, as many as
    :meth:`Rows.document_ends` has ends there.
    """
    if rows.datasets is None:
        raise ValueError("rows come without the numbers of their datasets")
    if rows.ends is None or rows.end_offsets is None:
        return rows.datasets[row : row + 1]
    begin, end = rows.end_offsets[row : row + 2]
    ends = rows.ends[begin:end]
    first, last = ends.searchsorted(start, "right"), ends.searchsorted(stop, "left")
    return rows.datasets[begin + first : begin + last + 1]


def summed(values: np.ndarray, numbers: np.ndarray, datasets: int) -> np.ndarray:
    """The sum of documents' ``values`` for each of so many datasets, float64 [datasets]."""
    return np.bincount(numbers, values.astype(np.float64), datasets)
