"""Every command of examples/ is one that the programs take, with flags that they have."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import spark_jobs
from examples.inputs import CHATML, conversations
from fft.arguments import parse_arguments, resolve
from fft.serve.batch_infer import build_parser
from spark_jobs import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
JOBS = {f"spark_jobs/{job}.py": getattr(cli, f"run_{job}") for job in ("tokenize", "shuffle", "repartition")}
JOBS["spark_jobs/generate.py"] = cli.run_generate
# Stands for every program that a script calls: writes down how it was called.
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >>"$CALLS"
printf '\\n' >>"$CALLS"
"""


def calls(script: Path, folder: Path) -> list[list[str]]:
    """The commands that a script runs, none of which is carried out."""
    stubs, out = folder / "bin", folder / "out"
    for path in (stubs, out):
        path.mkdir()
    for name in ("python", "spark-submit", "deepspeed"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    (out / "answers.jsonl").touch()
    record = folder / "calls"
    environment = {"CALLS": str(record), "OUT": str(out), "TABLES": "s3://bucket/packed"}
    environment["PATH"] = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([script], check=True, env=environment, stdout=subprocess.DEVNULL)
    return [line.strip("\0").split("\0") for line in record.read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_give_flags_that_exist(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for job in ("tokenize_table", "shuffle_tables", "repartition_table", "generate_table"):
        monkeypatch.setattr(spark_jobs, job, lambda *_, **__: [], raising=False)
    commands = calls(script, tmp_path)
    assert "deepspeed" in {command[0] for command in commands}
    for command in commands:
        check(command)


def check(command: list[str]) -> None:
    """End where a command is unknown or does not take its flags."""
    match command:
        case ["deepspeed", "--num_gpus", _, "fft/train.py", *flags]:
            parse_arguments(flags)
        case ["spark-submit", "examples/accept.py", _, _]:
            pass
        case ["spark-submit", script, *flags]:
            JOBS[script](flags)
        case ["python", "-m", "fft.train", *flags]:
            parse_arguments(flags)
        case ["python", "-m", "fft.serve.batch_infer", *flags]:
            build_parser().parse_args(flags)
        case ["python", "-m", "fft.checkpoint.convert", *flags]:
            assert {flag for flag in flags if flag.startswith("--")} <= {"--lora", "--overwrite"}
        case ["python", "-m", "examples.inputs"]:
            pass
        case _:
            raise AssertionError(f"unknown command: {command}")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_resolve(path):
    given = {"model": "m", "train_data": "t", "eval_data": "e", "output_dir": "o", "checkpoint": "c"}
    resolve({"config": str(path), **given})


def test_the_readme_names_every_file_and_commands_that_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (EXAMPLES / "README.md").read_text().replace("\\\n", " ")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".yaml", ".py")}
    assert files == set(re.findall(r"\]\((\w+\.\w+)\)", text))
    for command in re.findall(r"^    (python .*)", text, re.MULTILINE):
        check(shlex.split(command))


def test_inputs_make_conversations_of_docstrings(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    texts = ['def add(a, b):\n    """The sum of two."""\n', "def broken(:\n", "x = 1\n"]
    corpus.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    (chat,) = conversations(corpus)
    assert chat == [
        {"role": "user", "content": "What is add for?"},
        {"role": "assistant", "content": "The sum of two."},
    ]
    assert "<|im_start|>" in CHATML
