"""All jobs with every path in an object store, on Spark and on Sail: the bytes of the local run, whatever fails."""

import random
import shutil
import time
from pathlib import Path

import pytest
from failing_store import throttled, with_faults
from pyarrow import fs
from samples import read_sample

from fft.data.reader import SampleReader
from fft.data.storage import Storage
from fft.data.store_owner import OWNERS
from fft.data.table import Table
from fft.errors import UserError
from spark.test_lost_work import KILLS, finish, start, wait_for
from spark_jobs import repartition_table, tokenize_table
from spark_jobs.token_table.kept import waiting

JOBS = ("tokens", "shuffled/train", "shuffled/validation", "packed/train", "packed/validation")


@pytest.fixture(scope="module")
def alone(spark, corpus, tokenizer, tokens, shuffled, tmp_path_factory) -> Path:
    """The same jobs on a disk."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(tokens, folder / "tokens")
    shutil.copytree(shuffled, folder / "shuffled")
    repartition_table(shuffled, folder / "packed", max_len=256, num_partition=3)
    return folder


@pytest.fixture
def lake(store, corpus, tokenizer, tmp_path) -> str:
    """A URL below which the corpus and the tokenizer lie."""
    fs.copy_files(str(corpus), f"lake/{tmp_path.name}/corpus.jsonl", fs.LocalFileSystem(), store)
    fs.copy_files(str(tokenizer), f"lake/{tmp_path.name}/{tokenizer.name}", fs.LocalFileSystem(), store)
    return f"s3://lake/{tmp_path.name}"


def same_bytes(ours: str | Path, theirs: Path) -> bool:
    """File by file in the order of their names, which differ in the ids of job and try."""
    one, other = Table.open(ours), Table.open(theirs)
    assert one.fingerprint == other.fingerprint
    files = [list(dict.fromkeys(group.path for group in table.row_groups)) for table in (one, other)]
    pairs = zip(*files, strict=True)
    return all(one.filesystem.open_input_file(a).read() == Path(b).read_bytes() for a, b in pairs)


def check_tidy(url: str | Path) -> None:
    """Nothing lies there but the table."""
    manifest = Table.open(url).manifest
    names = {file.path for file in manifest.files} | {"_fft_manifest.json", "_data.info"}
    assert set(Storage.at(url).here()) <= names


def tokenize(engine, lake, tokenizer, out="tokens", **environment):
    flags = ["-i", f"{lake}/corpus.jsonl", "-o", f"{lake}/{out}", "--tokenizer", tokenizer]
    return start(engine, "tokenize", *flags, **environment)


def test_all_jobs_from_a_store_to_a_store(lake, alone, tokenizer):
    """On Sail; on a cluster of Spark's in ``test_shared_nothing.py``."""
    finish(tokenize("sail", lake, f"{lake}/{tokenizer.name}"))
    flags = ["--holdout", "0.1", "--num_block", "4"]
    finish(start("sail", "shuffle", "-i", f"{lake}/tokens", "-o", f"{lake}/shuffled", *flags))
    flags = ["--max_len", "256", "--num_partition", "3"]
    finish(start("sail", "repartition", "-i", f"{lake}/shuffled", "-o", f"{lake}/packed", *flags))
    for name in JOBS:
        assert same_bytes(f"{lake}/{name}", alone / name)
        check_tidy(f"{lake}/{name}")
    ours, theirs = (SampleReader(Table.open(f"{place}/packed/train"), 256, 1) for place in (lake, alone))
    for index in (0, 1, ours.samples_per_epoch - 1):
        assert read_sample(ours, index).input_ids.tolist() == read_sample(theirs, index).input_ids.tolist()


@pytest.mark.thorough
def test_the_engines_own_writer_into_a_store(lake, alone, tokenizer):
    """By Sail, which reaches stores by itself; then once more in the place of that."""
    finish(tokenize("sail", lake, tokenizer))
    flags = ["-i", f"{lake}/tokens", "-o", f"{lake}/mixed", "--writer", "spark", "--holdout", "0.1", "--num_block", "4"]
    for again in ([], ["--overwrite"]):
        finish(start("sail", "shuffle", *flags, *again))
        for name in ("train", "validation"):
            ours, theirs = Table.open(f"{lake}/mixed/{name}"), Table.open(alone / "shuffled" / name)
            assert (ours.rows, ours.tokens) == (theirs.rows, theirs.tokens)
            assert ours.manifest.tokenizer == theirs.manifest.tokenizer
            check_tidy(f"{lake}/mixed/{name}")


def test_java_without_what_reaches_stores_says_so(spark, lake, tokenizer):
    """Its own writer needs a connector, which nobody has given it; nothing is left there."""
    with pytest.raises(UserError, match=r"Spark lacks .*hadoop-aws.*without `writer`"):
        tokenize_table(f"{lake}/corpus.jsonl", f"{lake}/tokens", tokenizer, writer="spark")
    assert not Storage.at(f"{lake}/tokens").here()


@pytest.mark.thorough
def test_tasks_that_fail_while_they_write_are_tried_again(lake, alone, tokenizer, tmp_path):
    """After its file is there, when its process is killed, and when the store says that it is busy: on Java."""
    (tmp_path / "faults").mkdir()
    finish(tokenize("tries", lake, tokenizer, **with_faults(tmp_path, FFT_FAULTS=str(tmp_path / "faults"))))
    assert {path.name for path in (tmp_path / "faults").iterdir()} == {"raise", "kill", "busy"}
    assert same_bytes(f"{lake}/tokens", alone / "tokens")
    check_tidy(f"{lake}/tokens")


@pytest.mark.thorough
def test_a_busy_store(lake, alone, tokenizer, store_environment):
    """HTTP 503 for one request in ten."""
    with throttled(store_environment["AWS_ENDPOINT_URL"]) as (url, counts):
        finish(tokenize("sail", lake, tokenizer, AWS_ENDPOINT_URL=url))
        flags = ["--max_len", "256", "--num_partition", "3"]
        job = ("repartition", "-i", f"{lake}/tokens", "-o", f"{lake}/packed", *flags)
        finish(start("sail", *job, AWS_ENDPOINT_URL=url))
    assert counts["refused"] > 10
    assert same_bytes(f"{lake}/tokens", alone / "tokens")
    assert Table.open(f"{lake}/packed").tokens == Table.open(alone / "tokens").tokens
    check_tidy(f"{lake}/packed")


def test_drivers_that_are_killed_lose_nothing(lake, alone, tokenizer, corpus, tmp_path):
    """At random moments; each finds what the one before has left. A last one is when three parts are finished."""
    moments, out = random.Random("store"), Storage.at(f"{lake}/out")
    old = ("tokenize", "-i", f"{lake}/corpus.jsonl", "-o", out.name, "--tokenizer", tokenizer, "--max_len", 100)
    finish(start("sail", *old))
    before = Table.open(out.name).fingerprint
    for _ in range(KILLS):
        job = start("sail", *old[:-2], "-o", out.name, "--overwrite")
        wait_for(lambda: out.below(OWNERS).here(), job)
        time.sleep(moments.random() * 3)
        job.kill()
        job.communicate()
        assert Table.open(out.name).fingerprint in (before, Table.open(alone / "tokens").fingerprint)
    finish(start("sail", *old[:-2], "--overwrite"))
    assert not waiting(out.name)
    job = start("sail", *old[:-2], "--overwrite", **with_faults(tmp_path, FFT_STALLS="3"))
    wait_for(lambda: sum(waiting(out.name).values()) == 3, job)
    job.kill()
    job.communicate()
    assert Table.open(out.name).fingerprint == Table.open(alone / "tokens").fingerprint
    assert "going on: 3 of 8 parts are finished already" in finish(start("sail", *old[:-2], "--overwrite"))
    assert same_bytes(out.name, alone / "tokens")
    check_tidy(out.name)


@pytest.mark.thorough
def test_a_mount_that_refuses_what_stores_do(alone, corpus, tokenizer, tmp_path):
    """Append, reading and writing at once, links and renaming: all jobs, and an overwrite in place."""
    out = tmp_path / "mount"
    out.mkdir()
    environment = with_faults(tmp_path, FFT_REFUSES=str(out))
    finish(start("sail", "tokenize", "-i", corpus, "-o", out / "tokens", "--tokenizer", tokenizer, **environment))
    assert same_bytes(out / "tokens", alone / "tokens")
    check_tidy(out / "tokens")
    flags = ["--max_len", "256", "--num_partition", "3", "--overwrite"]
    finish(start("sail", "repartition", "-i", out / "tokens", *flags, **environment))
    repartition_table(alone / "tokens", tmp_path / "packed", max_len=256, num_partition=3)
    assert same_bytes(out / "tokens", tmp_path / "packed")
    check_tidy(out / "tokens")
