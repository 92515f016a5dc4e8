"""The jobs as a user starts them: spark-submit, python, python -m, and what they say when that cannot work."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spark.helpers import hashes_of, stacks_of_ours
from spark_jobs import repartition_table

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = ["spark-submit", "--master", "local[1]", "--conf", "spark.ui.enabled=false"]


def submit(launch, script, *arguments):
    """Run a job through spark-submit, which shows all that a Python script prints on its own standard output."""
    process = launch(*SUBMIT, f"spark_jobs/{script}.py", *arguments)
    process.stderr += process.stdout
    return process


def refused(process, sentence):
    """One sentence, exit code 2, no stack of either language."""
    assert process.returncode == 2, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert sentence in errors[0]
    assert not stacks_of_ours(process.stderr)
    assert "\tat " not in process.stderr


@pytest.fixture(scope="module")
def pipeline(launch, corpus, tokenizer, tmp_path_factory):
    """All three jobs through spark-submit on one core."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [
        ("tokenize", "-i", corpus, "-o", folder / "tokens", "--tokenizer", tokenizer),
        ("shuffle", "-i", folder / "tokens", "-o", folder / "shuffled", "--holdout", "0.1", "--num_block", "4"),
        ("repartition", "-i", folder / "shuffled", "-o", folder / "packed", "--max_len", "256", "--num_partition", "2"),
    ]
    for job in jobs:
        process = submit(launch, *job)
        assert process.returncode == 0, process.stderr
        assert "tokens/s" in process.stderr
        assert " ERROR " not in process.stderr
    return folder


def test_one_core_and_two_give_the_same_files(pipeline, spark, tokens, shuffled, tmp_path):
    assert hashes_of(pipeline / "tokens") == hashes_of(tokens)
    repartition_table(shuffled, tmp_path / "packed", max_len=256, num_partition=2)
    for split in ("train", "validation"):
        assert hashes_of(pipeline / "shuffled" / split) == hashes_of(shuffled / split)
        assert hashes_of(pipeline / "packed" / split) == hashes_of(tmp_path / "packed" / split)


def test_bad_input_through_spark_submit(launch, pipeline, corpus, tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nnot json\n')
    process = submit(launch, "tokenize", "-i", bad, "-o", tmp_path / "out", "--tokenizer", tokenizer)
    refused(process, f"{bad}, line 2: not valid JSON")
    assert not (tmp_path / "out").exists()
    process = submit(launch, "shuffle", "-i", tmp_path / "none", "-o", tmp_path / "out")
    refused(process, "none does not exist")
    process = submit(launch, "repartition", "-i", pipeline / "tokens", "-o", pipeline / "packed", "--max_len", "256")
    refused(process, "exists: give --overwrite")


@pytest.mark.parametrize("job", ["tokenize", "shuffle", "repartition"])
@pytest.mark.parametrize("form", ["script", "module"])
def test_help_needs_no_spark(launch, job, form, tmp_path):
    # A PATH without java: starting Spark would fail.
    how = [f"spark_jobs/{job}.py"] if form == "script" else ["-m", f"spark_jobs.{job}"]
    process = launch(sys.executable, *how, "--help", env={"JAVA_HOME": str(tmp_path)})
    assert process.returncode == 0, process.stderr
    assert "examples:" in process.stdout
    assert f"spark-submit spark_jobs/{job}.py -i" in process.stdout


def test_without_java_a_job_runs_on_sail_where_that_is_asked_for(launch, pipeline, tmp_path):
    flags = ["--seed", "0", "--holdout", "0.1", "--num_block", "4"]
    command = [sys.executable, "spark_jobs/shuffle.py", "-i", pipeline / "tokens", "-o", tmp_path / "out", *flags]
    refused = launch(*command, env={"JAVA_HOME": str(tmp_path)})
    assert refused.returncode == 2
    assert "install Java 17" in refused.stderr
    assert "FFT_ENGINE=sail" in refused.stderr
    process = launch(*command, env={"JAVA_HOME": str(tmp_path), "FFT_ENGINE": "sail"})
    assert process.returncode == 0, process.stderr
    for split in ("train", "validation"):
        assert hashes_of(tmp_path / "out" / split) == hashes_of(pipeline / "shuffled" / split)


def test_the_scripts_folder_does_not_hide_the_standard_library(tmp_path):
    code = "import tokenize, inspect; print(tokenize.__file__, inspect.getsource(tokenize.generate_tokens)[:19])"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "spark_jobs", capture_output=True, text=True, check=True
    )
    file, *source = process.stdout.split()
    assert "spark_jobs" not in file
    assert source == ["def", "generate_tokens"]


def test_a_job_runs_without_spark_submit_and_without_the_package_installed(launch, tokens, tmp_path):
    """From a copy of the sources: its own code is used, in the driver and in the workers."""
    for package in ("fft", "spark_jobs"):
        shutil.copytree(ROOT / package, tmp_path / "copy" / package, ignore=shutil.ignore_patterns("__pycache__"))
    process = launch(
        sys.executable, tmp_path / "copy/spark_jobs/shuffle.py", "-i", tokens, "-o", tmp_path / "out", "--num_block", 1
    )
    assert process.returncode == 0, process.stderr
    assert hashes_of(tmp_path / "out")
