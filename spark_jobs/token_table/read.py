"""Token tables as inputs: find them, check them by their footers, read them in one common form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from fft.corpus.readers import read_row_groups, schema_of
from fft.corpus.splits import SPLIT, Span, Split, deal
from fft.data.arrow_lists import INTS, int_lists, lists_to_bytes, pack_bytes
from fft.data.delta import split_name
from fft.data.document_ids import as_many, id_lists
from fft.data.footer import Each
from fft.data.known import DATASET, DOC_IDS, GRIDS, IMAGES, LISTS, LOGS, MASK
from fft.data.manifest import MANIFEST_NAME, WRITING_NAME, TokenizerInfo, is_hidden
from fft.data.storage import Storage, address_of, reaching
from fft.data.table import Table
from fft.data.worker_notes import Stoppable, WorkerNotes
from fft.errors import UserError
from fft.images.rules import ImageRules
from spark_jobs.parameters import quoted_column
from spark_jobs.runtime.tasks import create_tasks
from spark_jobs.token_table.engine_table import EngineTable, distinct_names
from spark_jobs.token_table.rows import doc_ids, token_lists

#: Columns that make up a row's content.
CARRIED = (*LISTS, GRIDS, IMAGES)
#: The struct of what goes with documents and is none of their content: a list of texts a row, one a document, each.
BESIDE = "beside"
#: How the engine calls the name under which a row of its tables is placed.
_PLACED_AS = "fft_placed_as"
#: What says of a folder that it is a table.
_SIGNS = {MANIFEST_NAME, WRITING_NAME, "_temporary", *LOGS}
#: Rows that are read, and go to the engine, at once.
_ROWS, _ROWS_WITH_IMAGES = 256, 16


@dataclass(frozen=True)
class Dataset:
    """A token table with the name under which its rows are placed, and columns of texts that are ``kept``."""

    name: str
    table: Table | EngineTable
    kept: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """The columns of texts, one a document, that its rows carry beside ids."""
        return (*((DATASET,) if DATASET in self.table.columns else ()), *self.kept)

    @property
    def path(self) -> str:
        """Where it lies, or the name of a table of a catalog."""
        return self.table.path

    @property
    def names(self) -> list[str]:
        """The datasets of its documents, as far as somebody knows before they are read."""
        if DATASET not in self.table.columns:
            return [self.name]
        return [] if self.table.manifest is None else self.table.manifest.datasets


def refuse_own(names: Sequence[str]) -> None:
    """Raise :class:`UserError` for one among the columns to keep that is kept in any case."""
    own = [name for name in names if name in (*CARRIED, DOC_IDS, DATASET)]
    if own:
        raise UserError(f"`keep` names {own[0]}, which is always kept: leave it out.")


def with_kept(dataset: Dataset) -> Dataset:
    """The same with all columns that its manifest says were kept before."""
    manifest = dataset.table.manifest
    kept = () if manifest is None else tuple(name for name in manifest.kept if name in dataset.table.columns)
    return replace(dataset, kept=kept)


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


def open_named(spark: SparkSession, tables: Sequence[str], beside: Sequence[Dataset]) -> list[Dataset]:
    """Open tables of a catalog, which stand beside others. Raises :class:`UserError` for one that is given twice, and
    for what is no token table."""
    repeated = next((name for name in tables if tables.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"`inputs` names {repeated} more than once: give each table once.")
    names = distinct_names(tables, [dataset.name for dataset in beside])
    return [Dataset(name, EngineTable.open(spark, table)) for name, table in zip(names, tables, strict=True)]


def open_datasets(paths: Sequence[str | Path], each: Each, names: Sequence[str] | None = None) -> list[Dataset]:
    """Open tables under the ``names`` that they are given or, where one is "", under one that depends on where they lie
    only as far as needed to tell them apart; ``each`` reads the footers.

    Raises :class:`UserError` for a table that is given twice, and for what is no finished table.
    """
    folders = [address_of(split_name(str(path))[0]) for path in paths]
    repeated = {path for path in folders if folders.count(path) > 1}
    if repeated:
        raise UserError(f"`inputs` names {min(repeated)} more than once: give each table once.")
    given = [""] * len(folders) if names is None else names
    unnamed, depth = [folder for folder, name in zip(folders, given, strict=True) if not name], 1
    while len({_name(path, depth) for path in unnamed}) < len(unnamed):
        depth += 1
    called = [name or _name(folder, depth) for folder, name in zip(folders, given, strict=True)]
    return [Dataset(name, Table.open(path, each)) for name, path in zip(called, paths, strict=True)]


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
    and ``images`` if any has them, as bytes, too; and :data:`BESIDE`, if any has some of its columns.

    A table without them gets what their absence means: labels equal to the ids, one document a row, no image. Rows
    without ``doc_ids`` are named after a hash of their content. A null list is an empty one. What cannot be read is
    said in ``notes``, which the caller checks; without them it ends the task.
    """
    columns = frozenset().union(*(d.table.columns for d in datasets))
    lists = tuple(name for name in CARRIED if name in columns)
    beside = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.beside))
    schema = row_schema(lists, beside)
    found = [_engine_rows(d, d.table, lists, beside) for d in datasets if isinstance(d.table, EngineTable)]
    spans = [
        Span(dataset.name, "parquet", file, group.index, group.index + 1, group.tokens * 4 + group.image_bytes)
        for dataset in datasets
        if isinstance(dataset.table, Table)
        for file, group in zip(dataset.table.locations, dataset.table.row_groups, strict=True)
    ]
    splits = deal(spans)
    if splits:
        tasks = create_tasks(spark, [split.row() for split in splits], SPLIT, splits[-1].part + 1)
        work = TokenRows(lists, beside)
        found.append(tasks.mapInArrow(work if notes is None else Stoppable(work, notes), schema))
    return reduce(DataFrame.unionAll, found)


def row_schema(lists: Sequence[str], beside: Sequence[str]) -> str:
    """Spark's schema of such rows."""
    columns = ["dataset string", "doc_ids array<string>", *(f"{name} binary" for name in lists)]
    fields = ", ".join(f"{quoted_column(name)}: array<string>" for name in beside)
    return ", ".join([*columns, *([f"{BESIDE} struct<{fields}>"] if beside else [])])


def _engine_rows(dataset: Dataset, table: EngineTable, lists: tuple[str, ...], beside: tuple[str, ...]) -> DataFrame:
    rows = placed_as(table.frame, F.lit(dataset.name), dataset.beside)
    return rows.mapInArrow(ByteRows(lists, beside, dataset.name), row_schema(lists, beside))


def placed_as(df: DataFrame, name: Column, beside: Sequence[str]) -> DataFrame:
    """What :class:`ByteRows` reads of a DataFrame's columns, whose rows are placed under a name."""
    read = [column for column in (*CARRIED, DOC_IDS, MASK, *beside) if column in df.columns]
    return df.select(*(F.col(quoted_column(column)) for column in read), name.alias(_PLACED_AS))


@dataclass(frozen=True)
class TokenRows:
    """A function for ``mapInArrow``: splits of token tables in, rows out."""

    lists: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Read what each split names."""
        for batch in batches:
            for row in batch.to_pylist():
                split = Split(**row)
                there = schema_of(split.path).names
                held = [name for name in (*self.lists, DOC_IDS, MASK, *self.beside) if name in there]
                size = _ROWS_WITH_IMAGES if IMAGES in held else _ROWS
                for rows in read_row_groups(split.path, split.start, split.stop, held, size):
                    names = pa.array([split.dataset] * rows.num_rows, pa.string())
                    yield complete_rows(rows, self.lists, self.beside, names, split.path)


@dataclass(frozen=True)
class ByteRows:
    """A function for ``mapInArrow``: rows of :func:`placed_as` in, the same as rows of bytes out."""

    lists: tuple[str, ...]
    beside: tuple[str, ...] = ()
    where: str = "the DataFrame"

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        for batch in batches:
            names = batch.column(_PLACED_AS).cast(pa.string())
            yield complete_rows(batch, self.lists, self.beside, names, self.where)


def complete_rows(
    rows: pa.RecordBatch, lists: Sequence[str], beside: Sequence[str], names: pa.StringArray, where: str
) -> pa.RecordBatch:
    """Rows of a token table in the form of :func:`read_tokens`: they are placed under one of the ``names`` each.

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
    ids_of = doc_ids(rows, packed["input_ids"], where)
    columns = {"dataset": names, "doc_ids": ids_of, **{name: packed[name] for name in lists}}
    if beside:
        columns[BESIDE] = _texts_beside(rows, beside, ids_of.value_lengths().to_numpy(), names, where)
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _texts_beside(
    rows: pa.RecordBatch, beside: Sequence[str], counts: np.ndarray, names: pa.StringArray, where: str
) -> pa.StructArray:
    """For each column a text for each id of a row: null where nothing is said, of :data:`DATASET` the name instead."""
    lists, nothing = [], pa.nulls(rows.num_rows, pa.string())
    for column in beside:
        found = rows.column(column) if column in rows.schema.names else nothing
        lists.append(as_many(id_lists(found, where, column), counts, names if column == DATASET else nothing))
    return pa.StructArray.from_arrays(lists, list(beside))


def texts_beside(batch: pa.RecordBatch) -> dict[str, pa.ListArray]:
    """The columns of a batch's :data:`BESIDE`, if it has it."""
    if BESIDE not in batch.schema.names:
        return {}
    column = batch.column(BESIDE)
    return {field.name: texts for field, texts in zip(column.type, column.flatten(), strict=True)}


def not_read(datasets: Sequence[Dataset]) -> tuple[dict[str, Any], list[str]]:
    """What of tables is not read, and what is kept beside: for the lineage of what is made of them; and what is not, in
    lines for the user."""
    unread = {d.name: d.table.unread.without(f"column {name}" for name in d.kept) for d in datasets}
    facts = {name: own.facts()["not_read"] for name, own in unread.items() if own.files}
    lines = [line for name, own in unread.items() for line in own.notes(name)]
    for dataset in datasets:
        if any(group.padded is not False for group in dataset.table.row_groups):
            lines.append(f"padding of {dataset.name}, where its {MASK} is 0, was left out")
    kept = list(dict.fromkeys(name for dataset in datasets for name in dataset.kept))
    return ({"not_read": facts} if facts else {}) | ({"kept": kept} if kept else {}), lines


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
