"""The shuffle job: rows of many tables into one global seeded order, and a held-out split."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from fft.data.manifest import Manifest, commit
from fft.errors import UserError
from spark_jobs.arrow import pack_columns, unpack_columns
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
    measure,
    total,
    with_results,
    write_parquet,
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
    with claim(folder, list(shares), paths, lineage, overwrite) as folders, job_settings(spark, bytes_in):
        rows = read_tokens(spark, datasets)
        per_dataset: dict[str, dict[str, int]] = {}
        files, empty = {}, 0
        for name, share in shares.items():
            seen = Observation(f"rows of {name}")
            chosen = rows.observe(seen, F.sum(F.when(_is_empty(), 1).otherwise(0)).alias("empty")).where(~_is_empty())
            if holdout:
                held_out = is_held_out(seed, _name_of_row(), holdout)
                chosen = chosen.where(held_out if name == "validation" else ~held_out)
            blocks = _blocks(num_block, share, tokens_in)
            tallies = Observation(f"datasets of {name}")
            written = chosen.observe(tallies, *_tallies(datasets)).transform(in_seeded_order, seed, blocks)
            write_parquet(written, folders[name], f"shuffle {name}".strip(), int(bytes_in * share))
            files[name] = measure(folders[name])
            if not files[name]:
                raise UserError(
                    f"--holdout {holdout} leaves no row for {name}: "
                    f"{sum(d.table.rows for d in datasets)} rows are too few; give another share."
                )
            empty = seen.get["empty"] or 0
            per_dataset[name] = tallies.get
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
                "datasets": _by_dataset(datasets, per_dataset[name]),
            }
            results = with_results(lineage, counted, tokens, seconds)
            manifests[name] = Manifest(
                files[name], size.rows, size.tokens, tokenizer, _seq_len(datasets), seed, results
            )
        for name, manifest in manifests.items():
            commit(folders[name], manifest)
    _report(manifests, empty, folder)
    return manifests


def in_seeded_order(df: DataFrame, seed: int, num_block: int) -> DataFrame:
    """Rows in ``num_block`` partitions that, one after the other, are in the order of a hash of each row.

    The hash covers seed, dataset, document ids and content, so that equal ids lose nothing and tie only when the
    rows are equal. Lists travel through the exchange as bytes.
    """
    ints = int_columns(df)
    kept = [name for name in df.columns if name != "dataset"]
    packed = df.transform(pack_columns, ints)
    place = row_hash("shuffle", seed, F.col("dataset"), _name_of_row(), *(F.col(name) for name in ints))
    return (
        packed.withColumn("place", place)
        .repartitionById(num_block, block_of(F.col("place"), num_block))
        .sortWithinPartitions("place", "dataset", _name_of_row(), *ints)
        .select(*kept)
        .transform(unpack_columns, ints)
    )


def _name_of_row() -> Column:
    return F.array_join("doc_ids", "\n")


def _is_empty() -> Column:
    return F.coalesce(F.size("input_ids"), F.lit(0)) <= 0


def _tallies(datasets: Sequence[Dataset]) -> list[Column]:
    tallies = []
    for index, dataset in enumerate(datasets):
        own = F.col("dataset") == dataset.name
        tallies.append(F.sum(F.when(own, 1).otherwise(0)).alias(f"rows_{index}"))
        tallies.append(F.sum(F.when(own, F.size("input_ids")).otherwise(0)).cast("long").alias(f"tokens_{index}"))
    return tallies


def _by_dataset(datasets: Sequence[Dataset], tallies: dict[str, int]) -> dict[str, dict[str, int]]:
    return {
        d.name: {"rows": tallies[f"rows_{i}"] or 0, "tokens": tallies[f"tokens_{i}"] or 0}
        for i, d in enumerate(datasets)
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
