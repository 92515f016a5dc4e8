"""The same commands on Spark's JVM and on Sail: the same bytes in every file."""

import json
import sys

import pytest

from spark.helpers import files_of
from spark_jobs import repartition_table


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


def test_bad_input_is_one_sentence_on_sail_too(on_sail, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\nnot json\n")
    done = on_sail("tokenize", "-i", tmp_path / "a.jsonl", "-o", tmp_path / "o", "--tokenizer", tokenizer)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "a.jsonl, line 2: not valid JSON" in said
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()
