"""The tokenize job: records of raw files to a token table, one row a document."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from fft.data.manifest import Manifest, commit
from fft.errors import UserError
from spark_jobs.arrow import int_lists
from spark_jobs.documents import Keys, Malformed, find_sources, first_malformed, parse_record, read_records
from spark_jobs.encoding import ENGINES, Encoder, Recipe, load_recipe, surround
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

_DOCUMENT, _EMPTY, _MALFORMED = 0, 1, 2
_TOKENS = "input_ids array<int>, doc_ids array<string>, outcome int, piece int, engine int, checked int"
_REJECTS = "file string, reason string, record string"
_MALFORMED_MARK = "malformed record: "
#: Bytes of parquet a byte of text becomes, roughly: only for the progress line.
_BYTES_OUT_PER_BYTE_IN = 0.35


def tokenize_table(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path,
    *,
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
    Malformed records end the job (``on_error="fail"``) or go to ``output/_quarantine``. Raises :class:`UserError`
    for inputs and tokenizers that are none, and when no document is left. ``spark`` is by default the active session.
    """
    keys, folder = Keys(text_key, id_key), local_path(output, "-o")
    paths = local_paths(inputs, "-i")
    sources = find_sources(paths)
    input_bytes = sum(source.bytes for source in sources)
    check_output(folder, paths, overwrite)
    recipe, info = load_recipe(local_path(tokenizer, "--tokenizer"), eos, parse_special_tokens)
    parameters = {
        "tokenizer": str(tokenizer),
        "text_key": text_key,
        "id_key": id_key,
        "max_len": max_len,
        "eos": eos,
        "parse_special_tokens": parse_special_tokens,
        "on_error": on_error,
    }
    lineage = lineage_of("tokenize", paths, parameters)
    spark = spark or get_session("tokenize")
    start = time.monotonic()
    with claim(folder, [""], paths, lineage, overwrite), job_settings(spark, input_bytes):
        records = reduce(DataFrame.union, [read_records(spark, source, keys) for source in sources])
        outcomes = Observation("outcomes")
        tokens = records.transform(with_tokens, recipe, keys, max_len, fail=on_error == "fail")
        kept = tokens.observe(outcomes, *_tallies()).where(F.col("outcome") == _DOCUMENT)
        expected = int(input_bytes * _BYTES_OUT_PER_BYTE_IN)
        try:
            write_parquet(kept.select("input_ids", "doc_ids"), folder, "tokenize", expected)
        except UserError as error:
            raise _located(error, keys) from error
        counts = {name: value or 0 for name, value in outcomes.get.items()}
        if counts["quarantined"]:
            rejects = records.transform(rejected, keys)
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
    _report(manifest, engine, folder)
    return manifest


def with_tokens(df: DataFrame, recipe: Recipe, keys: Keys, max_len: int | None, fail: bool) -> DataFrame:
    """Records to token rows, empty and malformed ones with null ``input_ids`` and their ``outcome``."""
    return df.mapInArrow(_encoding(recipe, keys, max_len, fail), _TOKENS)


def rejected(df: DataFrame, keys: Keys) -> DataFrame:
    """The malformed records alone, with file and reason."""
    return df.mapInArrow(_rejecting(keys), _REJECTS)


def _tallies() -> list[Column]:
    first = F.col("piece") == 0

    def count(outcome: int) -> Column:
        return F.sum(F.when(first & (F.col("outcome") == outcome), 1).otherwise(0))

    return [
        F.sum(F.when(first, 1).otherwise(0)).alias("documents_in"),
        count(_DOCUMENT).alias("documents_out"),
        count(_EMPTY).alias("empty"),
        count(_MALFORMED).alias("quarantined"),
        F.max("engine").alias("engine"),
        F.sum("checked").alias("checked"),
    ]


def _encoding(recipe: Recipe, keys: Keys, max_len: int | None, fail: bool) -> Callable:
    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        encoder = Encoder(recipe)
        for batch in batches:
            documents, malformed = _parse(batch, keys)
            if malformed and fail:
                file, reason, _ = malformed[0]
                raise UserError(_MALFORMED_MARK + json.dumps([file, reason]))
            yield _token_rows(documents, len(malformed), encoder, max_len)

    return encode


def _rejecting(keys: Keys) -> Callable:
    def reject(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            _, malformed = _parse(batch, keys)
            columns = list(zip(*malformed, strict=True)) or [[], [], []]
            yield pa.RecordBatch.from_arrays(
                [pa.array(column, pa.string()) for column in columns], ["file", "reason", "record"]
            )

    return reject


def _parse(batch: pa.RecordBatch, keys: Keys) -> tuple[list[tuple[str, str]], list[tuple[str, str, str | None]]]:
    """Documents (text, id), and malformed records (file, reason, record)."""
    documents, malformed = [], []
    for kind, file, record, doc_id in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        try:
            documents.append(parse_record(kind, record, doc_id, keys))
        except Malformed as error:
            shown = None if record is None else record.decode("utf-8", "backslashreplace")
            malformed.append((file, str(error), shown))
    return documents, malformed


def _token_rows(
    documents: list[tuple[str, str]], malformed: int, encoder: Encoder, max_len: int | None
) -> pa.RecordBatch:
    ids, offsets, checked = encoder.encode([text for text, _ in documents]) if documents else (_NO_IDS, _ZERO, 0)
    full = np.flatnonzero(np.diff(offsets))  # no ids at all: an empty document
    empty = len(documents) - len(full)
    offsets = np.append(offsets[:-1][full], offsets[-1])
    ids, offsets = surround(ids, offsets, encoder.recipe.prefix, encoder.recipe.suffix)
    piece, document = np.zeros(len(full), np.int64), np.arange(len(full))
    if max_len is not None:
        counts = -(-np.diff(offsets) // max_len)
        document = np.repeat(document, counts)
        piece = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        offsets = np.append(offsets[:-1][document] + piece * max_len, offsets[-1])
    names = pa.array([doc_id for _, doc_id in documents], pa.string()).take(pa.array(full[document]))
    rest = empty + malformed
    nothing = pa.nulls(rest)
    columns = {
        "input_ids": pa.concat_arrays([int_lists(ids, offsets), nothing.cast(pa.list_(pa.int32()))]),
        "doc_ids": pa.concat_arrays(
            [
                pa.ListArray.from_arrays(pa.array(np.arange(len(names) + 1, dtype=np.int32)), names),
                nothing.cast(pa.list_(pa.string())),
            ]
        ),
        "outcome": _int32([_DOCUMENT] * len(names) + [_EMPTY] * empty + [_MALFORMED] * malformed),
        "piece": _int32(np.append(piece, np.zeros(rest))),
        "engine": _int32(np.full(len(names) + rest, encoder.engine or 0)),
        "checked": _int32([checked] * (len(names) + rest > 0) + [0] * (len(names) + rest - 1)),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


_NO_IDS, _ZERO = np.empty(0, np.int32), np.zeros(1, np.int64)


def _int32(values: Sequence[int] | np.ndarray) -> pa.Array:
    return pa.array(np.asarray(values, dtype=np.int32))


def _located(error: UserError, keys: Keys) -> UserError:
    text = str(error)
    if not text.startswith(_MALFORMED_MARK):
        return error
    file, reason = json.loads(text.removeprefix(_MALFORMED_MARK))
    return UserError(
        f"{first_malformed(file, keys)}: {reason}: mend it, or give --on_error quarantine to set such records aside."
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


def _report(manifest: Manifest, engine: str, folder: Path) -> None:
    counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
    if engine != ENGINES[0]:
        say(f"warning: ids were made by Hugging Face {engine}; they are exact, but this is many times slower.")
    header = ("documents in", "out", "quarantined", "empty", "rows", "tokens", "bytes", "seconds", "tokens/s")
    row = [counts[k] for k in ("documents_in", "documents_out", "quarantined", "empty", "rows", "tokens", "bytes")]
    say(format_table(header, [[*row, timing["seconds"], timing["tokens_per_second"]]]))
    say(f"wrote {folder} ({engine}, {counts['checked']} documents checked against Hugging Face tokenizers)")
