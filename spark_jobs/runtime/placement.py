"""Where engines run: how many tasks there are, and what each asks of Spark.

An engine wants a device, or all processors of a machine, for itself; Spark by default gives a task one core.
"""

import os
from dataclasses import dataclass

from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

#: Tasks of a job on a cluster, at most: enough that those of many machines end at about the same time.
_MOST_TASKS = 256


@dataclass(frozen=True)
class Placement:
    """How many ``tasks`` do the work, what each asks for (None: what the session says), and the threads of each on a
    machine of its own (None: as many as Spark gave it)."""

    tasks: int
    profile: ResourceProfile | None = None
    threads: int | None = None


def place_engines(spark: SparkSession, parts: int, gpus: int, num_engine: int | None = None) -> Placement:
    """Tasks for so many parts, each with an engine on so many GPUs, where the executors have any.

    On a local Spark, and on Sail, there is one task unless ``num_engine`` says otherwise; they share the processors. On
    a cluster, a task takes as many GPUs as its engine (``spark.task.resource.gpu.amount``), or all cores of an executor
    without GPUs, if the session says how many these are.
    """
    if is_local(spark):
        tasks = min(parts, num_engine or 1)
        return Placement(tasks, threads=max(1, len(os.sched_getaffinity(0)) // max(1, tasks)))
    return Placement(min(parts, num_engine or _MOST_TASKS), cluster_profile(spark, gpus))


def is_local(spark: SparkSession) -> bool:
    """Whether all tasks run on this machine: on a local Spark, and on Sail, which names no master."""
    master = spark.conf.get("spark.master", None) or "local"
    return master == "local" or master.startswith("local[")


def cluster_profile(spark: SparkSession, gpus: int) -> ResourceProfile | None:
    """What a task has to ask for, where it is not what the session's tasks get anyway."""
    there, given = (spark.conf.get(f"spark.{who}.resource.gpu.amount", None) for who in ("executor", "task"))
    if there is not None:
        return (
            None
            if given is not None and float(given) == gpus
            else _profile(TaskResourceRequests().resource("gpu", gpus))
        )
    cores, cpus = spark.conf.get("spark.executor.cores", None), spark.conf.get("spark.task.cpus", None)
    if cores is None or cpus is not None:
        return None
    return _profile(TaskResourceRequests().cpus(int(cores)))


def _profile(requests: TaskResourceRequests) -> ResourceProfile:
    return ResourceProfileBuilder().require(requests).build
