"""One way to get a Spark session, wherever the job runs."""

import atexit
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyspark import SparkContext
from pyspark.errors import PySparkException, PySparkRuntimeError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.utils import is_remote

from fft.console import say
from fft.errors import UserError

_ROOT = str(Path(__file__).resolve().parents[2])
_NEED_ENGINE = (
    "Spark needs Java, and none was found: install Java 17 (apt-get install openjdk-17-jre-headless) or set JAVA_HOME; "
    "or run without Java on Sail: pip install pysail, and FFT_ENGINE=sail."
)
_SAIL_IS_OPEN = (
    "note: Sail listens on 127.0.0.1:{port} until the job ends, and asks nobody who they are: whoever has an account "
    "on this machine can run programs there as you"
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
#: Of a Spark that is local alone.
_LOOPBACK = "127.0.0.1"
_ADDRESSES = ("spark.driver.host", "spark.driver.bindAddress")
_ALONE = dict.fromkeys(_ADDRESSES, _LOOPBACK) | {"spark.authenticate": "true", "spark.ui.killEnabled": "false"}
#: Sessions on servers that were started here, which have this package.
_OWN: list[SparkSession] = []
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

    That one runs on Java; with ``FFT_ENGINE=sail``, and only then, on Sail (``pip install pysail``): whoever has an
    account on the machine can reach that, which is told. Raises :class:`UserError` where the engine that is asked for
    is not there, and for another ``FFT_ENGINE``.
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
    if sail:
        if importlib.util.find_spec("pysail") is None:
            raise UserError("FFT_ENGINE=sail needs Sail: pip install pysail; or leave it unset, to run on Spark.")
        return _sail_session(name)
    if not _has_java():
        raise UserError(_NEED_ENGINE)
    # Python workers must find this package also when it is not installed.
    path = os.pathsep.join(p for p in (_ROOT, os.environ.get("PYTHONPATH")) if p)
    builder = builder.config("spark.executorEnv.PYTHONPATH", path).config("spark.executorEnv.PYTHONSAFEPATH", "1")
    builder = builder.config("spark.log.level", "ERROR").config("spark.ui.showConsoleProgress", "false")
    try:
        with _on_this_machine_alone(builder):
            spark = builder.getOrCreate()
    except PySparkRuntimeError as error:
        if "JAVA_GATEWAY_EXITED" not in str(error):
            raise
        raise UserError("Spark's Java process ended at once: install Java 17 and point JAVA_HOME at it.") from error
    _mute_echoes(spark)
    return spark


@contextmanager
def _on_this_machine_alone(builder: SparkSession.Builder) -> Iterator[None]:
    """Around the start of a Spark that is local: others shall not reach it, and pages of its UI only tell.

    What the user has set stays. Where ``spark-submit`` has started Java, its UI is where that has put it.
    """
    given, address = _given_settings(), os.environ.get("SPARK_LOCAL_IP")
    if not given.get("spark.master", "local").startswith("local"):
        yield
        return
    for name, value in _ALONE.items():
        if name not in given:
            builder.config(name, (address or _LOOPBACK) if name in _ADDRESSES else value)
    os.environ["SPARK_LOCAL_IP"] = address or _LOOPBACK
    try:
        yield
    finally:
        if address is None:
            del os.environ["SPARK_LOCAL_IP"]


def _given_settings() -> dict[str, str]:
    """What users have set of Spark: by ``spark-submit``, in ``PYSPARK_SUBMIT_ARGS``, or in its configuration."""
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        SparkContext._ensure_initialized()
        jvm: Any = SparkContext._jvm
        return {pair._1(): pair._2() for pair in jvm.org.apache.spark.SparkConf().getAll()}
    folder = os.environ.get("SPARK_CONF_DIR") or os.path.join(os.environ.get("SPARK_HOME", ""), "conf")
    file = Path(folder, "spark-defaults.conf")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    found = {name: value for name, _, value in (re.sub(r"[\s=]+", " ", line.strip()).partition(" ") for line in lines)}
    words = shlex.split(os.environ.get("PYSPARK_SUBMIT_ARGS", ""))
    for flag, value in pairwise(words):
        if flag == "--master":
            found["spark.master"] = value
        elif flag in ("--conf", "-c"):
            name, _, found[name] = value.partition("=")
    return found


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
    """A session on a Sail server of its own, see :mod:`.sail_server`."""
    from spark_jobs.runtime.sail_server import SailServer

    try:
        server = SailServer(_ROOT)
    except OSError as error:
        raise UserError(f"{error}: see what `python -m pysail spark server` says.") from error
    atexit.register(server.stop)
    say(_SAIL_IS_OPEN.format(port=server.port))
    spark = SparkSession.builder.appName(name).remote(f"sc://127.0.0.1:{server.port}").getOrCreate()
    _OWN.append(spark)
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


def lacking_connector(error: Exception) -> str | None:
    """What Spark lacks for a URL, where that is what an error says, and how it gets it."""
    lacking = re.search(r"Class (org\.apache\.hadoop\.fs\.\S+) not found|No FileSystem for scheme", str(error))
    if lacking is None:
        return None
    return (
        f"Spark lacks {lacking[1] or 'what knows that scheme'}: give it the package, as spark-submit --packages "
        "org.apache.hadoop:hadoop-aws:VERSION does for s3a:// (of the version of Spark's own Hadoop jars)"
    )


def _sentence(text: str) -> str | None:
    """What an error of Spark's says, where it is the user's to mend."""
    if found := re.search(r"^fft\.errors\.(?:User|Storage)Error: (.*)$", text, re.MULTILINE):
        return found[1]
    if lacking := re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", text):
        ours = lacking[1].partition(".")[0] in ("fft", "spark_jobs")
        remedy = _SHIP if ours else "install the wheel of make dist, with what it requires, on all machines."
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
