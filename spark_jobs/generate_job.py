"""The generate job: prompts of a table to a table of answers, one engine a worker."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from fft.console import format_table, say
from fft.corpus.accounts import UNUSED, finished_manifest, lineage_of, timing_of
from fft.corpus.files import find_sources
from fft.data.known import LeftOut
from fft.data.manifest import Manifest
from fft.errors import UserError
from fft.images.rules import LIMITS, ImageSettings
from fft.serve.engines import EngineOptions
from fft.serve.prompt_flags import image_settings_of
from fft.serve.sampling import Sampling, sampling_of
from spark_jobs.dataframes import by_reader, open_frames
from spark_jobs.generation.answers import Asking
from spark_jobs.generation.engine import Wanted
from spark_jobs.generation.fields import ERROR, fields_of, turns_in
from spark_jobs.generation.frames import GenerateRows, frame_schema, spark_schema
from spark_jobs.generation.inputs import Prompts
from spark_jobs.generation.prompts import PromptKeys
from spark_jobs.parameters import check_parameters
from spark_jobs.runtime.placement import place_engines
from spark_jobs.runtime.session import get_session, job_settings
from spark_jobs.token_table.kept import waiting
from spark_jobs.token_table.output import Output, local_path, place_at
from spark_jobs.token_table.work import states_in, work_of
from spark_jobs.token_table.writer import TableWriter

_SAMPLING = frozenset(field.name for field in fields(Sampling))
_ENGINE = frozenset(field.name for field in fields(EngineOptions)) - {"name"} | {"engine"}
_IMAGES = frozenset(("image_path", *LIMITS))
#: What is counted of every part.
_COUNTED = ("prompts_in", "prompts_out", "quarantined", "prompt_tokens", "finished stop", "finished length")


def generate_table(
    inputs: str | Path | DataFrame | Sequence[str | Path | DataFrame],
    output: str | Path,
    model: str | Path,
    *,
    prompt_key: str = "prompt",
    id_key: str = "id",
    chat: str = "auto",
    system: str | None = None,
    num_engine: int | None = None,
    on_error: str = "fail",
    format: str = "parquet",
    overwrite: bool = False,
    spark: SparkSession | None = None,
    **settings: Any,
) -> Manifest:
    """Answer the prompts of JSON lines, parquet or text files, or of DataFrames, into the folder ``output``.

    One row an answer: the columns of the prompt's row, and ``messages`` (the conversation, its last turn the answer),
    ``text``, ``finish_reason``, ``tokens`` and ``sample`` (0 to ``n`` - 1). Prompts are texts under ``prompt_key``, or
    conversations under ``messages`` or ``conversation``; ``chat`` and ``system`` are as in :mod:`fft.serve.prompts`.
    ``settings`` are those of :class:`fft.serve.sampling.Sampling` and :class:`fft.serve.engines.EngineOptions`. With
    ``image_path``, a folder that workers see, too, prompts may have images, in all forms that the tokenize job reads,
    within ``max_pixels``, ``min_pixels`` and ``max_tiles``; a column ``images`` has those of each conversation.

    The samples of a row depend on the seed and its id, without one on its place in the input: on no partitioning. Of an
    interrupted job, finished parts stay, and the same call goes on from them. ``num_engine`` engines work at a time: by
    default one on a local Spark, on a cluster one for each task that runs at once. Malformed rows end the job
    (``on_error="fail"``) or go to ``output/_quarantine``. Raises :class:`UserError` for inputs and models that are
    none, and when nothing could be answered. ``spark`` is by default the active session.
    """
    check_parameters(locals())
    folder, sampling = place_at(output, "output"), sampling_of(settings)
    wanted = Wanted(_model_path(model), _engine(settings), images=_images(settings))
    given = [inputs] if isinstance(inputs, str | Path | DataFrame) else inputs
    unread, paths = by_reader(given)
    left_out, keys = LeftOut(), PromptKeys.of(prompt_key, id_key, wanted.images is not None)
    sources = find_sources(paths, id_key, left_out, for_engine := [])
    for _ in (file for source in sources for file in source.files if file.doc_id is not None):
        left_out.add(f"partition column {id_key}")
    table = Output(folder, [""], paths, overwrite, format)
    table.check()
    start = time.monotonic()
    spark = spark or get_session("generate")
    prompts = Prompts.find(spark, sources, open_frames(spark, [*unread, *for_engine]), keys, num_engine)
    placement = place_engines(spark, prompts.parts, wanted.options.tensor_parallel_size, num_engine)
    asking = Asking(replace(wanted, threads=placement.threads), sampling, keys, chat, system)
    parameters = _parameters(asking)
    lineage = lineage_of("generate", prompts.origins, parameters | {"on_error": on_error})
    work = _work(parameters, prompts, wanted)
    _tell_waiting(table, work, prompts.parts)
    with table.claim(lineage, work, dear=True) as writers, job_settings(spark):
        prompts.answer(spark, writers[""], asking, placement, on_error == "fail")
        manifest = _finished(writers[""], prompts.parts, lineage | left_out.facts(), start)
        writers[""].finish(manifest)
    _say_results(manifest, folder, [*left_out.notes(), *prompts.fields.notes])
    return manifest


def generate(
    df: DataFrame,
    *,
    model: str | Path,
    prompt_key: str = "prompt",
    id_key: str = "id",
    chat: str = "auto",
    system: str | None = None,
    on_error: str = "fail",
    **settings: Any,
) -> DataFrame:
    """The rows of ``df`` with answers to their prompts, as a DataFrame: columns and parameters as in
    :func:`generate_table`.

    Nothing is computed before the result is used, and all of it again whenever it is used again: write it, or let
    :func:`generate_table` do so, which goes on where it was interrupted. A row's samples depend on the seed and its id,
    without one on its prompt, so equal rows without ids get equal samples. With ``on_error="quarantine"``, malformed
    rows stay, and a column ``error`` says why. Raises :class:`UserError` for parameters and columns that are none.
    """
    check_parameters(locals())
    wanted = Wanted(_model_path(model), _engine(settings), images=_images(settings))
    sampling, images = sampling_of(settings), wanted.images is not None
    keys, fail = PromptKeys.of(prompt_key, id_key, images), on_error == "fail"
    schema = frame_schema(df, "DataFrame")
    rows = fields_of([schema], [turns_in(schema, keys.turns)], prompt_key, ERROR, images)
    work = GenerateRows(Asking(wanted, sampling, keys, chat, system), rows, schema.names, fail)
    out = spark_schema(rows.rows(sampling.logprobs is not None, not fail))
    profile = place_engines(df.sparkSession, 1, wanted.options.tensor_parallel_size).profile
    return df.toDF(*[f"_{i}" for i in range(len(schema.names))]).mapInArrow(work, out, profile=profile)


def _engine(settings: Mapping[str, Any]) -> EngineOptions:
    """The settings of the engine. Raises :class:`UserError` for one that is neither of the engine nor of sampling."""
    known = sorted(_ENGINE | _SAMPLING | _IMAGES)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UserError(f"`{unknown[0]}` is no setting of generation, which are {', '.join(known)}.")
    given = {"name" if name == "engine" else name: value for name, value in settings.items() if name in _ENGINE}
    if given.get("lora") is not None:
        given["lora"] = str(local_path(given["lora"], "lora").absolute())
    return EngineOptions(**given)


def _images(settings: Mapping[str, Any]) -> ImageSettings | None:
    """What is said of images. Raises :class:`UserError` for a folder that is none, and for numbers that are none."""
    given = {name: settings.get(name) for name in _IMAGES}
    check_parameters(given)
    if given["image_path"] is not None:
        given["image_path"] = local_path(given["image_path"], "image_path")
    return image_settings_of(given)


def _model_path(model: str | Path) -> str:
    path = local_path(model, "model").absolute()
    if not (path / "config.json").is_file():
        raise UserError(f"`model` {model} has no config.json: give a Hugging Face model directory.")
    return str(path)


def _parameters(asking: Asking) -> dict[str, Any]:
    """What a manifest says of how answers were made."""
    engine = {f"engine_{name}": value for name, value in asdict(asking.wanted.options).items() if name != "name"}
    keys = {"prompt_key": asking.keys.prompt, "id_key": asking.keys.id, "chat": asking.chat, "system": asking.system}
    model = {"model": asking.wanted.model, "engine": asking.wanted.options.name}
    images = asking.wanted.images
    seen = {} if images is None else {"image_path": images.folder, **asdict(images.limits)}
    return model | keys | asdict(asking.sampling) | engine | seen


def _work(parameters: Mapping[str, Any], prompts: Prompts, wanted: Wanted) -> str:
    """A name for all that decides what is in the parts; not for what becomes of malformed rows, so that a job that one
    has ended goes on when they shall be set aside."""
    folders = [wanted.model] + ([wanted.options.lora] if wanted.options.lora else [])
    columns = [str(prompts.fields.carried), str(prompts.fields.turns)]
    return work_of("generate", parameters, prompts.origins, *map(states_in, folders), columns, prompts.parts)


def _tell_waiting(table: Output, work: str, parts: int) -> None:
    """Say what is finished already. Raises :class:`UserError` where finished parts of other work would be lost."""
    found = waiting(table.folder)
    mine = found.pop(work, 0)
    if any(found.values()) and not table.overwrite:
        raise UserError(
            f"`output` {table.folder} holds {sum(found.values())} finished parts of another generation, which had "
            "another model, other prompts or settings: repeat that command, give `overwrite=True` to drop them, or "
            "another folder."
        )
    if mine:
        say(f"going on: {mine} of {parts} parts are finished already")


def _finished(writer: TableWriter, parts: int, lineage: Mapping[str, Any], start: float) -> Manifest:
    """The manifest. Raises :class:`UserError` when the accounts do not balance, and when there is no answer."""
    tallies = writer.tallies
    counts = {name.replace(" ", "_"): tallies[name] for name in (*_COUNTED, "engine_starts")}
    there = [part.part for part in writer.parts]
    if there != list(range(parts)) or counts["prompts_in"] != counts["prompts_out"] + counts["quarantined"]:
        raise UserError(
            f"the accounts do not balance ({counts}, {len(there)} of {parts} parts): this is a fault of the job; "
            "please report it."
        )
    if not counts["prompts_out"]:
        raise UserError(f"{', '.join(lineage['inputs'])} holds no prompts: {counts['quarantined']} rows are malformed.")
    unused = {key.removeprefix(UNUSED): tallies[key] for key in sorted(tallies) if key.startswith(UNUSED)}
    engines = sorted(name.removeprefix("engine ") for name in tallies if name.startswith("engine "))
    lineage, timing = {**lineage, "engine": ", ".join(engines)}, timing_of(start, writer.tokens)
    return finished_manifest(writer.parts, lineage, {**counts, "unused_keys": unused}, timing, None, None)


def _say_results(manifest: Manifest, folder: str, notes: Sequence[str]) -> None:
    counts, timing = manifest.lineage["counts"], manifest.lineage["timing"]
    for note in notes:
        say(note)
    if counts["unused_keys"]:
        left = ", ".join(f"{key} ({count})" for key, count in counts["unused_keys"].items())
        say(f"note: keys of turns that the chat template does not read, and in how many they are: {left}.")
    if counts["finished_length"]:
        say(f"note: {counts['finished_length']} of {manifest.rows} answers were cut at the limit of tokens.")
    header = ("prompts in", "out", "quarantined", "rows", "prompt tokens", "tokens", "seconds", "tokens/s")
    names = ("prompts_in", "prompts_out", "quarantined", "rows", "prompt_tokens", "tokens")
    say(format_table(header, [[*(counts[name] for name in names), timing["seconds"], timing["tokens_per_second"]]]))
    say(f"wrote {folder} ({manifest.lineage['engine']}, engines started: {counts['engine_starts']})")
