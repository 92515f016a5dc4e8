"""The same commands on Spark's JVM and on Sail: the same bytes in every file."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import deltalake
import pyarrow as pa
import pytest
from delta_logs import delete_rows, map_columns, write_with_features
from ports import free_port

from spark.helpers import files_of, rows_of, stacks_of_ours
from spark_jobs import repartition_table, shuffle_tables, tokenize_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def on_sail(launch, tmp_path_factory):
    """Run a job on Sail, from the command line."""

    def run(script, *flags):
        return launch(sys.executable, f"spark_jobs/{script}.py", *flags, env={"FFT_ENGINE": "sail"})

    return run


def same_files(ours, theirs) -> bool:
    assert [path.name for path in files_of(ours)] == [path.name for path in files_of(theirs)]
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(files_of(ours), files_of(theirs), strict=True))


def test_all_jobs_write_the_same_bytes(on_sail, spark, corpus, tokenizer, tokens, shuffled, tmp_path):
    packed = tmp_path / "packed"
    repartition_table(shuffled, packed, max_len=256, num_partition=3)
    jobs = [
        ("tokenize", "-i", corpus, "-o", tmp_path / "t", "--tokenizer", tokenizer),
        ("shuffle", "-i", tokens, "-o", tmp_path / "s", "--holdout", "0.1", "--num_block", "4"),
        ("repartition", "-i", shuffled, "-o", tmp_path / "r", "--max_len", "256", "--num_partition", "3"),
    ]
    for job in jobs:
        done = on_sail(*job)
        assert done.returncode == 0, done.stderr
    assert same_files(tmp_path / "t", tokens)
    for split in ("train", "validation"):
        assert same_files(tmp_path / "s" / split, shuffled / split)
        assert same_files(tmp_path / "r" / split, packed / split)


ICEBERG = """
import sys
from spark_jobs.runtime.session import get_session
for mode, text in (("error", "old"), ("overwrite", "new"), ("append", "newer")):
    rows = get_session("test").createDataFrame([(f"ice {text}", text)], "id string, text string")
    rows.write.format("iceberg").mode(mode).save(sys.argv[1])
"""


def test_tables_of_which_files_alone_do_not_say_the_rows_are_read_by_the_engine(on_sail, launch, tokenizer, tmp_path):
    """Deletion vectors, column mapping and Iceberg, below a folder; Hudi, which Sail does not have, is refused."""
    lake = tmp_path / "lake"  # Sail 0.7 finds no table whose path has a blank
    rows = pa.table({"id": ["a", "b", "c"], "text": ["one", "two", "three"]})
    delete_rows(write_with_features(lake / "deleted", rows, "deletionVectors"), [0, 2])
    deltalake.write_deltalake(str(lake / "mapped"), rows.rename_columns(["text", "id"]))
    map_columns(lake / "mapped", {"text": "id", "id": "text"})
    made = launch(sys.executable, "-c", ICEBERG, lake / "ice", env={"FFT_ENGINE": "sail"})
    assert made.returncode == 0, made.stderr
    (lake / "d.jsonl").write_text('{"id": "d", "text": "four"}')
    done = on_sail("tokenize", "-i", lake, "-o", tmp_path / "out", "--tokenizer", tokenizer)
    assert done.returncode == 0, done.stderr
    assert f"note: {lake / 'deleted'}@v1 is read by the engine, as a table of Delta" in done.stderr
    ids = sorted(name for row in rows_of(tmp_path / "out") for name in row["doc_ids"])
    assert ids == sorted(["a", "b", "c", "b", "d", "ice new", "ice newer"])
    (lake / "hudi" / ".hoodie").mkdir(parents=True)
    done = on_sail("tokenize", "-i", lake, "-o", tmp_path / "none", "--tokenizer", tokenizer)
    assert done.returncode == 2
    assert f"{lake / 'hudi'} is of Hudi, whose folder also holds files of older versions" in done.stderr


def test_bad_input_is_one_sentence_on_sail_too(on_sail, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\nnot json\n")
    done = on_sail("tokenize", "-i", tmp_path / "a.jsonl", "-o", tmp_path / "o", "--tokenizer", tokenizer)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "a.jsonl, line 2: not valid JSON" in said
    assert not stacks_of_ours(done.stderr)
    assert not (tmp_path / "o").exists()


def test_chats_give_the_same_bytes(on_sail, spark, tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    chats = [[{"user": f"{i}?"}, {"assistant": "a" * (i % 50)}, {"user": "?"}, {"assistant": "b"}] for i in range(500)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    flags = ("--task", "chat", "--tokenizer", folder, "--max_len", 40)
    done = on_sail("tokenize", "-i", tmp_path / "chats.jsonl", "-o", tmp_path / "sail", *flags)
    assert done.returncode == 0, done.stderr
    tokenize_table(tmp_path / "chats.jsonl", tmp_path / "jvm", folder, task="chat", max_len=40)
    assert same_files(tmp_path / "sail", tmp_path / "jvm")


@pytest.mark.thorough
def test_a_disk_without_room(launch, tokenizer, tmp_path):
    """A limit on the size of files stands for a full disk: the same error of the operating system's, at any depth."""
    lines = (json.dumps({"text": f"{i} " + "x y z " * 400}) + "\n" for i in range(4000))
    (tmp_path / "a.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    job = f"{sys.executable} spark_jobs/tokenize.py -i {tmp_path / 'a.jsonl'} -o {out} --tokenizer {tokenizer}"
    done = launch("bash", "-c", f"ulimit -f 16; exec {job}", env={"FFT_ENGINE": "sail"})
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written to" in said
    assert "make room there" in said
    assert not stacks_of_ours(done.stderr)
    assert not out.exists()
    done = launch("bash", "-c", f"exec {job}", env={"FFT_ENGINE": "sail"})
    assert done.returncode == 0, done.stderr


#: Where workers of a session import from, and a job into the server's catalog.
ON_CONNECT = """
import sys
from spark_jobs import get_session, tokenize_table

def where(batches):
    import fft, pyarrow
    for _ in batches:
        yield pyarrow.record_batch({"path": [fft.__file__]})

spark = get_session("connect")
print(spark.range(1).mapInArrow(where, "path string").collect()[0][0])
spark.sql("create database lake")
made = tokenize_table(sys.argv[1], "lake.tokens", sys.argv[2])
print(made.rows, made.lineage["counts"]["documents_in"], spark.table("lake.tokens").count())
"""


@pytest.mark.thorough
def test_a_connect_server(launch, corpus, documents, tokenizer, tokens, tmp_path):
    """A server of Spark Connect in a JVM of its own, found by SPARK_REMOTE, whose workers are given the code."""
    port = free_port()
    settings = [f"spark.connect.grpc.binding.port={port}", "spark.ui.enabled=false"]
    command = ["spark-submit", "--master", "local[2]", *(part for s in settings for part in ("--conf", s))]
    command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **quiet) as server:
        try:
            wait_for(port, server)
            flags = ["-i", tokens, "-o", tmp_path / "out", "--holdout", "0.1", "--num_block", "4"]
            done = launch(
                sys.executable, "spark_jobs/shuffle.py", *flags, env={"SPARK_REMOTE": f"sc://127.0.0.1:{port}"}
            )
            remote = {"SPARK_REMOTE": f"sc://127.0.0.1:{port}"}
            written = launch(sys.executable, "-c", ON_CONNECT, corpus, tokenizer, env=remote)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    assert done.returncode == 0, done.stderr
    assert written.returncode == 0, written.stderr
    imported, counted = written.stdout.splitlines()
    assert "flash_fine_tuning.zip" in imported
    assert counted.split() == [str(len(documents))] * 3
    shuffle_tables(tokens, tmp_path / "here", holdout=0.1, num_block=4)
    for split in ("train", "validation"):
        assert same_files(tmp_path / "out" / split, tmp_path / "here" / split)


def wait_for(port, server):
    """Until it listens, however long that takes; not when it has ended."""
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the Connect server ended with {server.returncode}")
