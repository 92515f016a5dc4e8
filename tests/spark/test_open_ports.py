"""What a job listens at, who can use that, and what those who can would find there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from listening import LOOPBACK, listens_at, processes_of

from fft.errors import UserError
from spark_jobs.runtime import session
from spark_jobs.runtime.sail_server import trimmed

ROOT = Path(__file__).parents[2]
#: A job that says who listens, and what a task finds in its environment; then it waits.
JOB = """
import os, time
from pyspark.sql import functions as F
from spark_jobs.runtime.session import get_session
spark = get_session("open")
def found(batches):
    import pyarrow as pa
    for _ in batches:
        names = [name for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HOME") if os.environ.get(name)]
        yield pa.RecordBatch.from_pydict({"name": names})
print(*sorted(row.name for row in spark.range(1, numPartitions=1).mapInArrow(found, "name string").collect()))
if hasattr(spark, "_jvm"):
    conf = spark.sparkContext.getConf()
    print(*(conf.get(name) for name in ("spark.authenticate", "spark.ui.killEnabled", "spark.driver.host")))
print("ready", flush=True)
time.sleep(600)
"""
#: A task that holds its interpreter for years.
BUSY = """
def busy(batches):
    import re
    for batch in batches:
        re.match("(a+)+b", "a" * 60)
        yield batch
spark.range(1, numPartitions=1).mapInArrow(busy, "id long").collect()
"""
SECRETS = {"WANDB_API_KEY": "w" * 40, "AWS_SECRET_ACCESS_KEY": "s" * 40}


@pytest.fixture
def start():
    """Start the job, and give its process and the lines that it says before it waits."""
    running = []

    def begin(code=JOB, **variables):
        environment = {**os.environ, **SECRETS, "PYSPARK_PYTHON": sys.executable, **variables}
        environment.pop("SPARK_LOCAL_IP", None)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True, **pipes)
        running.append(job)
        lines = []
        while (line := job.stdout.readline()) not in ("ready\n", ""):
            lines.append(line.strip())
        assert line, job.stderr.read()
        return job, lines

    yield begin
    for job in running:
        for process in processes_of(job.pid):
            os.kill(process, signal.SIGKILL)
        job.communicate()


def test_local_spark_listens_on_loopback_alone(start):
    job, (_, settings) = start()
    assert settings == "true false 127.0.0.1"
    found = listens_at(job.pid)
    assert found
    assert found <= LOOPBACK


def test_sail_is_told_of_has_no_secrets_but_those_of_stores_and_ends_with_its_job(start):
    job, (names,) = start(FFT_ENGINE="sail")
    assert names == "AWS_SECRET_ACCESS_KEY HOME"
    assert listens_at(job.pid) <= LOOPBACK
    job.terminate()
    told = job.communicate()[1]
    assert "Sail listens on 127.0.0.1:" in told
    assert "whoever has an account on this machine" in told
    deadline = time.monotonic() + 300
    while processes_of(job.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sail_ends_with_a_driver_while_no_thread_of_its_own_gets_a_turn(start):
    """Its tasks may hold the interpreter, so the system has to end it."""
    code = JOB.replace("time.sleep(600)", BUSY)
    job, _ = start(code, FFT_ENGINE="sail")
    time.sleep(2)  # the task begins; were it later, the test would only be easier
    job.kill()
    job.wait()
    deadline = time.monotonic() + 300
    while processes_of(job.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_asked_for_and_not_there_is_no_other_engine(monkeypatch):
    monkeypatch.setattr(session.SparkSession, "getActiveSession", lambda: None)
    monkeypatch.setattr(session, "_has_java", lambda: False)
    with pytest.raises(UserError, match=r"install Java 17 .* pip install pysail, and FFT_ENGINE=sail"):
        session.get_session("test")
    monkeypatch.setenv("FFT_ENGINE", "sail")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"FFT_ENGINE=sail needs Sail: pip install pysail"):
        session.get_session("test")


def test_an_environment_is_trimmed_to_what_tasks_need():
    secrets = {"HF_TOKEN": "t", "VLLM_API_KEY": "k", "PGPASSWORD": "p", "MLFLOW_TRACKING_URI": "u"}
    kept = {"PATH": "/bin", "HF_HOME": "h", "AZURE_STORAGE_KEY": "s", "LC_ALL": "C", "SPARK_LOCAL_IP": "127.0.0.1"}
    assert trimmed(secrets | kept) == kept


@pytest.mark.parametrize(
    ("words", "master"),
    [
        ("pyspark-shell", None),
        ("--master local[2] --conf spark.ui.enabled=false pyspark-shell", "local[2]"),
        ("--conf spark.master=spark://a:7077 pyspark-shell", "spark://a:7077"),
    ],
)
def test_masters_that_users_name_are_found(words, master, monkeypatch, tmp_path):
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", words)
    assert session._given_settings().get("spark.master") == master
    (tmp_path / "spark-defaults.conf").write_text("# none\nspark.master   yarn\nspark.ui.port=1\n")
    assert session._given_settings()["spark.master"] == (master or "yarn")
