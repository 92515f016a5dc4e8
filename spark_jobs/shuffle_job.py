"""The shuffle job: rows of many tables into one global seeded order, and a held-out split."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from fft.console import format_table, say
from fft.corpus.accounts import finished_manifest, lineage_of, timing_of
from fft.data.arrow_lists import bytes_to_lists, unpack_bytes
from fft.data.known import DOC_IDS, GRIDS, IMAGES, LISTS
from fft.data.manifest import Manifest
from fft.data.part_files import PartFile, PartFolder, by_dataset, dataset_tallies, sum_tallies
from fft.errors import UserError
from spark_jobs.mixing import check_weights, with_copies
from spark_jobs.parameters import check_parameters
from spark_jobs.runtime.hashing import block_of, is_held_out, row_hash
from spark_jobs.runtime.session import get_session, job_settings
from spark_jobs.runtime.tasks import by_part, part_to_row, to_tasks
from spark_jobs.token_table.output import Output, local_path, local_paths
from spark_jobs.token_table.read import (
    Dataset,
    byte_columns,
    common_tokenizer,
    common_vision,
    find_tables,
    not_read,
    open_datasets,
    read_tokens,
)
from spark_jobs.token_table.writer import TableWriter

_TOKENS_PER_BLOCK = 1 << 23
#: Of images, a few times what a process may hold, as Sail's sort does.
_IMAGE_BYTES_PER_BLOCK = 1 << 28
_BLOCKS = (8, 2048)


def shuffle_tables(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    seed: int = 0,
    num_block: int | None = None,
    weights: Mapping[str, float] | None = None,
    dedup: bool = False,
    holdout: float = 0.0,
    table_format: str = "parquet",
    overwrite: bool = False,
    spark: SparkSession | None = None,
) -> dict[str, Manifest]:
    """Write the rows of all input tables to ``output`` in an order that depends on their content and ``seed`` alone.

    With ``holdout`` > 0, ``output`` gets the tables ``train`` and ``validation``: about that share of the document
    ids, and all their rows, are held out. ``weights`` (by name of the table's folder) say how often a row of the
    training table occurs; held-out rows occur once, or not at all where the weight is 0. ``dedup`` leaves out rows
    whose content occurred before, and training rows whose content is held out.

    ``table_format`` is "parquet" or "delta"; an ``overwrite`` of a Delta table adds a version.
    Returns the manifests by table name ("" without a split). Raises :class:`UserError` for inputs that are no finished
    token tables and for a split that leaves a side empty. ``spark`` is by default the active session.
    """
    check_parameters(locals())
    folder = local_path(output, "output")
    paths = [table for path in local_paths(inputs, "inputs") for table in find_tables(path, "inputs")]
    datasets = open_datasets(paths)
    tokenizer, vision = common_tokenizer(datasets), common_vision(datasets)
    facts = None if vision is None else vision.facts()
    if holdout and any("cu_seqlens" in d.table.columns for d in datasets):
        raise UserError("`holdout` needs whole documents, but a table is packed: hold out before repartition.py packs.")
    mixing = Mixing(seed, num_block, holdout, check_weights(weights or {}, [d.name for d in datasets]), dedup)
    left_out, notes_left = not_read(datasets)
    lineage = lineage_of("shuffle", [dataset.table.origin for dataset in datasets], asdict(mixing)) | left_out
    # The small side first: a split that leaves it empty is found before the work.
    shares = {"validation": holdout, "train": 1 - holdout} if holdout else {"": 1.0}
    table = Output(folder, list(shares), paths, overwrite, table_format)
    table.check()
    spark = spark or get_session("shuffle")
    start = time.monotonic()
    with table.claim(lineage) as writers, job_settings(spark):
        notes = next(iter(writers.values())).target.notes
        rows = read_tokens(spark, datasets, notes).withColumn("name", F.array_join("doc_ids", "\n"))
        for name, share in shares.items():
            _write_split(writers[name], rows, datasets, name, share, mixing)
        counts = _counts(writers.values(), datasets, mixing)
        timing = timing_of(start, sum(writer.tokens for writer in writers.values()))
        manifests = {}
        for name, writer in writers.items():
            own = counts | {"datasets": by_dataset([dataset.name for dataset in datasets], writer.tallies)}
            manifests[name] = finished_manifest(
                writer.parts, lineage, own, timing, tokenizer, _seq_len(datasets), seed, facts
            )
            writers[name].finish(manifests[name])
    _say_results(manifests, counts, folder, notes_left)
    return manifests


@dataclass(frozen=True)
class Mixing:
    """What decides the order; see :func:`shuffle_tables`. ``weights`` has all tables."""

    seed: int
    num_block: int | None
    holdout: float
    weights: dict[str, float]
    dedup: bool


def _write_split(
    writer: TableWriter, rows: DataFrame, datasets: Sequence[Dataset], name: str, share: float, mixing: Mixing
) -> None:
    weights = mixing.weights
    if name == "validation":  # held-out rows occur once: repeating them would only make an evaluation slower
        weights = {dataset: float(weight > 0) for dataset, weight in weights.items()}
    chosen = rows.transform(rows_of_split, mixing.seed, mixing.holdout, name, mixing.dedup)
    copied = chosen.transform(with_copies, weights, mixing.seed, F.col("name"))
    tokens = sum(dataset.table.tokens * weights[dataset.name] for dataset in datasets)
    image_bytes = sum(dataset.table.image_bytes * weights[dataset.name] for dataset in datasets)
    blocks = _blocks(mixing.num_block, share, tokens, image_bytes)
    placed = copied.transform(in_seeded_order, mixing.seed, blocks, mixing.dedup)
    work = WriteRows(writer.target, tuple(byte_columns(rows)) if mixing.dedup else ())
    order = ["part", "sort_key", *byte_columns(rows), "kept", "dataset", "name"]
    writer.write(placed, work, order, blocks, f"shuffle {name}".strip(), int(tokens * share))
    if not writer.files:
        if not mixing.holdout:
            raise UserError(f"`inputs` leaves no row for the output: all {_rows(datasets)} are without tokens.")
        raise UserError(
            f"`holdout` {mixing.holdout} leaves no row for {name}: {_rows(datasets)} rows are too few; give another "
            "share."
        )


def _counts(writers: Iterable[TableWriter], datasets: Sequence[Dataset], mixing: Mixing) -> dict[str, Any]:
    tallies = sum_tallies([part for writer in writers for part in writer.parts])
    counts = {"rows_in": _rows(datasets)} | {name: tallies[name] for name in ("rows_out", "empty", "duplicates")}
    weighted = any(weight != 1 for weight in mixing.weights.values())
    if not weighted and counts["rows_in"] != counts["rows_out"] + counts["empty"] + counts["duplicates"]:
        raise UserError(f"rows in and out differ ({counts}): an input changed while it was read; run again.")
    return counts


def _rows(datasets: Sequence[Dataset]) -> int:
    return sum(dataset.table.rows for dataset in datasets)


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


def in_seeded_order(df: DataFrame, seed: int, num_block: int, by_content: bool = False) -> DataFrame:
    """Rows in ``num_block`` parts that, one after the other, are in the order of ``sort_key``, a hash of each row.

    The hash covers seed, copy, dataset, document ids and content, so that equal ids lose nothing and tie only when
    the rows are equal. ``by_content`` leaves dataset and ids out of it: equal rows become neighbours. Lists are
    bytes, which travel through the exchange several times faster than arrays.
    """
    key = [F.col("copy"), *(F.col(name) for name in byte_columns(df))]
    if not by_content:
        key += [F.col("dataset"), F.col("name")]
    placed = df.withColumn("sort_key", row_hash("shuffle", seed, *key))
    return placed.withColumn("part", block_of(F.col("sort_key"), num_block)).transform(to_tasks, num_block)


@dataclass(frozen=True)
class WriteRows:
    """A function for ``mapInArrow``: sorted rows of parts in; files written.

    Left out are rows that are not ``kept``; and, counted, empty rows and, if ``unique`` names columns, rows that equal
    the one before in them.
    """

    target: PartFolder
    unique: tuple[str, ...] = ()

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Write all parts of a task."""
        for part, rows in by_part(batches):
            tallies: Counter[str] = Counter()
            before = None
            with PartFile(self.target, part) as sink:
                for batch in rows:
                    chosen, counts = self._choose(batch, before)
                    before = batch.slice(batch.num_rows - 1)
                    tallies.update(counts)
                    if chosen.num_rows:
                        sink.write(as_token_rows(chosen))
                done = sink.finish(tallies)
            yield part_to_row(done)

    def _choose(self, batch: pa.RecordBatch, before: pa.RecordBatch | None) -> tuple[pa.RecordBatch, dict[str, int]]:
        kept = batch.column("kept").to_numpy(zero_copy_only=False)
        full = pc.greater(pc.binary_length(batch.column("input_ids")), 0).to_numpy(zero_copy_only=False)
        repeated = np.zeros(batch.num_rows, bool)
        if self.unique:
            repeated = full & _equal_to_previous(batch, before, ("sort_key", *self.unique))
        chosen = batch.filter(pa.array(kept & full & ~repeated))
        counts = {
            "rows_out": chosen.num_rows,
            "empty": int((kept & ~full).sum()),
            "duplicates": int((kept & repeated).sum()),
        }
        return chosen, {**counts, **_per_dataset(chosen)}


def _equal_to_previous(batch: pa.RecordBatch, before: pa.RecordBatch | None, columns: Sequence[str]) -> np.ndarray:
    same = np.ones(batch.num_rows, bool)
    same[0] = before is not None and all(batch.column(c)[0] == before.column(c)[0] for c in columns)
    for name in columns:
        column = batch.column(name)
        same[1:] &= pc.equal(column.slice(1), column.slice(0, len(column) - 1)).to_numpy(zero_copy_only=False)
    return same


def as_token_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The columns of a token table, lists of bytes as lists of ids."""
    names = [name for name in (*LISTS, DOC_IDS, GRIDS, IMAGES) if name in batch.schema.names]
    unpacked = {DOC_IDS: lambda column: column, IMAGES: unpack_bytes}
    columns = [unpacked.get(name, bytes_to_lists)(batch.column(name)) for name in names]
    return pa.RecordBatch.from_arrays(columns, names)


def _per_dataset(batch: pa.RecordBatch) -> dict[str, int]:
    counts = {}
    bytes_ = pc.binary_length(batch.column("input_ids"))
    for dataset in pc.unique(batch.column("dataset")).to_pylist():
        own = bytes_.filter(pc.equal(batch.column("dataset"), dataset))
        counts |= dataset_tallies(dataset, len(own), pc.sum(own).as_py() // 4)
    return counts


def _blocks(num_block: int | None, share: float, tokens: float, image_bytes: float) -> int:
    if num_block is None:
        low, high = _BLOCKS
        wanted = math.ceil(max(tokens / _TOKENS_PER_BLOCK, image_bytes / _IMAGE_BYTES_PER_BLOCK))
        num_block = min(max(wanted, low), high)
    return max(1, math.ceil(num_block * share))


def _seq_len(datasets: Sequence[Dataset]) -> int | None:
    lengths = [d.table.manifest.seq_len if d.table.manifest else None for d in datasets]
    known = [length for length in lengths if length is not None]
    return max(known) if len(known) == len(lengths) else None


def _say_results(manifests: dict[str, Manifest], totals: dict[str, int], folder: Path, notes: list[str]) -> None:
    lines = []
    for name, manifest in manifests.items():
        counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
        for dataset, own in counts["datasets"].items():
            lines.append([name or "-", dataset, own["rows"], own["tokens"], ""])
        lines.append([name or "-", "all", manifest.rows, manifest.tokens, counts["bytes"]])
    say(format_table(("table", "dataset", "rows", "tokens", "bytes"), lines))
    say(f"{timing['seconds']:,.1f} s, {timing['tokens_per_second']:,} tokens/s")
    for what, count in (("without tokens", totals["empty"]), ("whose content occurred before", totals["duplicates"])):
        if count:
            say(f"{count} rows {what} were left out")
    for note in notes:
        say(note)
    say(f"wrote {folder}")
