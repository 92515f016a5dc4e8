"""Who writes a job's tables: the job itself, part by part, or Spark's own writer."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pyspark.sql import SparkSession

from fft.errors import UserError
from spark_jobs.parameters import is_table_name
from spark_jobs.token_table.output import Output, place_at
from spark_jobs.token_table.spark_output import SparkOutput, by_spark


def output_at(
    output: str | Path,
    names: Sequence[str],
    inputs: Sequence[object],
    overwrite: bool,
    table_format: str | None,
    writer: str | None,
    session: Callable[[], SparkSession],
) -> Output | SparkOutput:
    """Where a job writes its tables ``names``. ``inputs`` that are paths or names must not be touched; the
    ``session`` is asked for when it is needed.

    Raises :class:`UserError` for an output that the ``writer`` cannot write.
    """
    given = [path for path in inputs if isinstance(path, str | Path)]
    if by_spark(writer, output):
        return SparkOutput(session, str(output), names, given, overwrite, table_format)
    paths = [path for path in given if not is_table_name(path)]
    return Output(place_at(output, "output"), names, paths, overwrite, table_format or "parquet")


def check_writer(writer: str | None, output: str | Path, on_error: str = "fail") -> None:
    """Raise :class:`UserError` for an output that the ``writer`` cannot write, and for what Spark's has no place."""
    if not by_spark(writer, output):
        place_at(output, "output")
    elif on_error == "quarantine":
        raise UserError(
            '`on_error="quarantine"` sets records aside in files beside the table, where Spark\'s own writer has none: '
            'leave it out, or give the records to the transform `spark_jobs.tokenize(.., on_error="quarantine")`.'
        )
