"""One way to get a Spark session, wherever the job runs."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspark.errors import PySparkRuntimeError
from pyspark.sql import SparkSession

from fft.errors import UserError

_ROOT = str(Path(__file__).resolve().parent.parent)
_NEED_JAVA = (
    "Spark needs Java, and none was found: install Java 17 (apt-get install openjdk-17-jre-headless) or set JAVA_HOME."
)
#: Loggers that only repeat, with a stack, what the driver is about to raise.
_ECHOES = (
    "org.apache.spark.executor.Executor",
    "org.apache.spark.scheduler.TaskSetManager",
    "org.apache.spark.sql.execution.datasources.FileFormatWriter",
    "org.apache.spark.util.Utils",
)


def get_session(name: str) -> SparkSession:
    """The active session (Databricks, a notebook), ``SPARK_REMOTE``'s, ``spark-submit``'s, or one on ``local[*]``.

    Raises :class:`UserError` when a local session is needed and there is no Java.
    """
    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(name)
    if "SPARK_REMOTE" in os.environ:
        return builder.getOrCreate()
    _check_java()
    # Python workers must find this package also when it is not installed.
    path = os.pathsep.join(p for p in (_ROOT, os.environ.get("PYTHONPATH")) if p)
    builder = builder.config("spark.executorEnv.PYTHONPATH", path)
    builder = builder.config("spark.log.level", "ERROR").config("spark.ui.showConsoleProgress", "false")
    try:
        spark = builder.getOrCreate()
    except PySparkRuntimeError as error:
        if "JAVA_GATEWAY_EXITED" not in str(error):
            raise
        raise UserError("Spark's Java process ended at once: install Java 17 and point JAVA_HOME at it.") from error
    _mute_echoes(spark)
    return spark


def _check_java() -> None:
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit: Java runs already
        return
    home = os.environ.get("JAVA_HOME")
    if not (shutil.which("java") if home is None else shutil.which(os.path.join(home, "bin", "java"))):
        raise UserError(_NEED_JAVA)


def _mute_echoes(spark: SparkSession) -> None:
    jvm = getattr(spark, "_jvm", None)  # a Connect session has none, and its server's log is elsewhere
    if jvm is not None:
        log4j = jvm.org.apache.logging.log4j
        for logger in _ECHOES:
            log4j.core.config.Configurator.setLevel(logger, log4j.Level.OFF)


@contextmanager
def job_settings(spark: SparkSession, input_bytes: int) -> Iterator[None]:
    """Bound what goes to a Python worker at once, and cut the input the same way whatever the number of cores.

    The session's own settings are put back afterwards.
    """
    settings = {
        "spark.sql.files.minPartitionNum": str(max(8, input_bytes >> 26)),
        "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
        "spark.sql.execution.arrow.maxBytesPerBatch": str(16 << 20),
    }
    before = {name: spark.conf.get(name, None) for name in settings}
    try:
        for name, value in settings.items():
            spark.conf.set(name, value)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                spark.conf.unset(name)
            else:
                spark.conf.set(name, value)


@contextmanager
def user_errors() -> Iterator[None]:
    """Make a :class:`UserError` of what users can mend: one raised in a Python worker, a file Spark cannot read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # classic Spark raises py4j's own errors, Connect has others
        text = str(error)
        if found := re.search(r"^fft\.errors\.UserError: (.*)$", text, re.MULTILINE):
            raise UserError(found.group(1)) from error
        if found := re.search(r"\[FAILED_READ_FILE\.\w+\] Encountered error while reading file (\S+)\. ", text):
            causes = re.findall(r"^Caused by: ([\w.$]+: .*)$", text, re.MULTILINE)
            reason = causes[-1] if causes else "Spark gave no reason"
            raise UserError(
                f"{found.group(1)} cannot be read ({reason}): is it whole? Restore or remove it."
            ) from error
        raise
