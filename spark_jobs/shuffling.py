"""The shuffle job: rows of many tables into one global seeded order, and a held-out split."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from fft.data.manifest import Manifest, commit
from fft.errors import UserError
from spark_jobs.arrow import bytes_to_lists
from spark_jobs.parts import PartFile, by_part, files_of, report, sum_tallies, to_tasks
from spark_jobs.placing import block_of, is_held_out, row_hash
from spark_jobs.session import get_session, job_settings
from spark_jobs.summary import format_table, say
from spark_jobs.tables import Dataset, common_tokenizer, find_tables, int_columns, open_datasets, read_tokens
from spark_jobs.writing import (
    check_output,
    claim,
    lineage_of,
    local_path,
    local_paths,
    total,
    with_results,
    write_parts,
)

_TOKENS_PER_BLOCK = 1 << 23
_BLOCKS = (8, 2048)


def shuffle_tables(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    seed: int = 0,
    num_block: int | None = None,
    holdout: float = 0.0,
    overwrite: bool = False,
    spark: SparkSession | None = None,
) -> dict[str, Manifest]:
    """Write the rows of all input tables to ``output`` in an order that depends on their content and ``seed`` alone.

    With ``holdout`` > 0, ``output`` gets the tables ``train`` and ``validation``: about that share of the document
    ids, and all their rows, are held out. Returns the manifests by table name ("" without a split). Raises
    :class:`UserError` for inputs that are no finished token tables and for a split that leaves a side empty.
    ``spark`` is by default the active session.
    """
    folder = local_path(output, "-o")
    paths = [table for path in local_paths(inputs, "-i") for table in find_tables(path)]
    datasets = open_datasets(paths)
    tokenizer = common_tokenizer(datasets)
    if holdout and any("cu_seqlens" in d.table.columns for d in datasets):
        raise UserError("--holdout needs whole documents, but a table is packed: hold out before repartition.py packs.")
    parameters = {"seed": seed, "num_block": num_block, "holdout": holdout}
    lineage = lineage_of("shuffle", paths, parameters)
    tokens_in, bytes_in = sum(d.table.tokens for d in datasets), sum(d.bytes for d in datasets)
    # The small side first: a split that leaves it empty is found before the work.
    shares = {"validation": holdout, "train": 1 - holdout} if holdout else {"": 1.0}
    check_output(folder, paths, overwrite)
    spark = spark or get_session("shuffle")
    start = time.monotonic()
    with claim(folder, list(shares), paths, lineage, overwrite) as folders, job_settings(spark):
        rows = read_tokens(spark, datasets)
        files, tallies = {}, {}
        for name, share in shares.items():
            chosen = rows
            if holdout:
                held_out = is_held_out(seed, _name_of_row(), holdout)
                chosen = rows.where(held_out if name == "validation" else ~held_out)
            blocks = _blocks(num_block, share, tokens_in)
            placed = chosen.transform(in_seeded_order, seed, blocks)
            work = WriteRows(str(folders[name].absolute()))
            parts = write_parts(
                placed, work, _order(placed), folders[name], f"shuffle {name}".strip(), int(bytes_in * share)
            )
            files[name], tallies[name] = files_of(parts), sum_tallies(parts)
            if not files[name]:
                raise UserError(
                    f"--holdout {holdout} leaves no row for {name}: "
                    f"{sum(d.table.rows for d in datasets)} rows are too few; give another share."
                )
        empty = sum(own.get("empty", 0) for own in tallies.values())
        counts = {
            "rows_in": sum(d.table.rows for d in datasets),
            "rows_out": sum(total(f).rows for f in files.values()),
            "empty": empty,
        }
        if counts["rows_in"] != counts["rows_out"] + empty:
            raise UserError(f"rows in and out differ ({counts}): an input changed while it was read; run again.")
        seconds, tokens = time.monotonic() - start, sum(total(f).tokens for f in files.values())
        manifests = {}
        for name in shares:
            size = total(files[name])
            counted = counts | {
                "rows": size.rows,
                "tokens": size.tokens,
                "bytes": size.bytes,
                "datasets": _by_dataset(datasets, tallies[name]),
            }
            results = with_results(lineage, counted, tokens, seconds)
            manifests[name] = Manifest(
                files[name], size.rows, size.tokens, tokenizer, _seq_len(datasets), seed, results
            )
        for name, manifest in manifests.items():
            commit(folders[name], manifest)
    _report(manifests, empty, folder)
    return manifests


def _order(df: DataFrame) -> list[str]:
    return ["part", "place", "dataset", "name", *int_columns(df)]


def in_seeded_order(df: DataFrame, seed: int, num_block: int) -> DataFrame:
    """Rows in ``num_block`` parts that, one after the other, are in the order of ``place``, a hash of each row.

    The hash covers seed, dataset, document ids and content, so that equal ids lose nothing and tie only when the
    rows are equal. Lists are bytes, which travel through the exchange several times faster than arrays.
    """
    ints = int_columns(df)
    place = row_hash("shuffle", seed, F.col("dataset"), _name_of_row(), *(F.col(name) for name in ints))
    placed = df.withColumn("place", place).withColumn("part", block_of(F.col("place"), num_block))
    return placed.withColumn("name", _name_of_row()).transform(to_tasks, num_block)


@dataclass(frozen=True)
class WriteRows:
    """A function for ``mapInArrow``: rows of parts in; files written, empty rows left out and counted; reports out."""

    folder: str

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Write all parts of a task."""
        for part, rows in by_part(batches):
            tallies: dict[str, int] = {}
            with PartFile(self.folder, part) as sink:
                for batch in rows:
                    tokens = pc.divide(pc.binary_length(batch.column("input_ids")), 4)
                    full = batch.filter(pc.greater(tokens, 0))
                    counted = {"empty": batch.num_rows - full.num_rows, **_per_dataset(batch, tokens)}
                    for name, value in counted.items():
                        tallies[name] = tallies.get(name, 0) + value
                    if full.num_rows:
                        sink.write(as_token_rows(full))
                done = sink.finish(tallies)
            yield report([done])


def as_token_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The columns of a token table, lists of bytes as lists of ids."""
    names = [name for name in ("input_ids", "labels", "cu_seqlens", "doc_ids") if name in batch.schema.names]
    columns = [batch.column(n) if n == "doc_ids" else bytes_to_lists(batch.column(n)) for n in names]
    return pa.RecordBatch.from_arrays(columns, names)


def _per_dataset(batch: pa.RecordBatch, tokens: pa.Array) -> dict[str, int]:
    counts = {}
    for dataset in pc.unique(batch.column("dataset")).to_pylist():
        own = tokens.filter(pc.equal(batch.column("dataset"), dataset))
        counts[f"rows of {dataset}"] = len(own) - pc.sum(pc.equal(own, 0)).as_py()
        counts[f"tokens of {dataset}"] = pc.sum(own).as_py()
    return counts


def _name_of_row() -> Column:
    return F.array_join("doc_ids", "\n")


def _by_dataset(datasets: Sequence[Dataset], tallies: dict[str, int]) -> dict[str, dict[str, int]]:
    return {
        d.name: {"rows": tallies.get(f"rows of {d.name}", 0), "tokens": tallies.get(f"tokens of {d.name}", 0)}
        for d in datasets
    }


def _blocks(num_block: int | None, share: float, tokens: int) -> int:
    if num_block is None:
        low, high = _BLOCKS
        num_block = min(max(math.ceil(tokens / _TOKENS_PER_BLOCK), low), high)
    return max(1, math.ceil(num_block * share))


def _seq_len(datasets: Sequence[Dataset]) -> int | None:
    lengths = {d.table.manifest.seq_len if d.table.manifest else None for d in datasets}
    return None if None in lengths else max(lengths)


def _report(manifests: dict[str, Manifest], empty: int, folder: Path) -> None:
    lines = []
    for name, manifest in manifests.items():
        counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
        for dataset, own in counts["datasets"].items():
            lines.append([name or "-", dataset, own["rows"], own["tokens"], ""])
        lines.append([name or "-", "all", manifest.rows, manifest.tokens, counts["bytes"]])
    say(format_table(("table", "dataset", "rows", "tokens", "bytes"), lines))
    say(f"{timing['seconds']:,.1f} s, {timing['tokens_per_second']:,} tokens/s")
    if empty:
        say(f"{empty} rows without tokens were left out")
    say(f"wrote {folder}")
