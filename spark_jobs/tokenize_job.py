"""The tokenize job: records of raw files to a token table, one row a document."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from fft.console import format_table, say
from fft.corpus.accounts import COUNTED, document_counts, documents_manifest, engine_of, lineage_of, notes_on, timing_of
from fft.corpus.files import Source, find_sources, spans_of
from fft.corpus.splits import MOST_BYTES, SPLIT, Split, deal
from fft.corpus.tokenize_parts import PartTokenizer, name_malformed
from fft.data.known import IMAGES, LeftOut
from fft.data.manifest import Manifest, TokenizerInfo
from fft.data.part_files import PartFile, PartFolder, RejectFile
from fft.data.row_tallies import dataset_tallies
from fft.data.table import Table
from fft.errors import UserError
from fft.images.rules import ImageLimits, ImageSettings
from fft.text.encoder import Encoder
from fft.text.engines import ENGINES
from fft.text.keeping import keeping, kept_in
from fft.text.records import Keys, RecordEncoder
from fft.text.shown import beginning, documents_of_row, load_decoder
from spark_jobs.dataframes import ORDER as FRAME_ORDER
from spark_jobs.dataframes import Frame, Measured, by_reader, columns_read, in_parts, open_frames, records_of
from spark_jobs.encoders import Load, check_sources, encoder_loader, image_settings
from spark_jobs.parameters import check_parameters, is_table_name
from spark_jobs.runtime.counting import tally_names
from spark_jobs.runtime.many_files import EachByTasks
from spark_jobs.runtime.session import get_session, job_settings, user_errors
from spark_jobs.runtime.tasks import by_part, create_tasks, part_to_row
from spark_jobs.token_rows import ALL_UNUSED, EncodeRows, EncodeSplits, counted_rows
from spark_jobs.token_table.destination import check_writer, output_at
from spark_jobs.token_table.kept import keep_part
from spark_jobs.token_table.output import Output, place_at
from spark_jobs.token_table.picture import check_report, write_report
from spark_jobs.token_table.spark_output import SparkTable
from spark_jobs.token_table.work import states_in, states_of, work_of
from spark_jobs.token_table.writer import TableWriter

#: What is to be done about a malformed record where Spark writes.
_NOT_ASIDE = "mend it; Spark's own writer sets no records aside."
#: A part's splits lie in different files, or follow each other in one.
_ORDER = ("part", "path", "start")


def tokenize_table(
    inputs: str | Path | DataFrame | Sequence[str | Path | DataFrame],
    output: str | Path,
    tokenizer: str | Path,
    *,
    task: str = "pretrain",
    text_key: str = "text",
    id_key: str = "id",
    keep: Sequence[str] | None = None,
    max_len: int | None = None,
    max_document_bytes: int = MOST_BYTES,
    image_path: str | Path | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    max_tiles: int | None = None,
    eos: str = "auto",
    parse_special_tokens: bool = False,
    on_error: str = "fail",
    format: str | None = None,
    writer: str | None = None,
    overwrite: bool = False,
    report: str | Path | None = None,
    show: int = 0,
    spark: SparkSession | None = None,
) -> Manifest:
    """Tokenize documents of JSON lines, parquet or text files, or of DataFrames, into the folder ``output``.

    An input may also name a catalog table (``catalog.schema.table``), or be a URL, also with wild cards. So may
    ``output``: Spark then writes it, as any other with ``writer="spark"``: :mod:`spark_jobs.token_table.spark_output`.
    One row a document with ``input_ids`` and ``doc_ids``; with ``max_len``, longer documents become several rows.
    With ``task="chat"``, documents are conversations (:mod:`fft.text.formats`), encoded by the chat template, and rows
    have ``labels``: :mod:`fft.text.chat`; with "preference", pairs of them: :mod:`fft.text.preference`. Texts alone
    have ``text_key``, ``eos`` and ``parse_special_tokens``. With ``image_path``, a folder, chats may have images, which
    rows carry in ``images`` and ``image_grids``; ``tokenizer`` is then a model's directory, which has their limits.
    ``format`` is "parquet" (by default, but for catalog tables) or "delta", where ``overwrite`` adds a version;
    ``report`` a file, .html or .png, for a picture; ``show`` so many rows are printed; ``keep`` other keys or columns.
    Malformed records end the job (``on_error="fail"``) or go to ``output/_quarantine``. Raises :class:`UserError`.
    """
    check_parameters(locals())
    _check_outputs(output, writer, on_error, report, overwrite, show)
    unread, paths = by_reader([inputs] if isinstance(inputs, str | Path | DataFrame) else inputs)
    sources = find_sources(paths, id_key, left_out := LeftOut(), for_engine := [])
    session = partial(get_session, "tokenize", spark)
    (table := output_at(output, [""], [*paths, *unread], overwrite, format, writer, session)).check()
    parameters = {"task": task, "tokenizer": str(tokenizer), "id_key": id_key, "max_len": max_len, "on_error": on_error}
    images = image_settings(image_path, ImageLimits(max_pixels, min_pixels, max_tiles), task)
    check_sources(sources, task)
    load = encoder_loader(tokenizer, task, Keys(text_key, id_key), max_len, eos, parse_special_tokens, images)
    texts = {"text_key": text_key, "eos": eos, "parse_special_tokens": parse_special_tokens}
    parameters |= texts if task == "pretrain" else _of_images(image_path, images)
    record_encoder, info, spark = _load_beside_spark(load, session, keep)
    start, found = time.monotonic(), _Inputs(sources, open_frames(spark, [*unread, *for_engine]), max_document_bytes)
    lineage, work = lineage_of("tokenize", found.origins, parameters) | kept_in(keep), ""
    if isinstance(table, Output):
        found, work = found.measured(record_encoder, tokenizer, images, parameters, keep, table.table_format)
    with table.claim(lineage, work) as writers, job_settings(spark):
        _fill(spark, writers[""], found, record_encoder, on_error == "fail")
        manifest = _finish(writers[""], lineage | left_out.facts(), record_encoder, info, max_len, start)
    _tell(manifest, table.folder, [*left_out.notes(), *notes_on(manifest, record_encoder)], report, tokenizer, show)
    return manifest


def _check_outputs(
    output: str | Path,
    writer: str | None,
    on_error: str,
    report: str | Path | None,
    overwrite: bool,
    show: int,
) -> None:
    """Raise :class:`UserError` for what could not be written or shown at the end."""
    check_report(report, overwrite)
    check_writer(writer, output, on_error)
    if show and is_table_name(output):
        raise UserError(f"`show` reads files, and `output` {output} is a catalog's table: leave it out.")


def _tell(
    manifest: Manifest,
    folder: str | Path,
    notes: Sequence[str],
    report: str | Path | None,
    tokenizer: str | Path,
    show: int,
) -> None:
    """The summary, the picture, and how the first rows begin."""
    _say_results(manifest, folder, notes)
    write_report(manifest, report)
    if show:
        table = Table.open(folder)
        decoder = load_decoder(table, str(tokenizer))
        for row in range(min(show, manifest.rows)):
            say(beginning(documents_of_row(table, row), decoder, sys.stderr.isatty()))


def _of_images(image_path: str | Path | None, images: ImageSettings | None) -> dict[str, Any]:
    """What of the parameters says which images are read, if any are."""
    return {} if images is None else {"image_path": str(image_path), **asdict(images.limits)}


def _finish(
    writer: TableWriter | SparkTable,
    lineage: dict[str, Any],
    record_encoder: RecordEncoder[Any],
    info: TokenizerInfo,
    max_len: int | None,
    start: float,
) -> Manifest:
    counts = document_counts(writer.tallies, lineage["inputs"], record_encoder)
    lineage = {**lineage, "engine": engine_of(writer.tallies)}
    timing = timing_of(start, writer.tokens)
    manifest = documents_manifest(writer.parts, lineage, counts, timing, info, max_len, record_encoder)
    made = sum(own["tokens"] for own in counts["datasets"].values())
    if made != manifest.tokens:
        raise UserError(
            f"{made} tokens were made, the table has {manifest.tokens}: this is a fault of the job; please report it."
        )
    writer.finish(manifest)
    return manifest


def _load_beside_spark(
    load: Load, session: Callable[[], SparkSession], keep: Sequence[str] | None
) -> tuple[RecordEncoder[Any], TokenizerInfo, SparkSession]:
    with ThreadPoolExecutor(1) as pool:  # importing transformers takes seconds, and so does starting Spark
        loading = pool.submit(load)
        spark = session()
        encoder, info = loading.result()
        return keeping(encoder, keep), info, spark


@dataclass(frozen=True)
class _Inputs:
    """Files, whose lines and texts have fewer than ``most`` bytes, and what the engine reads; of that, how much it is,
    where parts outlive their job."""

    sources: Sequence[Source]
    frames: Sequence[Frame]
    most: int
    sizes: Sequence[Measured] = ()

    @property
    def origins(self) -> list[dict[str, Any]]:
        """What a manifest says of them."""
        return [*(source.origin for source in self.sources), *({"input": frame.name} for frame in self.frames)]

    def measured(
        self,
        record_encoder: RecordEncoder[Any],
        tokenizer: str | Path,
        images: ImageSettings | None,
        *facts: object,
    ) -> tuple["_Inputs", str]:
        """The same with ``sizes``; and the name of what is made of them by an encoder that was made of the files of a
        tokenizer, and of images, and by other ``facts``. Raises :class:`UserError` for columns that are missing."""
        with user_errors():
            sizes = [Measured.of(columns_read(frame, record_encoder)[0]) for frame in self.frames]
        folders = [place_at(tokenizer, "tokenizer"), *([] if images is None else [images.folder])]
        files = [states_of([file.path for file in source.files]) for source in self.sources]
        rows = [(f.name, f.kind, f.schema.json(), s) for f, s in zip(self.frames, sizes, strict=True)]
        work = work_of("tokenize", self.origins, files, rows, *map(states_in, folders), *facts)
        return replace(self, sizes=sizes), work

    def splits(self, spark: SparkSession, record_encoder: RecordEncoder[Any]) -> list[Split]:
        """What the parts read of the files."""
        return deal(spans_of(self.sources, record_encoder, EachByTasks(lambda: spark)), most=self.most)


def _fill(
    spark: SparkSession,
    writer: TableWriter | SparkTable,
    inputs: _Inputs,
    record_encoder: RecordEncoder[Any],
    fail: bool,
) -> None:
    try:
        if isinstance(writer, SparkTable):
            _save(spark, writer, inputs, record_encoder)
        else:
            _write(spark, writer, inputs, record_encoder, fail)
    except UserError as error:
        remedy = {"remedy": _NOT_ASIDE} if isinstance(writer, SparkTable) else {}
        named = name_malformed(error, record_encoder, most=inputs.most, **remedy)
        if named is error:
            raise
        raise named from error


def _write(
    spark: SparkSession, writer: TableWriter, inputs: _Inputs, record_encoder: RecordEncoder[Any], fail: bool
) -> None:
    splits, target = inputs.splits(spark, record_encoder), writer.target
    parts = splits[-1].part + 1 if splits else 0
    done = writer.go_on(parts + sum(size.parts for size in inputs.sizes))
    left = [split.row() for split in splits if split.part not in done]
    if left:
        tasks = create_tasks(spark, left, SPLIT, parts)
        writer.write(tasks, TokenizeParts(record_encoder, target, fail), _ORDER, "tokenize")
    for frame, size in zip(inputs.frames, inputs.sizes, strict=True):
        rows, columns = columns_read(frame, record_encoder)
        own = range(parts, parts + size.parts)
        if not done.issuperset(own):
            work = TokenizeFrame(record_encoder, target, fail, frame.name, frame.kind, columns, frame.schema.names)
            placed = in_parts(rows, size.parts, parts, done.intersection(own))
            writer.write(placed, work, FRAME_ORDER, f"tokenize {frame.name}")
        parts += size.parts


def _save(spark: SparkSession, table: SparkTable, inputs: _Inputs, record_encoder: RecordEncoder[Any]) -> None:
    columns = record_encoder.columns_out
    given = [*(one.origin["input"] for one in inputs.sources), *(frame.name for frame in inputs.frames)]
    of_inputs = [tally for name in dict.fromkeys(given) for tally in dataset_tallies(name, 0, 0)]
    own = [*COUNTED, *record_encoder.tallies, *of_inputs]
    own += [ALL_UNUSED, *(f"engine {number}" for number in range(len(ENGINES)))]
    names, made = tally_names(own, IMAGES in columns), []
    splits = inputs.splits(spark, record_encoder)
    if splits:
        tasks = create_tasks(spark, [split.row() for split in splits], SPLIT, splits[-1].part + 1)
        made.append(counted_rows(tasks, EncodeSplits(record_encoder), columns, names))
    for frame in inputs.frames:
        rows, read = columns_read(frame, record_encoder)
        work = EncodeRows(record_encoder, True, frame.name, frame.kind, read)
        made.append(counted_rows(rows, work, columns, names))
    table.save(reduce(DataFrame.unionAll, made), names, "tokenize")


@dataclass(frozen=True)
class TokenizeParts:
    """A function for ``mapInArrow``: batches of parts in; each part is encoded and written.

    The batches name splits of files, which are read here.
    """

    record_encoder: RecordEncoder[Any]
    target: PartFolder
    fail: bool

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Do all parts of a task."""
        encoder = Encoder(self.record_encoder.recipe)
        for part, rows in by_part(batches):
            with PartFile(self.target, part) as sink, RejectFile(self.target, part) as rejects:
                tokenizer = PartTokenizer(self.record_encoder, encoder, sink, None if self.fail else rejects)
                self._fill(tokenizer, rows)
                done = tokenizer.finish(rejects.finish())
            yield part_to_row(keep_part(self.target, done))

    def _fill(self, tokenizer: PartTokenizer, rows: Iterator[pa.RecordBatch]) -> None:
        # All of a part's splits are known before the first is read: the engine's batches are freed.
        for split in [Split(**row) for batch in rows for row in batch.to_pylist()]:
            tokenizer.add_split(split)


@dataclass(frozen=True)
class TokenizeFrame(TokenizeParts):
    """As :class:`TokenizeParts`, but the batches hold the records themselves, the ``columns`` that are read of those
    that are ``there`` in one input."""

    name: str
    kind: str
    columns: Sequence[str]
    there: Sequence[str]

    def _fill(self, tokenizer: PartTokenizer, rows: Iterator[pa.RecordBatch]) -> None:
        for batch in rows:
            records = records_of(batch, self.kind, self.columns, self.record_encoder)
            if records:
                tokenizer.unused.update(dict.fromkeys(set(self.there).difference(self.columns), len(records)))
                tokenizer.add(records, self.kind, self.name, self.name, numbered=False)


def _say_results(manifest: Manifest, folder: str | Path, notes: Sequence[str]) -> None:
    engine, counts, timing = (manifest.lineage[name] for name in ("engine", "counts", "timing"))
    header = ("documents in", "out", "quarantined", "empty", "rows", "tokens", "trained", "untrained", "bytes")
    names = ("documents_in", "documents_out", "quarantined", "empty", "rows", "tokens", "trained_tokens")
    row = [counts[name] for name in (*names, "untrained_tokens", "bytes")]
    for note in notes:
        say(note)
    if len(counts["datasets"]) > 1:
        rows = [[name, own["rows"], own["tokens"]] for name, own in counts["datasets"].items()]
        say(format_table(("input", "rows", "tokens"), rows) + "\n")
    say(format_table((*header, "seconds", "tokens/s"), [[*row, timing["seconds"], timing["tokens_per_second"]]]))
    say(f"wrote {folder} ({engine}, {counts['checked']} documents checked against Hugging Face tokenizers)")
