"""One way to get a Spark session, wherever the job runs."""

import atexit
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from pyspark.errors import PySparkException, PySparkRuntimeError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.utils import is_remote

from fft.errors import UserError

_ROOT = str(Path(__file__).resolve().parent.parent)
_NEED_ENGINE = (
    "Spark needs Java, and none was found: install Java 17 (apt-get install openjdk-17-jre-headless) or set JAVA_HOME; "
    "or run without Java on Sail: pip install pysail."
)
#: Loggers that only repeat, with a stack, what the driver is about to raise.
_ECHOES = (
    "org.apache.spark.executor.Executor",
    "org.apache.spark.scheduler.TaskSetManager",
    "org.apache.spark.sql.execution.datasources.FileFormatWriter",
    "org.apache.spark.util.Utils",
)


def get_session(name: str) -> SparkSession:
    """The active session (Databricks, a notebook), ``SPARK_REMOTE``'s, ``spark-submit``'s, or a local one.

    A local one runs on Java; where there is none, or with ``FFT_ENGINE=sail``, on Sail (``pip install pysail``).
    Raises :class:`UserError` when there is neither.
    """
    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    sail = os.environ.get("FFT_ENGINE") == "sail"
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(name)
    if "SPARK_REMOTE" in os.environ and not sail:
        return builder.getOrCreate()
    if sail or not _has_java():
        if importlib.util.find_spec("pysail") is None:
            raise UserError(_NEED_ENGINE)
        return _sail_session(name)
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


def _has_java() -> bool:
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit: Java runs already
        return True
    home = os.environ.get("JAVA_HOME")
    return bool(shutil.which("java") if home is None else shutil.which(os.path.join(home, "bin", "java")))


def _sail_session(name: str) -> SparkSession:
    """A session on a Sail server inside this process; it ends with the process."""
    from pysail.spark import SparkConnectServer

    os.environ.setdefault("RUST_LOG", "error")  # what goes wrong is raised as well
    server = SparkConnectServer()
    server.start(background=True)
    address, port = server.listening_address
    spark = SparkSession.builder.appName(name).remote(f"sc://{address}:{port}").getOrCreate()
    atexit.register(server.stop)
    atexit.register(spark.stop)  # before the server: the last registered goes first
    return spark


@lru_cache(maxsize=1)
def places_rows_by_number(spark: SparkSession) -> bool:
    """Whether ``repartitionById`` works: since Spark 4.1, on classic Spark and its Connect servers, not on Sail."""
    if not hasattr(DataFrame, "repartitionById"):
        return False
    if not is_remote():
        return True
    try:
        spark.range(1).repartitionById(1, F.lit(0)).count()
    except PySparkException:
        return False
    return True


def _mute_echoes(spark: SparkSession) -> None:
    jvm = getattr(spark, "_jvm", None)  # a Connect session has none, and its server's log is elsewhere
    if jvm is not None:
        log4j = jvm.org.apache.logging.log4j
        for logger in _ECHOES:
            log4j.core.config.Configurator.setLevel(logger, log4j.Level.OFF)


@contextmanager
def job_settings(spark: SparkSession) -> Iterator[None]:
    """Bound what goes to a Python worker at once; the session's own settings are put back afterwards."""
    settings = {
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
