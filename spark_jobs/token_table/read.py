"""Token tables as inputs: find them, check them by their footers, read them in one common form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from fft.corpus.readers import read_row_groups, schema_of
from fft.corpus.splits import SPLIT, Span, Split, deal
from fft.data.arrow_lists import INTS, int_lists, lists_to_bytes, pack_bytes
from fft.data.delta import split_name
from fft.data.footer import Each
from fft.data.known import DOC_IDS, GRIDS, IMAGES, LISTS, LOGS, MASK
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, TokenizerInfo, is_hidden
from fft.data.storage import Storage, address_of, reaching
from fft.data.table import Table
from fft.data.worker_notes import Stoppable, WorkerNotes
from fft.errors import UserError
from fft.images.rules import ImageRules
from spark_jobs.parameters import is_table_name
from spark_jobs.runtime.tasks import create_tasks
from spark_jobs.token_table.engine_table import EngineTable, distinct_names
from spark_jobs.token_table.rows import doc_ids, token_lists

#: Columns that make up a row's content.
CARRIED = (*LISTS, GRIDS, IMAGES)
#: What says of a folder that it is a table.
_SIGNS = {MANIFEST_NAME, WRITING_NAME, "_temporary", *LOGS}
#: Rows that are read, and go to the engine, at once.
_ROWS, _ROWS_WITH_IMAGES = 256, 16


@dataclass(frozen=True)
class Dataset:
    """A token table with the name under which its rows are placed."""

    name: str
    table: Table | EngineTable

    @property
    def path(self) -> str:
        """Where it lies, or the name of a table of a catalog."""
        return self.table.path


def is_table(place: Storage) -> bool:
    """Parquet files lie directly in it, or a job of ours wrote it (perhaps only began to)."""
    here = place.here()
    return not here.keys().isdisjoint(_SIGNS) or any(name.endswith(".parquet") for name in here)


def _holds_files(place: Storage) -> bool:
    """Parquet files lie in it, or below, as of a table that is partitioned."""
    return any(name.endswith(".parquet") and not is_hidden(PurePosixPath(name)) for name in place.list().sizes)


def find_tables(path: str | Path, parameter: str) -> list[str]:
    """The table at ``path``, which may be a URL, or the tables directly below it, in name order: all folders that hold
    parquet files.

    Raises :class:`UserError`, which names the ``parameter``, when there is none.
    """
    name = str(path)
    if split_name(name)[1] is not None:
        return [name]
    place = Storage.at(name)
    with reaching(name):
        kind = place.info().type
        if kind == fs.FileType.NotFound:
            raise UserError(f"`{parameter}` {name} does not exist: give a token table or a folder of them.")
        if kind == fs.FileType.File or is_table(place):
            return [name]
        found = sorted(place.here().items())
        below = [place.below(one) for one, size in found if size is None and not one.startswith(("_", "."))]
        tables = [folder.name for folder in below if is_table(folder) or _holds_files(folder)]
    if not tables:
        raise UserError(f"`{parameter}` {name} holds no token table: write one with spark_jobs/tokenize.py.")
    return tables


def split_inputs(inputs: str | Path | Sequence[str | Path]) -> tuple[list[str | Path], list[str]]:
    """Inputs that are paths, and those that name tables of a catalog."""
    given = [inputs] if isinstance(inputs, str | Path) else inputs
    return [p for p in given if not is_table_name(p)], [str(p) for p in given if is_table_name(p)]


def open_named(spark: SparkSession, tables: Sequence[str], beside: Sequence[Dataset]) -> list[Dataset]:
    """Open tables of a catalog, which stand beside others. Raises :class:`UserError` for one that is given twice, and
    for what is no token table."""
    repeated = next((name for name in tables if tables.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"`inputs` names {repeated} more than once: give each table once.")
    names = distinct_names(tables, [dataset.name for dataset in beside])
    return [Dataset(name, EngineTable.open(spark, table)) for name, table in zip(names, tables, strict=True)]


def open_datasets(paths: Sequence[str | Path], each: Each) -> list[Dataset]:
    """Open tables under names that depend on where they lie only as far as needed to tell them apart; ``each`` reads
    the footers.

    Raises :class:`UserError` for a table that is given twice, and for what is no finished table.
    """
    folders = [address_of(split_name(str(path))[0]) for path in paths]
    repeated = {path for path in folders if folders.count(path) > 1}
    if repeated:
        raise UserError(f"`inputs` names {min(repeated)} more than once: give each table once.")
    depth = 1
    while len({_name(path, depth) for path in folders}) < len(folders):
        depth += 1
    return [Dataset(_name(folder, depth), Table.open(path, each)) for folder, path in zip(folders, paths, strict=True)]


def _name(address: str, depth: int) -> str:
    return "/".join(PurePosixPath(address).parts[-depth:])


def common_tokenizer(datasets: Sequence[Dataset]) -> TokenizerInfo | None:
    """The tokenizer of all tables that know theirs. Raises :class:`UserError` when they differ."""
    known = {d.name: d.table.manifest.tokenizer for d in datasets if d.table.manifest and d.table.manifest.tokenizer}
    if len({info.sha256 for info in known.values()}) > 1:
        names = ", ".join(f"{name}: {info.name}" for name, info in sorted(known.items()))
        raise UserError(f"the tables were made with different tokenizers ({names}): tokenize them with one.")
    return next(iter(known.values()), None)


def common_vision(datasets: Sequence[Dataset]) -> ImageRules | None:
    """What was made of the tables' images, if any has some. Raises :class:`UserError` when that differs, or when a
    table with images does not say it."""
    known = {}
    for dataset in datasets:
        if dataset.table.has_images:
            manifest = dataset.table.manifest
            if manifest is None or manifest.vision is None:
                raise UserError(
                    f"{dataset.name} has images and no manifest that says what their grids mean: make it with "
                    "spark_jobs/tokenize.py --image_path."
                )
            known[dataset.name] = ImageRules.of(manifest.vision, f"the manifest of {dataset.name}")
    first = next(iter(known), "")
    for name, rules in known.items():
        differing = [key for key, value in rules.facts().items() if value != known[first].facts()[key]]
        if differing:
            raise UserError(
                f"the images of {first} and {name} were read with another {' and '.join(differing)}: tokenize both "
                "with one model and the same limits."
            )
    return known.get(first)


def common_pairs(datasets: Sequence[Dataset]) -> bool:
    """Whether the tables' rows are preferences. Raises :class:`UserError` when those of some are."""
    paired = [d.name for d in datasets if d.table.manifest is not None and d.table.manifest.pairs]
    if paired and len(paired) < len(datasets):
        other = next(dataset.name for dataset in datasets if dataset.name not in paired)
        raise UserError(f"{paired[0]} has preferences, {other} has none: give tables of one kind.")
    return bool(paired)


def read_tokens(spark: SparkSession, datasets: Sequence[Dataset], notes: WorkerNotes | None = None) -> DataFrame:
    """Rows of all tables: ``dataset``, ``doc_ids``, ``input_ids`` as bytes; ``labels``, ``cu_seqlens``, ``image_grids``
    and ``images`` if any has them, as bytes, too.

    A table without them gets what their absence means: labels equal to the ids, one document a row, no image. Rows
    without ``doc_ids`` are named after a hash of their content. A null list is an empty one. What cannot be read is
    said in ``notes``, which the caller checks; without them it ends the task.
    """
    columns = frozenset().union(*(d.table.columns for d in datasets))
    lists = tuple(name for name in CARRIED if name in columns)
    schema = "dataset string, doc_ids array<string>, " + ", ".join(f"{name} binary" for name in lists)
    found = [_engine_rows(d.name, d.table, lists, schema) for d in datasets if isinstance(d.table, EngineTable)]
    spans = [
        Span(dataset.name, "parquet", file, group.index, group.index + 1, group.tokens * 4 + group.image_bytes)
        for dataset in datasets
        if isinstance(dataset.table, Table)
        for file, group in zip(dataset.table.locations, dataset.table.row_groups, strict=True)
    ]
    splits = deal(spans)
    if splits:
        tasks = create_tasks(spark, [split.row() for split in splits], SPLIT, splits[-1].part + 1)
        work = TokenRows(lists)
        found.append(tasks.mapInArrow(work if notes is None else Stoppable(work, notes), schema))
    return reduce(DataFrame.unionAll, found)


def _engine_rows(name: str, table: EngineTable, lists: Sequence[str], schema: str) -> DataFrame:
    there = [F.col(column) for column in (*CARRIED, DOC_IDS, MASK) if column in table.columns]
    return table.frame.select(*there, F.lit(name).alias("dataset")).mapInArrow(ByteRows(tuple(lists), name), schema)


@dataclass(frozen=True)
class TokenRows:
    """A function for ``mapInArrow``: splits of token tables in, rows out."""

    lists: tuple[str, ...]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Read what each split names."""
        for batch in batches:
            for row in batch.to_pylist():
                split = Split(**row)
                there = schema_of(split.path).names
                held = [name for name in (*self.lists, DOC_IDS, MASK) if name in there]
                size = _ROWS_WITH_IMAGES if IMAGES in held else _ROWS
                for rows in read_row_groups(split.path, split.start, split.stop, held, size):
                    yield complete_rows(rows, self.lists, [split.dataset] * rows.num_rows, split.path)


@dataclass(frozen=True)
class ByteRows:
    """A function for ``mapInArrow``: token rows with a column ``dataset`` in, the same as rows of bytes out."""

    lists: tuple[str, ...]
    where: str = "the DataFrame"

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        for batch in batches:
            yield complete_rows(batch, self.lists, batch.column("dataset").to_pylist(), self.where)


def complete_rows(rows: pa.RecordBatch, lists: Sequence[str], names: Sequence[str], where: str) -> pa.RecordBatch:
    """Rows of a token table in the form of :func:`read_tokens`: their dataset has one of the ``names`` each.

    Raises :class:`UserError` naming ``where`` for rows that are none of a token table.
    """
    found = token_lists(rows, where)
    ids = found["input_ids"]
    packed = {name: lists_to_bytes(column, where) for name, column in found.items()}
    if IMAGES in lists:
        packed |= _packed_images(rows, where)
    if "labels" in lists and "labels" not in packed:
        packed["labels"] = packed["input_ids"]
    if "cu_seqlens" in lists and "cu_seqlens" not in packed:
        lengths = ids.value_lengths().to_numpy()
        bounds = np.stack([np.zeros_like(lengths), lengths], axis=1).ravel()
        packed["cu_seqlens"] = lists_to_bytes(int_lists(bounds, np.arange(0, 2 * len(ids) + 1, 2)), where)
    columns = {
        "dataset": pa.array(names, pa.string()),
        "doc_ids": doc_ids(rows, packed["input_ids"], where),
        **{name: packed[name] for name in lists},
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def not_read(datasets: Sequence[Dataset]) -> tuple[dict[str, Any], list[str]]:
    """What of tables is not read: for the lineage of what is made of them, and lines for the user."""
    facts = {d.name: d.table.unread.facts()["not_read"] for d in datasets if d.table.unread.files}
    lines = [line for dataset in datasets for line in dataset.table.unread.notes(dataset.name)]
    for dataset in datasets:
        if any(group.padded is not False for group in dataset.table.row_groups):
            lines.append(f"padding of {dataset.name}, where its {MASK} is 0, was left out")
    return {"not_read": facts} if facts else {}, lines


def _packed_images(rows: pa.RecordBatch, where: str) -> dict[str, pa.BinaryArray]:
    """The columns of images as bytes. Raises :class:`UserError` naming ``where`` for grids of not three numbers."""
    if IMAGES not in rows.schema.names:
        none = pa.array([[]] * rows.num_rows, pa.list_(pa.binary()))
        return {GRIDS: pa.array([b""] * rows.num_rows, pa.binary()), IMAGES: pack_bytes(none)}
    grids = pc.fill_null(rows.column(GRIDS).cast(INTS), pa.scalar([], INTS))
    images = rows.column(IMAGES)
    counts = pc.fill_null(images.value_lengths(), 0).to_numpy()
    if (grids.value_lengths().to_numpy() != 3 * counts).any() or pc.list_flatten(images).null_count:
        raise UserError(f"{where}: {GRIDS} must hold three numbers for each of {IMAGES}: write the table again.")
    return {GRIDS: lists_to_bytes(grids, where), IMAGES: pack_bytes(images)}


def byte_columns(df: DataFrame) -> list[str]:
    """The columns of a row's content, each as bytes: lists of int32, and images."""
    return [name for name in CARRIED if name in df.columns]
