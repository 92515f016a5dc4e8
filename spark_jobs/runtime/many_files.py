"""Ask many files something in the tasks of the engine: a driver alone would wait an hour for a million footers."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from pyspark.sql import SparkSession

from fft.data.footer import each_of
from spark_jobs.runtime.session import user_errors
from spark_jobs.runtime.tasks import create_tasks

T = TypeVar("T")

#: So many files the driver asks by itself; and a task's.
_FEW, _FILES_OF_TASK = 1_000, 500


@dataclass(frozen=True)
class EachByTasks:
    """As ``each_of``, by tasks where there are many files; the ``session`` is asked for only then."""

    session: Callable[[], SparkSession]

    def __call__(self, ask: Callable[[str], T], paths: Sequence[str]) -> Iterator[T]:
        """What ``ask``, which has to be pickled, says of each file, in their order. Raises its :class:`UserError`."""
        if len(paths) <= _FEW:
            yield from each_of(ask, paths)
            return
        chunks = [list(paths[first : first + _FILES_OF_TASK]) for first in range(0, len(paths), _FILES_OF_TASK)]
        tasks = create_tasks(self.session(), [*enumerate(chunks)], "paths array<string>", len(chunks))
        with user_errors():
            rows = tasks.mapInArrow(AskEach(ask), "part int, answers binary").collect()
        for row in sorted(rows, key=lambda row: row["part"]):
            yield from pickle.loads(row["answers"])


@dataclass(frozen=True)
class AskEach:
    """A function for ``mapInArrow``: the paths of a part in, all answers to it out."""

    ask: Callable[[str], Any]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """See the class."""
        for batch in batches:
            for row in batch.to_pylist():
                answers = pickle.dumps([*each_of(self.ask, row["paths"])])
                columns = [pa.array([row["part"]], pa.int32()), pa.array([answers], pa.binary())]
                yield pa.RecordBatch.from_arrays(columns, ["part", "answers"])
