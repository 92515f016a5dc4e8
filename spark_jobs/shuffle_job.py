"""The shuffle job: rows of many tables into one global seeded order, and a held-out split."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from fft.console import format_table, say
from fft.corpus.accounts import finished_manifest, lineage_of, timing_of
from fft.data.known import DATASET, IMAGES
from fft.data.manifest import Manifest, Manifests, or_unknown
from fft.data.part_files import PartFile, PartFolder, sum_tallies
from fft.data.row_tallies import by_dataset, datasets_of
from fft.errors import UserError
from spark_jobs.mixing import often_by
from spark_jobs.parameters import check_parameters
from spark_jobs.placing import COUNTED_ROWS, RowChoice, Shuffling, as_token_rows, parts_for
from spark_jobs.runtime.counting import tally_names
from spark_jobs.runtime.session import get_session, job_settings
from spark_jobs.runtime.tasks import by_part, part_to_row
from spark_jobs.token_rows import ChosenRows, counted_rows, token_columns
from spark_jobs.token_table.destination import check_writer, output_at
from spark_jobs.token_table.kept import keep_part
from spark_jobs.token_table.named_inputs import Inputs, open_inputs
from spark_jobs.token_table.picture import check_report, write_report
from spark_jobs.token_table.read import (
    Dataset,
    common_pairs,
    common_tokenizer,
    common_vision,
    not_read,
    read_tokens,
)
from spark_jobs.token_table.spark_output import SparkTable
from spark_jobs.token_table.work import work_on
from spark_jobs.token_table.writer import TableWriter

_TOKENS_PER_BLOCK = 1 << 23
#: Of images, a few times what a process may hold, as Sail's sort does.
_IMAGE_BYTES_PER_BLOCK = 1 << 28
_FEWEST_BLOCKS = 8


@dataclass(frozen=True)
class Mixing:
    """What decides the order; see :func:`shuffle_tables`. ``weights`` has all tables."""

    seed: int
    num_block: int | None
    holdout: float
    weights: dict[str, float]
    dedup: bool


def shuffle_tables(
    inputs: Inputs,
    output: str | Path,
    *,
    keep: Sequence[str] | None = None,
    seed: int = 0,
    num_block: int | None = None,
    weights: Mapping[str, float] | None = None,
    weight_by: str = "documents",
    dedup: bool = False,
    holdout: float = 0.0,
    format: str | None = None,
    writer: str | None = None,
    overwrite: bool = False,
    report: str | Path | None = None,
    spark: SparkSession | None = None,
) -> Manifests:
    """Write the rows of all input tables to ``output`` in an order that depends on their content and ``seed`` alone.

    With ``holdout`` > 0, ``output`` gets the tables ``train`` and ``validation``: about that share of the document
    ids, and all their rows, are held out. Tables have the names of their folders or those given, as in
    ``{"web": "runs/web"}`` or "web=runs/web", which documents keep in the column ``dataset``; ``keep`` are others to
    carry. ``weights`` (by name) say how often a row of the training table occurs, or with ``weight_by="tokens"`` which
    share of its tokens each table has; held-out rows occur once, or not at all where the weight is 0. ``dedup`` leaves
    out rows whose content occurred before, and training rows whose content is held out.

    Inputs may name catalog tables (``catalog.schema.table``), which the engine reads. The output, too: Spark then
    writes it, as with ``writer="spark"`` any other, see :mod:`spark_jobs.token_table.spark_output`.
    ``format`` is "parquet" (by default, but for catalog tables) or "delta", where ``overwrite`` adds a version;
    ``report`` a file, .html or .png, for a picture. Returns the manifests by table name ("" without a split). Raises
    :class:`UserError` for inputs that are no finished token tables and for a split that leaves a side empty.
    """
    check_parameters(locals())
    check_report(report, overwrite)
    check_writer(writer, output)
    session = partial(get_session, "shuffle", spark)
    datasets = open_inputs(inputs, session, keep)
    common_tokenizer(datasets), common_vision(datasets)  # differing ones are refused before the work
    whole = common_pairs(datasets) and _seq_len(datasets) is None  # a pair a row
    if holdout and not whole and any("cu_seqlens" in d.table.columns for d in datasets):
        raise UserError("`holdout` needs whole documents, but a table is packed: hold out before repartition.py packs.")
    often = often_by(weight_by, weights or {}, {dataset.name: dataset.table.tokens for dataset in datasets})
    mixing = Mixing(seed, num_block, holdout, often, dedup)
    left_out, notes_left = not_read(datasets)
    parameters = asdict(mixing) | {"weight_by": weight_by}
    lineage = lineage_of("shuffle", [dataset.table.origin for dataset in datasets], parameters) | left_out
    # The small side first: a split that leaves it empty is found before the work.
    shares = {"validation": holdout, "train": 1 - holdout} if holdout else {"": 1.0}
    (table := output_at(output, list(shares), [d.path for d in datasets], overwrite, format, writer, session)).check()
    spark, start = session(), time.monotonic()
    work = work_on("shuffle", table, datasets, asdict(mixing))
    with table.claim(lineage, work) as writers, job_settings(spark):
        first = next(iter(writers.values()))
        rows = read_tokens(spark, datasets, None if isinstance(first, SparkTable) else first.target.notes)
        for name, share in shares.items():
            _write_split(writers[name], rows, datasets, name, share, mixing)
        manifests, counts = _finish(writers, datasets, mixing, lineage, start)
    _say_results(manifests, counts, table.folder, notes_left)
    write_report(manifests, report)
    return manifests


def _finish(
    writers: Mapping[str, TableWriter | SparkTable],
    datasets: Sequence[Dataset],
    mixing: Mixing,
    lineage: Mapping[str, Any],
    start: float,
) -> tuple[Manifests, dict[str, Any]]:
    """Publish the tables; their manifests, and what was counted of all together."""
    counts, length = _counts(writers.values(), datasets, mixing), _seq_len(datasets)
    timing, tokenizer = timing_of(start, sum(made.tokens for made in writers.values())), common_tokenizer(datasets)
    rules, manifests = common_vision(datasets), Manifests()
    vision = None if rules is None else rules.facts()
    for name, made in writers.items():
        named = [dataset.name for dataset in datasets if DATASET not in dataset.table.columns]
        own = counts | {"datasets": by_dataset([*dict.fromkeys([*named, *datasets_of(made.tallies)])], made.tallies)}
        found = finished_manifest(made.parts, lineage, own, timing, tokenizer, length, mixing.seed, vision)
        manifests[name] = replace(found, pairs=common_pairs(datasets))
        made.finish(manifests[name])
    return manifests, counts


def _write_split(
    writer: TableWriter | SparkTable,
    rows: DataFrame,
    datasets: Sequence[Dataset],
    name: str,
    share: float,
    mixing: Mixing,
) -> None:
    weights = mixing.weights
    if name == "validation":  # held-out rows occur once: repeating them would only make an evaluation slower
        weights = {dataset: float(weight > 0) for dataset, weight in weights.items()}
    tokens = sum(dataset.table.tokens * weights[dataset.name] for dataset in datasets)
    image_bytes = sum(dataset.table.image_bytes * weights[dataset.name] for dataset in datasets)
    blocks = _blocks(mixing.num_block, share, tokens, image_bytes)
    shuffling = Shuffling(mixing.seed, mixing.holdout, name, weights, mixing.dedup)
    title, choice, order = f"shuffle {name}".strip(), shuffling.choice(rows), shuffling.order(rows)
    if isinstance(writer, SparkTable):
        known = dict.fromkeys(name for dataset in datasets for name in dataset.names)
        names = tally_names(COUNTED_ROWS, IMAGES in rows.columns, [*known])
        kept = dict.fromkeys(name for dataset in datasets for name in dataset.kept)
        columns = token_columns(rows, beside=[DATASET, *kept])
        counted = counted_rows(shuffling.place(rows, blocks), ChosenRows(choice, columns), columns, names, order)
        writer.save(counted, names, title)
    else:
        done = writer.go_on(blocks, f" of {name}" if name else "")
        if len(done) < blocks:
            writer.write(shuffling.place(rows, blocks, done), WriteRows(writer.target, choice), order, title)
    if not writer.files:
        if not mixing.holdout:
            raise UserError(f"`inputs` leaves no row for the output: all {_rows(datasets)} are without tokens.")
        raise UserError(
            f"`holdout` {mixing.holdout} leaves no row for {name}: {_rows(datasets)} rows are too few; give another "
            "share."
        )


def _counts(writers: Iterable[TableWriter | SparkTable], datasets: Sequence[Dataset], mixing: Mixing) -> dict[str, Any]:
    tallies = sum_tallies([part for writer in writers for part in writer.parts])
    counts = {"rows_in": _rows(datasets)} | {name: tallies[name] for name in COUNTED_ROWS}
    weighted = any(weight != 1 for weight in mixing.weights.values())
    if not weighted and counts["rows_in"] != counts["rows_out"] + counts["empty"] + counts["duplicates"]:
        raise UserError(f"rows in and out differ ({counts}): an input changed while it was read; run again.")
    return counts


def _rows(datasets: Sequence[Dataset]) -> int:
    return sum(dataset.table.rows for dataset in datasets)


@dataclass(frozen=True)
class WriteRows:
    """A function for ``mapInArrow``: sorted rows of parts in; files written.

    Left out are those that do not stay by ``choice``, and what that counts is counted.
    """

    target: PartFolder
    choice: RowChoice = field(default_factory=RowChoice)

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Write all parts of a task."""
        for part, rows in by_part(batches):
            tallies: Counter[str] = Counter()
            before = None
            with PartFile(self.target, part) as sink:
                for batch in rows:
                    chosen, counts = self.choice.of(batch, before)
                    before = batch.slice(batch.num_rows - 1)
                    tallies.update(counts)
                    if chosen.num_rows:
                        sink.write(as_token_rows(chosen))
                done = sink.finish(tallies)
            yield part_to_row(keep_part(self.target, done))


def _blocks(num_block: int | None, share: float, tokens: float, image_bytes: float) -> int:
    if num_block is None:
        num_block = parts_for(tokens, image_bytes, (_TOKENS_PER_BLOCK, _IMAGE_BYTES_PER_BLOCK), _FEWEST_BLOCKS)
    return max(1, math.ceil(num_block * share))


def _seq_len(datasets: Sequence[Dataset]) -> int | None:
    lengths = [d.table.manifest.seq_len if d.table.manifest else None for d in datasets]
    known = [length for length in lengths if length is not None]
    return max(known) if len(known) == len(lengths) else None


def _say_results(manifests: dict[str, Manifest], totals: dict[str, int], folder: str | Path, notes: list[str]) -> None:
    lines = []
    for name, manifest in manifests.items():
        counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
        for dataset, own in counts["datasets"].items():
            shares = [f"{own['rows'] / manifest.rows:.1%}", f"{own['tokens'] / manifest.tokens:.1%}"]
            lines.append([name or "-", dataset, own["rows"], shares[0], own["tokens"], shares[1], "", ""])
        trained = [or_unknown(manifest.trained_tokens), counts["bytes"]]
        lines.append([name or "-", "all", manifest.rows, "", manifest.tokens, "", *trained])
    say(format_table(("table", "dataset", "rows", "share", "tokens", "share", "trained", "bytes"), lines))
    say(f"{timing['seconds']:,.1f} s, {timing['tokens_per_second']:,} tokens/s")
    for what, count in (("without tokens", totals["empty"]), ("whose content occurred before", totals["duplicates"])):
        if count:
            say(f"{count} rows {what} were left out")
    for note in notes:
        say(note)
    say(f"wrote {folder}")
