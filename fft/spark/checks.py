"""What a session must be able to do before a run begins on its executors: tasks side by side, and devices for them."""

import os
import time
from typing import TYPE_CHECKING, Any

from fft.console import say
from fft.errors import UserError, one_line
from fft.parallel.interfaces import address_towards
from fft.redaction import OF_STORES

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

#: Seconds that executors of a cluster that has just been started have to come.
_COME_WITHIN = 60.0
#: Beginnings of variables that say who asks stores and servers, and how ranks reach one another.
_HANDED_ON = (*OF_STORES, "HF_", "MLFLOW_", "DATABRICKS_", "NCCL_", "GLOO_", "OMP_", "TORCH_", "PYTORCH_", "FFT_")
_ALONE = "or train on this machine with local=True"


def session_of(given: "SparkSession | None") -> "SparkSession":
    """The session that is ``given``, or else the active one. Raises :class:`UserError` where there is none."""
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError(f"pyspark is not installed here: run this on a Spark cluster, {_ALONE}.") from error
    spark = given or SparkSession.getActiveSession()
    if spark is None:
        raise UserError(f"no Spark session is active: give one as `spark`, {_ALONE}.")
    return spark


def check_session(spark: "SparkSession", nodes: int, processes: int, use_gpu: bool) -> "ResourceProfile | None":
    """What each of ``nodes`` tasks has to ask for, where it is not what tasks get anyway.

    Raises :class:`UserError` where the tasks cannot run at the same time, or have no devices for their ``processes``.
    """
    master = setting(spark, "spark.master")
    if master is None:
        raise UserError(
            "the engine of this session runs no tasks side by side (barrier mode), as Sail and serverless do not: "
            f"use a cluster of classic Spark, {_ALONE}."
        )
    local = master == "local" or master.startswith("local[")
    if (setting(spark, "spark.dynamicAllocation.enabled") or "false").lower() == "true" and not local:
        raise UserError(
            "spark.dynamicAllocation.enabled is true, and Spark then runs no tasks side by side (barrier mode): start "
            "the session with it false and spark.executor.instances at the number of nodes or more."
        )
    profile = _devices(spark, processes, local) if use_gpu else None
    _check_slots(spark, nodes, profile)
    return profile


def setting(spark: "SparkSession", name: str) -> str | None:
    """A setting of a session; None where it has none, or does not tell."""
    try:
        return spark.conf.get(name, None)
    except Exception:  # classic Spark and Connect raise their own
        return None


def addresses(spark: "SparkSession") -> tuple[str, str]:
    """Where this process may listen, and by which name executors reach it there."""
    from pyspark.sql.utils import is_remote

    driver = setting(spark, "spark.driver.host") or "127.0.0.1"
    if not is_remote():
        return setting(spark, "spark.driver.bindAddress") or driver, driver
    own = address_towards(driver)
    return own, own


def _devices(spark: "SparkSession", processes: int, local: bool) -> "ResourceProfile | None":
    """Have each task ask for as many GPUs as it starts ranks; a Spark on this machine alone shares out none."""
    there, given = (setting(spark, f"spark.{who}.resource.gpu.amount") for who in ("executor", "task"))
    if local:
        return None
    if there is None or float(there) < processes:
        has = "no GPUs that Spark knows of" if there is None else f"{there} GPUs each"
        raise UserError(
            f"`processes`={processes} on each node, and executors have {has} (spark.executor.resource.gpu.amount): "
            f"give `processes` at most as many, or use_gpu=False."
        )
    if given is not None and float(given) == processes:
        return None
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

    return ResourceProfileBuilder().require(TaskResourceRequests().resource("gpu", processes)).build


def _check_slots(spark: "SparkSession", nodes: int, profile: "ResourceProfile | None") -> None:
    """Wait until as many tasks can run at once. Otherwise Spark would try again for ten minutes, and say nothing."""
    begun, told = time.monotonic(), False
    while (slots := _slots(spark, profile)) is not None and slots < nodes:
        waited = time.monotonic() - begun
        if waited > _COME_WITHIN or (setting(spark, "spark.master") or "").startswith("local"):
            raise UserError(
                f"`nodes`={nodes} are so many tasks at once, this session has room for {slots}: give fewer `nodes`, "
                f"with more `processes` each, or free or add executors."
            )
        if waited > 2 and not told:
            say(f"waiting for executors: room for {slots} of {nodes} tasks")
            told = True
        time.sleep(0.2)


def _slots(spark: "SparkSession", profile: "ResourceProfile | None") -> int | None:
    """How many tasks can run at once; None where it is not told, as by a Connect server."""
    try:
        context: Any = spark.sparkContext._jsc  # a JVM's objects have no types here
        context = context.sc()
        profiles = context.resourceProfileManager()
        asked = profiles.defaultResourceProfile() if profile is None else profile._java_resource_profile
        return None if asked is None else int(context.maxNumConcurrentTasks(asked))
    except Exception:  # no JVM here, or one that may not be asked
        return None


def credentials() -> dict[str, str]:
    """What of this process's environment ranks need to reach stores, servers and one another."""
    return {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}


def spark_error(error: Exception) -> UserError:
    """What Spark says of a job that it ended, as a sentence."""
    said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return UserError(f"Spark ended the job: {one_line(Exception(' '.join(said)[:300]))}.")
