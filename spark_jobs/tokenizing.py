"""The tokenize job: records of raw files to a token table, one row a document."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from fft.data.manifest import Manifest, commit
from fft.errors import UserError
from spark_jobs.arrow import int_lists
from spark_jobs.chat import Chat, load_chat
from spark_jobs.documents import Keys, Malformed, Source, find_sources, first_malformed, read_records
from spark_jobs.encoding import ENGINES, Encoder, Recipe, load_recipe, surround
from spark_jobs.outcomes import DOCUMENT, EMPTY, MALFORMED, OUTCOMES, with_outcomes
from spark_jobs.session import get_session, job_settings
from spark_jobs.summary import format_table, say
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

_REJECTS = "file string, reason string, record string"
_MALFORMED_MARK = "malformed record: "
#: Bytes of parquet a byte of text becomes, roughly: only for the progress line.
_BYTES_OUT_PER_BYTE_IN = 0.35


def tokenize_table(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    *,
    task: str = "pretrain",
    text_key: str = "text",
    id_key: str = "id",
    max_len: int | None = None,
    eos: str = "auto",
    parse_special_tokens: bool = False,
    on_error: str = "fail",
    overwrite: bool = False,
    spark: SparkSession | None = None,
) -> Manifest:
    """Tokenize documents of JSON lines, parquet or text files into the folder ``output``.

    One row a document with ``input_ids`` and ``doc_ids``; with ``max_len``, longer documents become several rows.
    With ``task="chat"``, documents are conversations, encoded by the tokenizer's chat template, and rows have
    ``labels``: see :mod:`spark_jobs.chat`; ``text_key``, ``eos`` and ``parse_special_tokens`` are for texts only.
    Malformed records end the job (``on_error="fail"``) or go to ``output/_quarantine``. Raises :class:`UserError`
    for inputs and tokenizers that are none, and when no document is left. ``spark`` is by default the active session.
    """
    folder = local_path(output, "-o")
    paths = local_paths(inputs, "-i")
    sources = find_sources(paths)
    input_bytes = sum(source.bytes for source in sources)
    check_output(folder, paths, overwrite)
    place = local_path(tokenizer, "--tokenizer")
    parameters = {"task": task, "tokenizer": str(tokenizer), "id_key": id_key, "max_len": max_len, "on_error": on_error}
    if task == "chat":
        _check_chat(sources, text_key, eos, parse_special_tokens)
        job, info = load_chat(place, id_key, max_len)
    else:
        recipe, info = load_recipe(place, eos, parse_special_tokens)
        job = Pretrain(Keys(text_key, id_key), recipe, max_len)
        parameters |= {"text_key": text_key, "eos": eos, "parse_special_tokens": parse_special_tokens}
    lineage = lineage_of("tokenize", paths, parameters)
    spark = spark or get_session("tokenize")
    start = time.monotonic()
    with claim(folder, [""], paths, lineage, overwrite), job_settings(spark, input_bytes):
        records = reduce(DataFrame.union, [read_records(spark, source, job) for source in sources])
        outcomes = Observation("outcomes")
        tokens = records.transform(with_tokens, job, fail=on_error == "fail")
        kept = tokens.observe(outcomes, *_tallies(job)).where(F.col("outcome") == DOCUMENT)
        expected = int(input_bytes * _BYTES_OUT_PER_BYTE_IN)
        try:
            write_parquet(kept.select(*job.columns_out), folder, "tokenize", expected)
        except UserError as error:
            raise _located(error, job) from error
        counts = {name: value or 0 for name, value in outcomes.get.items()}
        if counts["quarantined"]:
            rejects = records.transform(rejected, job)
            place = (folder / "_quarantine").absolute().as_uri()
            rejects.write.mode("append").option("ignoreNullFields", "false").json(place)
        files = measure(folder)
        size = total(files)
        counts |= {"rows": size.rows, "tokens": size.tokens, "bytes": size.bytes}
        _check_counts(counts, paths, on_error)
        engine = ENGINES[counts.pop("engine")]
        seconds = time.monotonic() - start
        lineage = with_results({**lineage, "engine": engine}, counts, size.tokens, seconds)
        manifest = Manifest(files, size.rows, size.tokens, info, seq_len=max_len, lineage=lineage)
        commit(folder, manifest)
    _report(manifest, engine, folder, job.notes(counts))
    return manifest


def _check_chat(sources: Sequence[Source], text_key: str, eos: str, parse_special_tokens: bool) -> None:
    for source in sources:
        if source.kind == "text":
            raise UserError(f"-i {source.path} holds plain text, but --task chat needs JSON lines or parquet.")
    flags = {"--text_key": text_key != "text", "--eos": eos != "auto", "--parse_special_tokens": parse_special_tokens}
    for flag, given in flags.items():
        if given:
            raise UserError(f"{flag} is for --task pretrain: the chat template decides; leave it out.")


@dataclass(frozen=True)
class Pretrain:
    """The task ``pretrain``, one text a document; see :class:`spark_jobs.documents.Task`."""

    keys: Keys
    recipe: Recipe
    max_len: int | None

    schema = f"input_ids array<int>, {OUTCOMES}"
    columns_out = ("input_ids", "doc_ids")

    def columns(self, df: DataFrame, source: Source) -> tuple[Column, Column]:
        """The text and the id."""
        return self.keys.columns(df, source)

    def parse(self, kind: str, record: bytes | None, doc_id: str | None) -> tuple[str, str]:
        """The text and the id, else a hash. Raises :class:`Malformed`."""
        return self.keys.parse(kind, record, doc_id)

    def row_records(self, file: pq.ParquetFile) -> Iterator[bytes | None]:
        """As :meth:`columns`, read by the driver."""
        return self.keys.row_records(file)

    def token_rows(self, documents: list[tuple[str, str]], malformed: int, encoder: Encoder) -> pa.RecordBatch:
        """Rows of a batch's texts, those that are empty or malformed without tokens."""
        ids, offsets, checked = encoder.encode([text for text, _ in documents]) if documents else (_NO_IDS, _ZERO, 0)
        full = np.flatnonzero(np.diff(offsets))  # no ids at all: an empty document
        empty = len(documents) - len(full)
        offsets = np.append(offsets[:-1][full], offsets[-1])
        ids, offsets = surround(ids, offsets, self.recipe.prefix, self.recipe.suffix)
        piece, document = np.zeros(len(full), np.int64), np.arange(len(full))
        if self.max_len is not None:
            counts = -(-np.diff(offsets) // self.max_len)
            document = np.repeat(document, counts)
            piece = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
            offsets = np.append(offsets[:-1][document] + piece * self.max_len, offsets[-1])
        names = pa.array([doc_id for _, doc_id in documents], pa.string()).take(pa.array(full[document]))
        return with_outcomes({"input_ids": int_lists(ids, offsets)}, names, piece, empty, malformed, encoder, checked)

    @staticmethod
    def tallies() -> dict[str, Column]:
        """No counts but those of every task."""
        return {}

    def notes(self, counts: dict) -> list[str]:
        """Nothing to say about the counts."""
        return []


def with_tokens(df: DataFrame, job: Pretrain | Chat, fail: bool) -> DataFrame:
    """Records to token rows, empty and malformed ones with null ``input_ids`` and their ``outcome``."""
    return df.mapInArrow(_encoding(job, fail), job.schema)


def rejected(df: DataFrame, job: Pretrain | Chat) -> DataFrame:
    """The malformed records alone, with file and reason."""
    return df.mapInArrow(_rejecting(job), _REJECTS)


def _tallies(job: Pretrain | Chat) -> list[Column]:
    first = F.col("piece") == 0

    def count(outcome: int) -> Column:
        return F.sum(F.when(first & (F.col("outcome") == outcome), 1).otherwise(0))

    return [
        F.sum(F.when(first, 1).otherwise(0)).alias("documents_in"),
        count(DOCUMENT).alias("documents_out"),
        count(EMPTY).alias("empty"),
        count(MALFORMED).alias("quarantined"),
        F.max("engine").alias("engine"),
        F.sum("checked").alias("checked"),
        *(column.alias(name) for name, column in job.tallies().items()),
    ]


def _encoding(job: Pretrain | Chat, fail: bool) -> Callable:
    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        encoder = Encoder(job.recipe)
        for batch in batches:
            documents, malformed = _parse(batch, job)
            if malformed and fail:
                file, reason, _ = malformed[0]
                raise UserError(_MALFORMED_MARK + json.dumps([file, reason]))
            yield job.token_rows(documents, len(malformed), encoder)

    return encode


def _rejecting(job: Pretrain | Chat) -> Callable:
    def reject(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            _, malformed = _parse(batch, job)
            columns = list(zip(*malformed, strict=True)) or [[], [], []]
            yield pa.RecordBatch.from_arrays(
                [pa.array(column, pa.string()) for column in columns], ["file", "reason", "record"]
            )

    return reject


def _parse(
    batch: pa.RecordBatch, job: Pretrain | Chat
) -> tuple[list[tuple[object, str]], list[tuple[str, str, str | None]]]:
    """Documents and their ids, and malformed records (file, reason, record)."""
    documents, malformed = [], []
    for kind, file, record, doc_id in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        try:
            documents.append(job.parse(kind, record, doc_id))
        except Malformed as error:
            shown = None if record is None else record.decode("utf-8", "backslashreplace")
            malformed.append((file, str(error), shown))
    return documents, malformed


_NO_IDS, _ZERO = np.empty(0, np.int32), np.zeros(1, np.int64)


def _located(error: UserError, job: Pretrain | Chat) -> UserError:
    text = str(error)
    if not text.startswith(_MALFORMED_MARK):
        return error
    file, reason = json.loads(text.removeprefix(_MALFORMED_MARK))
    return UserError(
        f"{first_malformed(file, job)}: {reason}: mend it, or give --on_error quarantine to set such records aside."
    )


def _check_counts(counts: dict, inputs: Sequence[Path], on_error: str) -> None:
    if counts["documents_in"] != counts["documents_out"] + counts["empty"] + counts["quarantined"]:
        raise UserError(f"the accounts do not balance ({counts}): an input changed while it was read; run again.")
    if counts["rows"] < counts["documents_out"]:
        raise UserError(f"fewer rows than documents were written ({counts}): check the output's disk and run again.")
    if not counts["documents_out"]:
        names = ", ".join(map(str, inputs))
        raise UserError(
            f"-i {names} holds no documents: {counts['empty']} are empty and {counts['quarantined']} malformed."
        )


def _report(manifest: Manifest, engine: str, folder: Path, notes: Sequence[str]) -> None:
    counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
    if engine != ENGINES[0]:
        say(f"warning: ids were made by Hugging Face {engine}; they are exact, but this is many times slower.")
    header = ("documents in", "out", "quarantined", "empty", "rows", "tokens", "bytes", "seconds", "tokens/s")
    row = [counts[k] for k in ("documents_in", "documents_out", "quarantined", "empty", "rows", "tokens", "bytes")]
    for note in notes:
        say(note)
    say(format_table(header, [[*row, timing["seconds"], timing["tokens_per_second"]]]))
    say(f"wrote {folder} ({engine}, {counts['checked']} documents checked against Hugging Face tokenizers)")
