"""What the footer of a parquet file says of a token table's rows, without a look at them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from fft.data.known import GRIDS, IMAGES, LISTS, MASK, REFUSED
from fft.errors import UserError, one_line

T = TypeVar("T")
#: How many files are asked the same, and answer in their order: :func:`each_of`, or what does it elsewhere.
Each = Callable[[Callable[[str], Any], Sequence[str]], Iterable[Any]]

#: Files that are asked at once, as many as a store's client has connections; and answers that wait for their turn.
_AT_ONCE, _AHEAD = 24, 1024


def each_of(ask: Callable[[str], T], paths: Sequence[str]) -> Iterator[T]:
    """What ``ask`` says of each file, in their order; many are asked at once, since storages take a while to answer."""
    with ThreadPoolExecutor(min(_AT_ONCE, len(paths)) or 1) as pool:
        for first in range(0, len(paths), _AHEAD):
            yield from pool.map(ask, paths[first : first + _AHEAD])


@dataclass(frozen=True)
class RowGroup:
    """Where a row group lies and how large it is: rows, tokens, and bytes of the compressed ids, as its footer says.

    ``trained`` is false where no label is trained on. ``padded`` says whether an attention mask has other values than
    1; it is None where the footer does not tell, so that rows must be looked at. ``image_bytes`` are those of images.
    """

    path: str
    index: int
    rows: int
    tokens: int
    bytes: int
    trained: bool = True
    padded: bool | None = False
    image_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.path}, row group {self.index}"

    def columns(self, names: Sequence[str], filesystem: FileSystem | None) -> pa.Table:
        """What it has of columns of these names, as they are."""
        with pq.ParquetFile(self.path, filesystem=filesystem) as file:
            return file.read_row_group(self.index, columns=[*names])


@dataclass(frozen=True)
class Footer:
    """The footer of a parquet file, whose paths are those of a file system."""

    path: str
    metadata: pq.FileMetaData

    @classmethod
    def read(cls, path: str, filesystem: FileSystem) -> "Footer":
        """Raises :class:`UserError` for what is no parquet file of a token table that is understood."""
        try:
            metadata = pq.read_metadata(path, filesystem=filesystem)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            said = one_line(error)
            raise UserError(f"{path} is no readable parquet file ({said}): write it again or remove it.") from error
        footer = cls(path, metadata)
        footer._check()
        return footer

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns and their types."""
        return self.metadata.schema.to_arrow_schema()

    def _check(self) -> None:
        check_names(self.schema.names, self.path)
        if "input_ids" not in self.schema.names:
            raise UserError(
                f"{self.path} has no column input_ids (it has {', '.join(sorted(self.schema.names))}): "
                "make a token table with spark_jobs/tokenize.py first."
            )
        for column in (c for c in (*LISTS, MASK, GRIDS) if c in self.schema.names):
            kind, bools = self.schema.field(column).type, column == MASK
            if not (_is_list(kind) and (pa.types.is_integer(kind.value_type) or _is_bool(kind.value_type, bools))):
                remedy = "write the table again" if column == "input_ids" else "drop or rename it"
                raise UserError(f"{self.path}: column {column} is {kind}, it must be a list of integers: {remedy}.")
        self._check_images()
        for column in self.schema.names:
            if column in REFUSED:
                raise UserError(f"{self.path} has a column {column}, which is not read: {REFUSED[column]}.")

    def _check_images(self) -> None:
        there = [column for column in (IMAGES, GRIDS) if column in self.schema.names]
        if len(there) == 1:
            (lacking,) = {IMAGES, GRIDS}.difference(there)
            raise UserError(
                f"{self.path} has a column {there[0]} and none {lacking}, without which it is not read: make the table "
                "with spark_jobs/tokenize.py --image_path."
            )
        kind = self.schema.field(IMAGES).type if there else None
        if kind is not None and not (_is_list(kind) and _is_bytes(kind.value_type)):
            raise UserError(f"{self.path}: column {IMAGES} is {kind}, it must be a list of binary: drop or rename it.")

    @cached_property
    def _leaves(self) -> dict[str, int]:
        """The number of a column's first leaf: names of leaves do not tell, ``a.b`` may be either."""
        counts = [_leaves_of(field.type) for field in self.schema]
        if sum(counts) != self.metadata.num_columns:
            raise UserError(f"{self.path} has columns of types that are not understood: write it again without them.")
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        return dict(zip(self.schema.names, firsts, strict=True))

    def row_groups(self, indices: Iterable[int] | None = None) -> list[RowGroup]:
        """Those of the row groups that are there, by default all."""
        there = range(self.metadata.num_row_groups if "input_ids" in self._leaves else 0)
        return [self._row_group(index) for index in (there if indices is None else indices) if index in there]

    def _row_group(self, index: int) -> RowGroup:
        group = self.metadata.row_group(index)
        leaf = {name: group.column(self._leaves[name]) for name in (*LISTS, MASK, IMAGES) if name in self._leaves}
        ids = leaf["input_ids"]
        _, most = _range(leaf.get("labels"))
        padded = None if MASK in leaf else False
        if MASK in leaf and leaf[MASK].num_values == ids.num_values and None not in _range(leaf[MASK]):
            ones = _range(leaf[MASK]) == (1, 1)
            padded = None if ones and leaf[MASK].statistics.null_count != 0 else not ones
        return RowGroup(
            self.path,
            index,
            group.num_rows,
            ids.num_values,
            ids.total_compressed_size,
            most is None or most >= 0,
            padded,
            leaf[IMAGES].total_compressed_size if IMAGES in leaf else 0,
        )


def row_groups_of(path: str, filesystem: FileSystem) -> tuple[list[str], list[RowGroup]]:
    """Columns and row groups of a file. Raises :class:`UserError` as :meth:`Footer.read`."""
    footer = Footer.read(path, filesystem)
    return footer.schema.names, footer.row_groups()


def check_names(names: Iterable[str], where: str) -> None:
    """Raise :class:`UserError` when several columns of ``where`` have one name: which is meant cannot be told."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{where} has more than one column {repeated[0]}: rename all but one.")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_bool(kind: pa.DataType, allowed: bool) -> bool:
    return allowed and pa.types.is_boolean(kind)


def _leaves_of(kind: pa.DataType) -> int:
    """Columns of numbers or bytes of which parquet makes one of this type."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return sum(_leaves_of(kind.field(i).type) for i in range(kind.num_fields)) if kind.num_fields else 1


def _range(leaf: pq.ColumnChunkMetaData | None) -> tuple[int | None, int | None]:
    """The least and the largest value, as far as they were written down."""
    statistics = leaf.statistics if leaf is not None and leaf.is_stats_set else None
    if statistics is None or not statistics.has_min_max:
        return None, None
    return int(statistics.min), int(statistics.max)
