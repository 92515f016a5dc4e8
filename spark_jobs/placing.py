"""Which part and which place in it each row of a token table gets: shuffles, held-out splits, partitions.

Rows come in the form of :func:`spark_jobs.token_table.read.read_tokens`, with lists as bytes, which travel through an
exchange several times faster than arrays.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from fft.data.arrow_lists import bytes_to_lists, unpack_bytes
from fft.data.document_ids import of_rows
from fft.data.known import DATASET, DOC_IDS, GRIDS, IMAGES, LISTS
from spark_jobs.mixing import with_copies
from spark_jobs.runtime.hashing import block_of, is_held_out, row_hash
from spark_jobs.runtime.tasks import to_tasks, without_parts
from spark_jobs.token_table.read import BESIDE, byte_columns, texts_beside

#: Finer buckets balance better: with 64 a partition, the spread stays far below one in a hundred. Of many partitions,
#: whose buckets each hold many documents, fewer do as well, and the driver knows all of them.
_BUCKETS_PER_PARTITION, _FEWEST_PER_PARTITION, _BUCKETS = 64, 8, 1 << 20
#: A table has so many parts at most, until they hold that many tokens or bytes of images: what a task can sort.
_PARTS, _MOST_TOKENS, _MOST_IMAGE_BYTES = 2048, 1 << 28, 1 << 30


def parts_for(tokens: float, image_bytes: float, usual: tuple[int, int], fewest: int) -> int:
    """How many parts a table is written in; ``usual`` are the tokens and bytes of images of one."""
    wanted = math.ceil(max(tokens / usual[0], image_bytes / usual[1]))
    needed = math.ceil(max(tokens / _MOST_TOKENS, image_bytes / _MOST_IMAGE_BYTES))
    return max(min(max(wanted, fewest), _PARTS), needed)


def buckets_for(partitions: int) -> int:
    """How many buckets are dealt to so many partitions."""
    return partitions * max(_FEWEST_PER_PARTITION, min(_BUCKETS_PER_PARTITION, _BUCKETS // partitions))


#: Column that orders rows that differ only in what goes beside them.
_TIE = "tie"
#: What a :class:`RowChoice` counts: rows that stay, those without tokens, and those that equal the one before.
COUNTED_ROWS = ("rows_out", "empty", "duplicates")


@dataclass(frozen=True)
class Shuffling:
    """What decides the rows and the order of a shuffle: ``split`` is "validation" for rows that are held out, any other
    name for those that are not; ``weights`` say how often rows of a dataset occur, once if it is not there."""

    seed: int
    holdout: float
    split: str
    weights: Mapping[str, float]
    dedup: bool

    def place(self, rows: DataFrame, num_block: int, done: Collection[int] = ()) -> DataFrame:
        """The rows of the split, as often as they occur, in ``num_block`` parts; to be in :meth:`order` there. Those of
        parts that are ``done`` are left out."""
        named = rows.transform(_named)
        chosen = named.transform(rows_of_split, self.seed, self.holdout, self.split, self.dedup)
        copied = chosen.transform(with_copies, self.weights, self.seed, F.col("name"))
        return copied.transform(in_seeded_order, self.seed, num_block, self.dedup, done)

    def order(self, rows: DataFrame) -> list[str]:
        """Columns by whose order a part's rows are written."""
        return ["part", "sort_key", *byte_columns(rows), "kept", "dataset", "name", *_tie(rows)]

    def choice(self, rows: DataFrame) -> "RowChoice":
        """Which of the rows stay, of those in order."""
        return RowChoice(tuple(byte_columns(rows)) if self.dedup else ())


def rows_of_split(df: DataFrame, seed: int, holdout: float, split: str, dedup: bool) -> DataFrame:
    """The rows of a split, ``kept``; in the training split of a ``dedup``, the held-out rows too, which are not kept.

    They are sorted before training rows of equal content, which they take with them.
    """
    if not holdout:
        return df.withColumn("kept", F.lit(True))
    held_out = is_held_out(seed, F.col("name"), holdout)
    if split == "validation":
        return df.where(held_out).withColumn("kept", F.lit(True))
    if not dedup:
        return df.where(~held_out).withColumn("kept", F.lit(True))
    return df.withColumn("kept", ~held_out)


def in_seeded_order(
    df: DataFrame, seed: int, num_block: int, by_content: bool = False, done: Collection[int] = ()
) -> DataFrame:
    """Rows in ``num_block`` parts that, one after the other, are in the order of ``sort_key``, a hash of each row.

    The hash covers seed, copy, dataset, document ids and content, so that equal ids lose nothing and tie only when
    the rows are equal. ``by_content`` leaves dataset and ids out of it: equal rows become neighbours. Rows of parts
    that are ``done`` are left out.
    """
    key = [F.col("copy"), *(F.col(name) for name in byte_columns(df))]
    if not by_content:
        key += [F.col("dataset"), F.col("name")]
    placed = df.withColumn("sort_key", row_hash("shuffle", seed, *key))
    numbered = placed.withColumn("part", block_of(F.col("sort_key"), num_block))
    return numbered.transform(without_parts, done).transform(to_tasks, num_block)


@dataclass(frozen=True)
class RowChoice:
    """Which of a part's rows, in order, stay: those that are ``kept``, have tokens and, if ``unique`` names columns, do
    not equal the one before in them."""

    unique: tuple[str, ...] = ()

    def of(self, batch: pa.RecordBatch, before: pa.RecordBatch | None) -> tuple[pa.RecordBatch, dict[str, int]]:
        """The rows of a batch that stay, in the same form, and counts; ``before`` is the row before the first."""
        kept = batch.column("kept").to_numpy(zero_copy_only=False)
        full = pc.greater(pc.binary_length(batch.column("input_ids")), 0).to_numpy(zero_copy_only=False)
        repeated = np.zeros(batch.num_rows, bool)
        if self.unique:
            repeated = full & _equal_to_previous(batch, before, ("sort_key", *self.unique))
        chosen = batch.filter(pa.array(kept & full & ~repeated))
        counts = (chosen.num_rows, int((kept & ~full).sum()), int((kept & repeated).sum()))
        return chosen, dict(zip(COUNTED_ROWS, counts, strict=True))


def _equal_to_previous(batch: pa.RecordBatch, before: pa.RecordBatch | None, columns: Sequence[str]) -> np.ndarray:
    same = np.ones(batch.num_rows, bool)
    same[0] = before is not None and all(batch.column(c)[0] == before.column(c)[0] for c in columns)
    for name in columns:
        column = batch.column(name)
        same[1:] &= pc.equal(column.slice(1), column.slice(0, len(column) - 1)).to_numpy(zero_copy_only=False)
    return same


def as_token_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The columns of a token table, lists of bytes as lists of ids; a document that says no dataset is of the one under
    whose name its row was placed."""
    there = [name for name in (*LISTS, GRIDS, IMAGES) if name in batch.schema.names]
    unpacked = {name: (unpack_bytes if name == IMAGES else bytes_to_lists)(batch.column(name)) for name in there}
    ids = batch.column(DOC_IDS)
    texts = {DOC_IDS: ids, DATASET: of_rows(batch.column("dataset"), ids)} | texts_beside(batch)
    lists = {name: column for name, column in unpacked.items() if name in LISTS}
    columns = lists | texts | unpacked
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _named(df: DataFrame) -> DataFrame:
    """Rows with the ``name`` by which they are placed, and what orders rows that differ in nothing else."""
    named = df.withColumn("name", F.array_join("doc_ids", "\n"))
    return named.withColumn(_TIE, F.to_json(BESIDE)) if BESIDE in df.columns else named


def _tie(df: DataFrame) -> list[str]:
    return [_TIE] if BESIDE in df.columns else []


def _bucket(seed: int, buckets: int) -> Column:
    key = row_hash("bucket", seed, F.array_join("doc_ids", "\n"), F.col("input_ids"))
    return F.pmod(key, F.lit(buckets)).cast("int")


def bucket_tokens(df: DataFrame, seed: int, buckets: int) -> DataFrame:
    """``bucket``, and the ``tokens`` and ``rows`` of each hash bucket."""
    tokens = F.floor(F.length("input_ids") / 4).cast("long")
    return df.groupBy(_bucket(seed, buckets).alias("bucket")).agg(
        F.sum(tokens).alias("tokens"), F.count("*").alias("rows")
    )


def in_partitions(df: DataFrame, assigned: DataFrame, seed: int, buckets: int, num_partition: int) -> DataFrame:
    """Rows in their bucket's part, to be in the order of :func:`partition_order` there; ``assigned`` maps ``bucket`` to
    ``part``."""
    ints = byte_columns(df)
    sort_key = row_hash("partition", seed, F.array_join("doc_ids", "\n"), *(F.col(name) for name in ints))
    placed = df.withColumn("bucket", _bucket(seed, buckets)).join(F.broadcast(assigned), "bucket")
    named = placed.withColumn("sort_key", sort_key).transform(_named)
    beside = [BESIDE, *_tie(df)] if BESIDE in df.columns else []
    return named.select("part", "sort_key", "name", "doc_ids", *ints, *beside).transform(to_tasks, num_partition)


def partition_order(placed: DataFrame) -> list[str]:
    """Columns by whose order a partition's rows are packed."""
    return ["part", "sort_key", "name", *byte_columns(placed), *_tie(placed)]
