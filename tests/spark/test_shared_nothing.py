"""Workers, or a Connect server, that share no file with each other or the driver, neither data nor code: every path in
a store."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from namespaces import own_mounts
from ports import free_port
from pyarrow import fs

from fft.data.storage import Storage
from spark.test_cluster import AFTER, Cluster, apart_from, wait_until
from spark.test_engines import wait_for
from spark.test_lost_work import many  # noqa: F401 - a fixture
from spark.test_object_store import check_tidy, same_bytes
from spark_jobs import repartition_table, shuffle_tables, tokenize_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hidden(tmp_path_factory) -> list[Path]:
    """Where the tests' files and this package are."""
    own_mounts()
    installed = json.loads(importlib.metadata.distribution("flash-fine-tuning").read_text("direct_url.json") or "{}")
    roots = {ROOT, Path(urlsplit(installed.get("url", "")).path or ROOT)}
    code = [root / name for root in roots for name in ("fft", "spark_jobs") if (root / name).is_dir()]
    return [tmp_path_factory.getbasetemp(), *code]


@pytest.fixture(scope="module")
def cluster(store, hidden, tmp_path_factory):
    """Of whose workers each finds an empty disk there."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), hidden)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def alone(spark, many, tokenizer, tmp_path_factory) -> Path:  # noqa: F811
    """The same jobs on this machine's disk."""
    folder = tmp_path_factory.mktemp("alone")
    tokenize_table(many, folder / "tokens", tokenizer)
    shuffle_tables(folder / "tokens", folder / "shuffled", holdout=0.1)
    repartition_table(folder / "shuffled", folder / "packed", max_len=512)
    return folder


@pytest.fixture
def lake(store, many, tmp_path) -> str:  # noqa: F811
    """A URL below which the documents lie."""
    fs.copy_files(str(many), f"lake/{tmp_path.name}/many.jsonl", fs.LocalFileSystem(), store)
    return f"s3://lake/{tmp_path.name}"


def check_tables(lake: str, alone: Path) -> None:
    for name in ("tokens", "shuffled/train", "shuffled/validation", "packed/train", "packed/validation"):
        assert same_bytes(f"{lake}/{name}", alone / name)
        check_tidy(f"{lake}/{name}")


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """What ``make dist`` makes for ``--py-files``."""
    path = tmp_path_factory.mktemp("dist") / "flash_fine_tuning.zip"
    with zipfile.ZipFile(path, "w") as out:
        for folder in ("fft", "spark_jobs"):
            for file in sorted((ROOT / folder).rglob("*.py")):
                out.write(file, file.relative_to(ROOT))
    return path


def submit(cluster, code, *words):
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    settings = ["--conf", "spark.executor.memory=512m", "--conf", "spark.ui.enabled=false", "--py-files", code]
    command = [Path(sys.executable).with_name("spark-submit"), "--master", cluster.url, *settings]
    return subprocess.Popen(
        [str(part) for part in (*command, *words)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.thorough
def test_a_place_that_workers_do_not_see_is_one_sentence(cluster, code, many, tokenizer, store, tmp_path):  # noqa: F811
    """Before the work: there is nothing of it."""
    job = submit(cluster, code, "spark_jobs/tokenize.py", "-i", many, "-o", tmp_path / "out", "--tokenizer", tokenizer)
    told = job.communicate(timeout=180)[0]
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert job.returncode == 2, told
    assert re.match(r"error: a worker on .* does not find .*/out/_fft_owner.json, the mark of this job: -o must", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_jobs_survive_a_worker_that_dies(cluster, code, alone, lake, tokenizer, tmp_path):
    out = Storage.at(f"{lake}/tokens")
    flags = ("-i", f"{lake}/many.jsonl", "-o", out.name, "--tokenizer", tokenizer)
    job = submit(cluster, code, "spark_jobs/tokenize.py", *flags)
    wait_until(lambda: any(n.startswith("part-") for n in out.here()) or job.poll() is not None, "the first part")
    assert job.poll() is None
    cluster.kill(1)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert "Lost executor" in said
    (tmp_path / "after.py").write_text(AFTER)
    job = submit(cluster, code, tmp_path / "after.py", out.name, f"{lake}/shuffled", f"{lake}/packed")
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    check_tables(lake, alone)


#: A client of a Connect server: all jobs by URLs; then documents, a table and an output that only the client sees.
CLIENT = """
import sys
from fft.errors import UserError
from spark_jobs.cli import run_repartition, run_shuffle, run_tokenize
lake, tokenizer, mine, table = sys.argv[1:]
run_tokenize(["-i", f"{lake}/many.jsonl", "-o", f"{lake}/tokens", "--tokenizer", tokenizer])
run_shuffle(["-i", f"{lake}/tokens", "-o", f"{lake}/shuffled", "--holdout", "0.1"])
run_repartition(["-i", f"{lake}/shuffled", "-o", f"{lake}/packed", "--max_len", "512"])
for job, *flags in (
    (run_tokenize, "-i", mine, "-o", f"{lake}/none", "--tokenizer", tokenizer),
    (run_shuffle, "-i", table, "-o", f"{lake}/none"),
    (run_tokenize, "-i", f"{lake}/many.jsonl", "-o", f"{table}-2", "--tokenizer", tokenizer),
):
    try:
        job(flags)
    except UserError as error:
        print(error)
"""


def test_a_connect_server_that_sees_none_of_the_files(hidden, alone, lake, many, tokenizer, tmp_path, launch):  # noqa: F811
    """A server of Spark Connect on an empty disk: URLs are the same to it, and a path is refused in one sentence."""
    port = free_port()
    settings = [f"spark.connect.grpc.binding.port={port}", "spark.ui.enabled=false"]
    command = [*apart_from(hidden), Path(sys.executable).with_name("spark-submit"), "--master", "local[2]"]
    command += [part for setting in settings for part in ("--conf", setting)]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen([str(part) for part in command], env=environment, **quiet) as server:
        try:
            wait_for(port, server)
            given = (lake, tokenizer, many, alone / "tokens")
            done = launch(sys.executable, "-c", CLIENT, *given, env={"SPARK_REMOTE": f"sc://127.0.0.1:{port}"})
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    check_tables(lake, alone)
    documents, table, output = done.stdout.splitlines()
    assert documents.startswith(f"{many} cannot be read"), documents
    assert "it must lie under this path on all machines of the cluster" in documents
    assert str(alone) in table
    assert re.match(r"a worker on .* does not find .*/tokens-2/_fft_owner.json, the mark of this job: -o must", output)
    assert not Path(f"{alone / 'tokens'}-2").exists()
