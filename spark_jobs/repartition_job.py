"""The repartition job: partitions of equal token count, documents packed to rows of a fixed length."""

import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from fft.console import format_table, say
from fft.corpus.accounts import finished_manifest, lineage_of, timing_of
from fft.data.delta import split_name
from fft.data.known import IMAGES
from fft.data.manifest import Manifest, Manifests
from fft.data.part_files import PartFile, PartFolder
from fft.data.row_tallies import by_dataset, datasets_of
from fft.errors import UserError
from spark_jobs.parameters import check_parameters, is_table_name
from spark_jobs.placing import bucket_tokens, buckets_for, in_partitions, partition_order, parts_for
from spark_jobs.runtime.counting import tally_names
from spark_jobs.runtime.hashing import balance
from spark_jobs.runtime.many_files import EachByTasks
from spark_jobs.runtime.session import get_session, job_settings, user_errors
from spark_jobs.runtime.tasks import by_part, part_to_row
from spark_jobs.runtime.watching import watched
from spark_jobs.token_rows import PackedRows, counted_rows, token_columns
from spark_jobs.token_table.destination import check_writer, output_at
from spark_jobs.token_table.kept import keep_part
from spark_jobs.token_table.output import Output, place_at
from spark_jobs.token_table.pack_rows import Packer, window_tokens
from spark_jobs.token_table.picture import check_report, write_report
from spark_jobs.token_table.read import (
    Dataset,
    common_pairs,
    common_tokenizer,
    common_vision,
    find_tables,
    not_read,
    open_datasets,
    open_named,
    read_tokens,
    with_kept,
)
from spark_jobs.token_table.remains import SPLITS
from spark_jobs.token_table.spark_output import SparkTable
from spark_jobs.token_table.work import work_on
from spark_jobs.token_table.writer import TableWriter

_TOKENS_PER_PARTITION, _IMAGE_BYTES_PER_PARTITION = 1 << 25, 1 << 29
_FEWEST_PARTITIONS = 4
_ROWS_TO_PACK = 64
_MAX_SPREAD = 1.02


def repartition_table(
    input: str | Path,
    output: str | Path | None = None,
    *,
    max_len: int,
    pack: str = "best-fit",
    num_partition: int | None = None,
    seed: int = 0,
    format: str | None = None,
    writer: str | None = None,
    overwrite: bool = False,
    report: str | Path | None = None,
    spark: SparkSession | None = None,
) -> Manifests:
    """Write a table's documents as rows of at most ``max_len`` tokens in ``num_partition`` files of equal token count.

    ``input`` is a table or a folder with the tables ``train`` and ``validation``; each becomes one of the same name.
    Without ``output`` the table itself is replaced, which ``overwrite`` must allow: it stays until the new one is
    whole, as an older version if it is a Delta table.
    ``input`` may name a catalog table (``catalog.schema.table``), which the engine reads. ``output``, too: Spark then
    writes it, as with ``writer="spark"`` any other, see :mod:`spark_jobs.token_table.spark_output`.
    ``format`` is "parquet" (by default, but for catalog tables) or "delta", where ``overwrite`` adds a version.
    ``report`` is a file, .html or .png, for a picture of the result.
    Returns the manifests by table name ("" for a single table). Raises :class:`UserError` for an input that is no
    finished token table. ``spark`` is by default the active session.
    """
    check_parameters(locals())
    check_report(report, overwrite)
    source, session = place_at(input, "input"), partial(get_session, "repartition", spark)
    check_writer(writer, source if output is None else output)
    _check_in_place(source, output, overwrite, writer)
    datasets = _open(source, session)
    packing = Packing(max_len, pack, num_partition, seed)
    common_pairs(list(datasets.values()))
    for dataset in datasets.values():
        what = "images" if common_vision([dataset]) is not None else "preferences" if common_pairs([dataset]) else ""
        if what and pack == "concat":
            raise UserError(f'`pack` concat cuts anywhere, but {dataset.path} has {what}: give "best-fit" or "none".')
    left_out, notes = not_read(list(datasets.values()))
    origins = [dataset.table.origin for dataset in datasets.values()]
    lineage = lineage_of("repartition", origins, asdict(packing)) | left_out
    if output is None:
        table = _in_place(source, datasets)
    else:
        table = output_at(output, list(datasets), [source], overwrite, format, writer, session)
    table.check()
    spark = session()
    manifests = Manifests()
    work = work_on("repartition", table, list(datasets.values()), asdict(packing))
    with table.claim(lineage, work) as writers, job_settings(spark):
        for name, dataset in datasets.items():
            manifests[name] = _repartition(spark, writers[name], dataset, name, packing, lineage)
            writers[name].finish(manifests[name], facts_of(manifests[name]))
    _say_results(manifests, table.folder, notes)
    say(f"wrote {table.folder}")
    write_report(manifests, report)
    return manifests


def _check_in_place(source: str, output: str | Path | None, overwrite: bool, writer: str | None) -> None:
    if output is None and not overwrite:
        raise UserError(
            f"without `output` {source} itself is replaced: "
            "allow that with `overwrite=True`, or give a folder with `output`."
        )
    if output is None and (writer == "spark" or is_table_name(source)):
        raise UserError(
            f"Spark's own writer does not write {source} while it is read: give another place with `output`."
        )


def _open(source: str, session: Callable[[], SparkSession]) -> dict[str, Dataset]:
    """The tables to repartition, by name. Raises :class:`UserError` for none, and for others than those of a split."""
    if is_table_name(source):
        return {"": with_kept(open_named(session(), [source], [])[0])}
    tables = find_tables(source, "input")
    names = [""] if tables == [source] else [posixpath.basename(table) for table in tables]
    if names != [""] and not set(names) <= set(SPLITS):
        raise UserError(
            f"`input` {source} holds the tables {', '.join(names)}: "
            "give one of them, or mix them with shuffle.py first."
        )
    opened = open_datasets(tables, EachByTasks(session))
    return {name: with_kept(dataset) for name, dataset in zip(names, opened, strict=True)}


@dataclass(frozen=True)
class Packing:
    """How rows are packed; see :func:`repartition_table`."""

    max_len: int
    pack: str
    num_partition: int | None
    seed: int

    def partitions(self, tokens: int, image_bytes: int = 0) -> int:
        """Files of a table with so many tokens and bytes of images."""
        if self.num_partition is not None:
            return self.num_partition
        usual = (_TOKENS_PER_PARTITION, _IMAGE_BYTES_PER_PARTITION)
        wanted = parts_for(tokens, image_bytes, usual, _FEWEST_PARTITIONS)
        # A small table keeps enough rows together to pack them well.
        return min(wanted, max(1, tokens // (_ROWS_TO_PACK * self.max_len)))


def _in_place(source: str, datasets: Mapping[str, Dataset]) -> Output:
    """The tables that are read as what is replaced, once the new ones are whole."""
    folder, pinned = split_name(source)
    versions = {name: d.table.version for name, d in datasets.items() if d.table.version is not None}
    table_format = "delta" if len(versions) == len(datasets) else "parquet"
    return Output(folder, list(datasets), [], True, table_format, versions if pinned is None else {})


def _repartition(
    spark: SparkSession, writer: TableWriter | SparkTable, dataset: Dataset, name: str, packing: Packing, lineage: dict
) -> Manifest:
    start, title = time.monotonic(), f"repartition {name}".strip()
    partitions = packing.partitions(dataset.table.tokens, dataset.table.image_bytes)
    notes = None if isinstance(writer, SparkTable) else writer.target.notes
    rows = read_tokens(spark, [dataset], notes).where(F.length("input_ids") > 0)
    buckets = buckets_for(partitions)
    with watched(spark, f"{title}: weighing"), user_errors():
        found = bucket_tokens(rows, packing.seed, buckets).collect()
    if notes is not None:
        notes.check()
    weights, full = {row["bucket"]: row["tokens"] for row in found}, sum(row["rows"] for row in found)
    if not weights:
        raise UserError(f"{dataset.path} holds no tokens: all of its {dataset.table.rows} rows are empty.")
    done = frozenset() if isinstance(writer, SparkTable) else writer.go_on(partitions, f" of {name}" if name else "")
    left = [(bucket, part) for bucket, part in sorted(balance(weights, partitions).items()) if part not in done]
    assigned = spark.createDataFrame(left, "bucket int, part int")
    placed = rows.transform(in_partitions, assigned, packing.seed, buckets, partitions)
    vision = common_vision([dataset])
    pairs = common_pairs([dataset])
    packer = Packer(packing.max_len, packing.pack, packing.seed, window_tokens(packing.max_len), vision, pairs)
    order = partition_order(placed)
    if isinstance(writer, SparkTable):
        columns = token_columns(rows, packed=True, beside=dataset.beside)
        names = tally_names((), IMAGES in rows.columns, dataset.names)
        writer.save(counted_rows(placed, PackedRows(packer, columns), columns, names, order), names, title)
    elif left:
        writer.write(placed, PackParts(writer.target, packer), order, title)
    tokens, tokens_in = writer.tokens, sum(weights.values())
    if tokens != tokens_in:
        raise UserError(f"{dataset.path} changed while it was read ({tokens_in} tokens, then {tokens}): run again.")
    positions, per_file = sum(file.rows for file in writer.files) * packing.max_len, [f.tokens for f in writer.files]
    counts = {
        "rows_in": dataset.table.rows,
        "empty": dataset.table.rows - full,
        "partitions": len(per_file),
        "max_over_min": round(max(per_file) / min(per_file), 4),
        "unused": positions - tokens,
        "unused_share": round(1 - tokens / positions, 6),
    }
    if found_datasets := datasets_of(writer.tallies):
        counts["datasets"] = by_dataset(found_datasets, writer.tallies)
    timing, tokenizer = timing_of(start, tokens), common_tokenizer([dataset])
    facts = None if vision is None else vision.facts()
    made = finished_manifest(writer.parts, lineage, counts, timing, tokenizer, packing.max_len, packing.seed, facts)
    return replace(made, pairs=pairs)


@dataclass(frozen=True)
class PackParts:
    """A function for ``mapInArrow``: rows of parts in; each part packed and written."""

    target: PartFolder
    packer: Packer

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Do all parts of a task."""
        for part, rows in by_part(batches):
            with PartFile(self.target, part) as sink:
                for batch in self.packer(rows):
                    sink.write(batch)
                done = sink.finish({})
            yield part_to_row(keep_part(self.target, done))


_HEADER = ("table", "rows", "tokens", "trained", "unused %", "partitions", "max/min", "bytes", "seconds", "tokens/s")


def _say_results(manifests: Mapping[str, Manifest], folder: str | Path, notes: list[str]) -> None:
    say(format_table(_HEADER, [_line(name or "-", manifest) for name, manifest in manifests.items()]))
    for name, manifest in manifests.items():
        spread, empty = manifest.lineage["counts"]["max_over_min"], manifest.lineage["counts"]["empty"]
        if empty:
            say(f"{empty} rows without tokens were left out")
        if spread > _MAX_SPREAD:
            where = posixpath.join(folder, name)
            say(f"note: partitions of {where} differ by {spread:.2f}: for few documents, lower num_partition.")
    for note in notes:
        say(note)


def _line(name: str, manifest: Manifest) -> list:
    counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
    return [
        name,
        counts["rows"],
        counts["tokens"],
        counts["trained_tokens"],
        100 * counts["unused_share"],
        counts["partitions"],
        counts["max_over_min"],
        counts["bytes"],
        timing["seconds"],
        timing["tokens_per_second"],
    ]


def facts_of(manifest: Manifest) -> str:
    """The table's facts for a human reader."""
    counts, tokenizer = manifest.lineage["counts"], manifest.tokenizer
    facts = {
        "rows": f"{manifest.rows:,} of at most {manifest.seq_len:,} tokens",
        "tokens": f"{manifest.tokens:,}",
        "trained": f"{counts['trained_tokens']:,}, not trained {counts['untrained_tokens']:,}",
        "unused positions": f"{counts['unused']:,} ({100 * counts['unused_share']:.3f} %)",
        "bytes": f"{counts['bytes']:,}",
        "partitions": f"{counts['partitions']} (tokens: largest / smallest = {counts['max_over_min']})",
        "tokenizer": "unknown" if tokenizer is None else f"{tokenizer.name}, {tokenizer.vocab_size:,} ids",
        "made from": ", ".join(manifest.lineage["inputs"]),
        **{name: str(value) for name, value in manifest.lineage["parameters"].items()},
    }
    width = max(map(len, facts))
    files = format_table(
        ("file", "rows", "tokens", "bytes"), [[f.path, f.rows, f.tokens, f.bytes] for f in manifest.files]
    )
    return "\n".join([*(f"{name.ljust(width)}  {value}" for name, value in facts.items()), "", files, ""])
