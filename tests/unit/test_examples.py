"""Every command of examples/ is one that the programs take, with flags that they have."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize(("code", "queued"), [(0, False), (2, False), (75, True)])
def test_a_slurm_job_goes_into_the_queue_again_when_it_can_go_on(code, queued, tmp_path):
    """With a Slurm that starts one task, and a trainer that ends with a code."""
    stubs = {
        "scontrol": 'echo "$@" >>"$CALLS"; echo node7',
        "srun": 'shift; export SLURM_PROCID=3 SLURM_LOCALID=1; exec "$@"',
        "python": f'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $*" >>"$CALLS"; exit {code}',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "16",
        "CALLS": str(tmp_path / "calls"),
    }
    done = subprocess.run(
        [EXAMPLES / "cluster" / "slurm.sh", "--model", "m", "--train_data", "t"],
        check=False,
        env=job | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == code
    names, started, *more = (tmp_path / "calls").read_text().splitlines()
    assert names == "show hostnames node[7-8]"
    place, local, master, *command = shlex.split(started)
    assert (place, local, master, command[:2]) == ("3/16", "1", "node7:20077", ["-m", "fft.train"])
    assert parse_arguments(command[2:]).resume == "auto"
    assert more == (["requeue 77"] if queued else [])


def test_a_jobset_gives_flags_that_exist():
    job = yaml.safe_load((EXAMPLES / "cluster" / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]
    (script,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    words = shlex.split(script.replace("\\\n", " "))
    assert words[:4] == ["exec", "torchrun", "--nnodes", str(job["spec"]["completions"])]
    assert parse_arguments(words[words.index("fft/train.py") + 1 :]).checkpoint == "/shared/run"
