"""A standalone cluster, a worker of which dies in the middle of a job: the same bytes as on one machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyspark
import pytest
from namespaces import own_mounts
from ports import free_port

from spark.helpers import files_of
from spark_jobs import repartition_table, shuffle_tables, tokenize_table

pytestmark = pytest.mark.slow

SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
#: The corpus of the other tests this many times over: some seconds of work for two cores.
REPEATED = 6
#: Cover folders, whose names are $0, go into the first of them, which is empty now, and become what follows.
HIDE = 'for folder in $0; do mount -t tmpfs none "$folder" || exit 77; done; cd "${0%% *}"; exec "$@"'
#: What comes after a table of tokens, in one driver.
AFTER = """
import sys
from spark_jobs.cli import run_repartition, run_shuffle
tokens, shuffled, packed = sys.argv[1:]
run_shuffle(["-i", tokens, "-o", shuffled, "--holdout", "0.1"])
run_repartition(["-i", shuffled, "-o", packed, "--max_len", "512"])
"""


def wait_until(condition, what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def apart_from(hidden: Sequence[Path]) -> list[str]:
    """What a command begins with that is to find empty disks where these folders are."""
    return [*own_mounts(), "bash", "-c", HIDE, " ".join(map(str, hidden))]


class Cluster:
    """A master and two workers of one core each, on the loopback address; each worker sees something else where the
    folders ``hidden`` are: an empty disk of its own."""

    def __init__(self, folder: Path, hidden: Sequence[Path] = ()) -> None:
        self.folder, port = folder, free_port()
        self._own = apart_from(hidden) if hidden else []
        self.url = f"spark://127.0.0.1:{port}"
        self._environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
        flags = ["--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
        self.processes = [self._start("master.Master", *flags)]
        wait_until(lambda: self._said(0, "I have been elected leader"), "the master's start")
        for number in (1, 2):
            place = folder / f"worker-{number}"
            flags = ["--host", "127.0.0.1", "--cores", "1", "--memory", "1g", "--webui-port", "0"]
            self.processes.append(self._start("worker.Worker", *flags, "--work-dir", place, self.url, own=self._own))
        wait_until(lambda: all(self._said(i, "Successfully registered") for i in (1, 2)), "the workers' start")

    def _start(self, name: str, *flags: object, own: Sequence[str] = ()) -> subprocess.Popen:
        command = [*own, SPARK_CLASS, f"org.apache.spark.deploy.{name}", *flags]
        with open(self.folder / f"log-{len(getattr(self, 'processes', []))}", "wb") as log:
            return subprocess.Popen(
                [str(part) for part in command], env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def _said(self, process: int, text: str) -> bool:
        return text in (self.folder / f"log-{process}").read_text()

    def kill(self, process: int) -> None:
        """Kill a process and its children, an executor for instance, without warning."""
        os.killpg(self.processes[process].pid, signal.SIGKILL)
        self.processes[process].wait()

    def stop(self) -> None:
        for number, process in enumerate(self.processes):
            if process.poll() is None:
                self.kill(number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def many(corpus, tmp_path_factory) -> Path:
    """The corpus many times over, in lines that differ."""
    lines = corpus.read_text().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_text("".join(line.replace('"id": "', f'"id": "{i}-', 1) for i in range(REPEATED) for line in lines))
    return path


def same_files(ours, theirs) -> bool:
    assert [path.name for path in files_of(ours)] == [path.name for path in files_of(theirs)]
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(files_of(ours), files_of(theirs), strict=True))


def test_jobs_survive_a_worker_that_dies(spark, cluster, many, tokenizer, tmp_path):
    ours, alone = tmp_path / "cluster", tmp_path / "alone"
    tokenize_table(many, alone / "tokens", tokenizer)
    shuffle_tables(alone / "tokens", alone / "shuffled", holdout=0.1)
    repartition_table(alone / "shuffled", alone / "packed", max_len=512)

    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": root}
    # A lost executor is noticed by its connection; give up on nothing else.
    limits = ["--conf", "spark.executor.memory=512m", "--conf", "spark.ui.enabled=false"]
    submit = [Path(sys.executable).with_name("spark-submit"), "--master", cluster.url, *limits]

    def start(*command: object) -> subprocess.Popen:
        return subprocess.Popen(
            [str(part) for part in (*submit, *command)],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    job = start("spark_jobs/tokenize.py", "-i", many, "-o", ours / "tokens", "--tokenizer", tokenizer)
    wait_until(lambda: list((ours / "tokens").rglob(".part-*.writing")) or job.poll() is not None, "the first part")
    assert job.poll() is None
    cluster.kill(1)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "Lost executor" in said
    assert not list((ours / "tokens").rglob(".part-*"))  # nor what the killed tasks left

    (tmp_path / "after.py").write_text(AFTER)
    job = start(tmp_path / "after.py", ours / "tokens", ours / "shuffled", ours / "packed")
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert same_files(ours / "tokens", alone / "tokens")
    for split in ("train", "validation"):
        assert same_files(ours / "shuffled" / split, alone / "shuffled" / split)
        assert same_files(ours / "packed" / split, alone / "packed" / split)
