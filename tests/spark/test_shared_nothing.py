"""Two workers that share no file with each other or the driver, neither data nor code: every path in a store."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pyarrow import fs

from fft.data.storage import Storage
from spark.test_cluster import Cluster, wait_until
from spark.test_lost_work import many  # noqa: F401 - a fixture
from spark.test_object_store import check_tidy, same_bytes
from spark_jobs import repartition_table, shuffle_tables, tokenize_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(store, tmp_path_factory):
    """Of whose workers each finds an empty disk where the tests' files and this package are."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root may hide folders")
    installed = json.loads(importlib.metadata.distribution("flash-fine-tuning").read_text("direct_url.json") or "{}")
    roots = {ROOT, Path(urlsplit(installed.get("url", "")).path or ROOT)}
    code = [root / name for root in roots for name in ("fft", "spark_jobs") if (root / name).is_dir()]
    made = Cluster(tmp_path_factory.mktemp("cluster"), [tmp_path_factory.getbasetemp(), *code])
    yield made
    made.stop()


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """What ``make dist`` makes for ``--py-files``."""
    path = tmp_path_factory.mktemp("dist") / "flash_fine_tuning.zip"
    with zipfile.ZipFile(path, "w") as out:
        for folder in ("fft", "spark_jobs"):
            for file in sorted((ROOT / folder).rglob("*.py")):
                out.write(file, file.relative_to(ROOT))
    return path


def submit(cluster, code, job, *flags):
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    settings = ["--conf", "spark.executor.memory=512m", "--conf", "spark.ui.enabled=false", "--py-files", code]
    command = [Path(sys.executable).with_name("spark-submit"), "--master", cluster.url, *settings]
    return subprocess.Popen(
        [str(part) for part in (*command, f"spark_jobs/{job}.py", *flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_place_that_workers_do_not_see_is_one_sentence(cluster, code, many, tokenizer, store, tmp_path):  # noqa: F811
    """Before the work: there is nothing of it."""
    job = submit(cluster, code, "tokenize", "-i", many, "-o", tmp_path / "out", "--tokenizer", tokenizer)
    told = job.communicate(timeout=180)[0]
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert job.returncode == 2, told
    assert re.match(r"error: a worker on .* does not find .*/out/_fft_owner.json, the mark of this job: -o must", error)
    assert not (tmp_path / "out").exists()


def test_jobs_survive_a_worker_that_dies(spark, cluster, code, many, tokenizer, store, tmp_path):  # noqa: F811
    lake, alone = f"s3://lake/{tmp_path.name}", tmp_path / "alone"
    fs.copy_files(str(many), f"lake/{tmp_path.name}/many.jsonl", fs.LocalFileSystem(), store)
    tokenize_table(many, alone / "tokens", tokenizer)
    shuffle_tables(alone / "tokens", alone / "shuffled", holdout=0.1)
    repartition_table(alone / "shuffled", alone / "packed", max_len=512)
    out = Storage.at(f"{lake}/tokens")
    flags = ("-i", f"{lake}/many.jsonl", "-o", out.name, "--tokenizer", tokenizer)
    job = submit(cluster, code, "tokenize", *flags)
    wait_until(lambda: any(n.startswith("part-") for n in out.here()) or job.poll() is not None, "the first part")
    assert job.poll() is None
    cluster.kill(1)
    said = job.communicate(timeout=180)[0]
    assert job.returncode == 0, said
    assert "Lost executor" in said
    for name, *flags in (
        ("shuffle", "-i", out.name, "-o", f"{lake}/shuffled", "--holdout", "0.1"),
        ("repartition", "-i", f"{lake}/shuffled", "-o", f"{lake}/packed", "--max_len", "512"),
    ):
        job = submit(cluster, code, name, *flags)
        said = job.communicate(timeout=180)[0]
        assert job.returncode == 0, said
    for name in ("tokens", "shuffled/train", "shuffled/validation", "packed/train", "packed/validation"):
        assert same_bytes(f"{lake}/{name}", alone / name)
        check_tidy(f"{lake}/{name}")
