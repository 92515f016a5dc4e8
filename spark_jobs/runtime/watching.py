"""How far an engine is, as it tells itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql.utils import is_remote

from fft.console import progress

#: Tasks that have ended, and all that are known.
Counts = Callable[[], tuple[int, int]]


@contextmanager
def watched(spark: SparkSession, title: str) -> Iterator[None]:
    """Show, in a line that begins with the ``title``, how many tasks have ended of the work in the ``with`` block.

    Classic Spark is asked, Spark Connect tells; an engine that does not tell is watched by the clock.
    """
    with _told_by(spark) if is_remote() else _asked_of(spark) as counts, progress(title, counts):
        yield


@contextmanager
def _asked_of(spark: SparkSession) -> Iterator[Counts]:
    tracker = spark.sparkContext.statusTracker()
    seen: dict[int, tuple[int, int]] = {}
    before = {*tracker.getActiveStageIds()}

    def counts() -> tuple[int, int]:
        for stage in {*seen, *tracker.getActiveStageIds()} - before:
            info = tracker.getStageInfo(stage)
            if info is not None:  # else it is long over
                seen[stage] = (info.numCompletedTasks, info.numTasks)
        return sum(ended for ended, _ in seen.values()), sum(tasks for _, tasks in seen.values())

    yield counts


@contextmanager
def _told_by(spark: Any) -> Iterator[Counts]:
    known: dict[tuple[str, int], tuple[int, int]] = {}

    def hear(stages: Any, inflight_tasks: int, operation_id: str | None, done: bool) -> None:
        for stage in stages or ():
            known[str(operation_id), stage.stage_id] = (stage.num_completed_tasks, stage.num_tasks)

    def counts() -> tuple[int, int]:
        told = [*known.values()]
        return sum(ended for ended, _ in told), sum(tasks for _, tasks in told)

    spark.registerProgressHandler(hear)
    try:
        yield counts
    finally:
        spark.removeProgressHandler(hear)
