"""All prompts of a job, from files and from what the engine reads: what is known of them, and the tasks that answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import SparkSession

from fft.corpus.files import Source
from fft.corpus.splits import SPLIT, Split
from fft.errors import UserError
from spark_jobs.dataframes import ORDER as FRAME_ORDER
from spark_jobs.dataframes import Frame, Measured
from spark_jobs.generation.answers import Asking
from spark_jobs.generation.fields import Fields, fields_of, turns_in
from spark_jobs.generation.frames import GenerateFrameParts, frame_schema, numbered
from spark_jobs.generation.parts import GenerateParts
from spark_jobs.generation.prompts import PromptKeys, prompt_splits, schemas_of
from spark_jobs.runtime.placement import Placement, is_local
from spark_jobs.runtime.tasks import create_tasks, to_tasks
from spark_jobs.token_table.work import states_of
from spark_jobs.token_table.writer import TableWriter

#: A task does its parts in their order, a part's splits in theirs.
_ORDER = ("part", "path", "start")


@dataclass(frozen=True)
class Prompts:
    """``splits`` of files; ``frames``, each with the number of its parts; the ``fields`` of all their rows; and what a
    manifest says of where they come from."""

    splits: Sequence[Split]
    frames: Sequence[tuple[Frame, int]]
    fields: Fields
    origins: Sequence[dict[str, Any]]

    @classmethod
    def find(
        cls,
        spark: SparkSession,
        sources: Sequence[Source],
        frames: Sequence[Frame],
        keys: PromptKeys,
        num_engine: int | None = None,
    ) -> "Prompts":
        """Look through the inputs. Raises :class:`UserError` where they have no prompts, or cannot be read.

        On one machine by no more workers than there will be engines: a later job would otherwise find a worker without
        one, and start a second beside that of the other.
        """
        splits = prompt_splits(sources)
        rows, turns = schemas_of(spark, sources, splits, keys, (num_engine or 1) if is_local(spark) else None)
        origins = [source.origin | {"changed": _changed(source)} for source in sources]
        counted = []
        for frame in frames:
            if frame.kind != "parquet":
                raise UserError(
                    f"`inputs` {frame.name} are lines behind a URL: have Spark read them, and give the DataFrame, or "
                    "mount the storage."
                )
            schema = frame_schema(frame.rows, frame.name)
            rows.append(schema)
            turns.append(turns_in(schema, keys.turns))
            found = Measured.of(frame.rows)
            origins.append({"input": frame.name, "rows": found.rows, "fingerprint": found.fingerprint})
            counted.append((frame, found.parts))
        return cls(splits, counted, fields_of(rows, turns, keys.prompt, images=bool(keys.beside)), origins)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return self._file_parts + sum(parts for _, parts in self.frames)

    @property
    def _file_parts(self) -> int:
        return self.splits[-1].part + 1 if self.splits else 0

    def answer(self, spark: SparkSession, writer: TableWriter, asking: Asking, place: Placement, fail: bool) -> None:
        """Have tasks answer all of them. Raises :class:`UserError` as tasks do."""
        first, target = self._file_parts, writer.target
        if self.splits:
            tasks = create_tasks(spark, [split.row() for split in self.splits], SPLIT, min(place.tasks, first))
            work = GenerateParts(asking, self.fields, target, fail)
            writer.write(tasks, work, _ORDER, "generate", profile=place.profile)
        for frame, parts in self.frames:
            rows = to_tasks(numbered(frame, parts, first), min(place.tasks, parts))
            work = GenerateFrameParts(asking, self.fields, target, fail, frame.name, frame.schema.names)
            writer.write(rows, work, FRAME_ORDER, f"generate {frame.name}", profile=place.profile)
            first += parts


def _changed(source: Source) -> int:
    """When its files were changed last, in nanoseconds: parts of other prompts must not be taken for these."""
    return max(changed for _, _, changed in states_of([file.path for file in source.files]))
