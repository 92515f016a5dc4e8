"""One way to get a Spark session, wherever the job runs."""

import atexit
import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from pyspark.errors import PySparkException, PySparkRuntimeError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.utils import is_remote

from fft.console import say
from fft.errors import UserError

_ROOT = str(Path(__file__).resolve().parents[2])
_NEED_ENGINE = (
    "Spark needs Java, and none was found: install Java 17 (apt-get install openjdk-17-jre-headless) or set JAVA_HOME; "
    "or run without Java on Sail: pip install pysail."
)
#: What ``FFT_ENGINE`` may be.
_ENGINES = ("", "spark", "sail")
_SHIP = (
    "make dist writes what they need: a wheel to install there, and a zip for spark-submit --py-files, or, where a "
    "Connect server did not take it from here, for spark.addArtifacts(.., pyfile=True)."
)
#: Bounds of what goes to a Python worker at once.
_SETTINGS = {
    "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
    "spark.sql.execution.arrow.maxBytesPerBatch": str(16 << 20),
}
#: Sessions on servers that were started here, which have this package.
_OWN: list[SparkSession] = []
#: Seconds; one is usual.
_SAIL_STARTS_WITHIN = 60
#: Loggers that only repeat, with a stack, what the driver is about to raise.
_ECHOES = (
    "org.apache.spark.executor.Executor",
    "org.apache.spark.scheduler.TaskSetManager",
    "org.apache.spark.sql.execution.datasources.FileFormatWriter",
    "org.apache.spark.util.Utils",
)


def get_session(name: str, given: SparkSession | None = None) -> SparkSession:
    """The ``given`` session, else the active one (Databricks, a notebook), ``SPARK_REMOTE``'s, ``spark-submit``'s, or a
    local one.

    That one runs on Java; where there is none, or with ``FFT_ENGINE=sail``, on Sail (``pip install pysail``).
    Raises :class:`UserError` when there is neither, and for another ``FFT_ENGINE``.
    """
    if given is not None:
        return _prepared(given)
    engine = os.environ.get("FFT_ENGINE", "")
    if engine not in _ENGINES:
        raise UserError(f"FFT_ENGINE={engine} is no engine: it may be sail, or spark, or be left unset.")
    active = SparkSession.getActiveSession()
    if active is not None:
        return _prepared(active)
    sail = engine == "sail"
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(name)
    if "SPARK_REMOTE" in os.environ and not sail:
        return _prepared(builder.getOrCreate())
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


def _prepared(spark: SparkSession) -> SparkSession:
    """A session that others have made, the workers of which may lack this package."""
    if is_remote() and spark not in _OWN:
        _ship_code(spark)
    return spark


def _has_java() -> bool:
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # spark-submit: Java runs already
        return True
    home = os.environ.get("JAVA_HOME")
    return bool(shutil.which("java") if home is None else shutil.which(os.path.join(home, "bin", "java")))


def _sail_session(name: str) -> SparkSession:
    """A session on a Sail server of its own, in a process that ends with this one, see :mod:`.sail_server`.

    (Inside this process its threads would outlive the interpreter, which then aborts.)
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RUST_LOG": os.environ.get("RUST_LOG", "error")}  # what goes wrong is raised as well
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (_ROOT, environment.get("PYTHONPATH")) if p)
    command = [sys.executable, "-m", "spark_jobs.runtime.sail_server", str(port), str(os.getpid())]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    _wait_for(server, port)
    spark = SparkSession.builder.appName(name).remote(f"sc://127.0.0.1:{port}").getOrCreate()
    _OWN.append(spark)
    atexit.register(spark.stop)  # before the server: the last registered goes first
    return spark


def _wait_for(server: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + _SAIL_STARTS_WITHIN
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise UserError(
        f"Sail did not start within {_SAIL_STARTS_WITHIN} s: see what `python -m pysail spark server` says."
    )


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
    """Bound what goes to a Python worker at once; the session's own settings are put back afterwards.

    Serverless sessions let few settings be set: what is refused is told, once, and the job goes on without it.
    """
    before: dict[str, str | None] = {}
    for name, value in _SETTINGS.items():
        try:
            found = spark.conf.get(name, None)
            spark.conf.set(name, value)
        except Exception:  # classic Spark and Connect raise their own
            _tell_refused(name)
        else:
            before[name] = found
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                spark.conf.unset(name)
            else:
                spark.conf.set(name, value)


@lru_cache
def _tell_refused(name: str) -> None:
    say(f"note: this session does not let {name} be set; the job goes on without, its workers may need more memory")


@lru_cache(maxsize=1)
def _ship_code(spark: SparkSession) -> None:
    """Give a Connect server this package for its workers, in this version. A server that takes nothing may have it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        path = Path(folder) / "flash_fine_tuning.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for package in ("fft", "spark_jobs"):
                for file in sorted((Path(_ROOT) / package).rglob("*")):
                    if file.is_file() and "__pycache__" not in file.parts:
                        packed.write(file, file.relative_to(_ROOT))
        spark.addArtifacts(str(path), pyfile=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise again, as itself, a :class:`UserError` that was raised in a Python worker; and one where a worker lacks
    code, has another Python, or ends."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # classic Spark raises py4j's own errors, Connect has others
        sentence = _sentence(str(error))
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _sentence(text: str) -> str | None:
    """What an error of Spark's says, where it is the user's to mend."""
    if found := re.search(r"^fft\.errors\.(?:User|Storage)Error: (.*)$", text, re.MULTILINE):
        return found[1]
    if lacking := re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", text):
        ours = lacking[1].partition(".")[0] in ("fft", "spark_jobs")
        remedy = _SHIP if ours else "install flash-fine-tuning, with what it requires, on all machines."
        return f"the executors of the cluster cannot import {lacking[1]}: {remedy}"
    if versions := re.search(r"Python in worker has different version: ([\d.]+) than that in driver: ([\d.]+)", text):
        return (
            f"the workers' Python is {versions[1]} and the driver's {versions[2]}: have PYSPARK_PYTHON, for the "
            "workers, and PYSPARK_DRIVER_PYTHON name environments of the same version."
        )
    if missing := re.search(r'Cannot run program "([^"]+)": error=2', text):
        return f"the workers' Python, {missing[1]}, is not there: have PYSPARK_PYTHON name one that all machines have."
    if "Python worker exited unexpectedly" in text:
        return (
            "a Python worker of Spark has ended, killed or for want of memory: free memory, or have fewer work at a "
            "time, and run the job again."
        )
    return None
