"""Whatever ends a run, and wherever: ``--resume auto`` ends with the losses of a run that nothing ended."""

import contextlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import BIN, ROOT, SMALL
from safetensors.torch import load_file
from test_parity import command, read_metrics

from fft.checkpoint.folder import checkpoint_tag

pytestmark = pytest.mark.slow
STEPS, CRASHES, SEED = 60, 20, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(SMALL | {"model_type": "llama"}))
    return file


def flags(model, table, output, steps=STEPS, batch=8):
    return (
        f"--init --model {model} --train_data {table} --seq_len 64 --max_steps {steps} --learning_rate 1e-2 "
        f"--save_steps 2 --max_num_checkpoints 3 --gradient_accumulation_steps {batch} --logging_steps 1 "
        f"--checkpoint {output}/run --output_dir {output}/model"
    ).split()


@contextlib.contextmanager
def running(*words):
    """A job in the background; on leaving, all of it is gone."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(w) for w in words], cwd=ROOT, env=env, start_new_session=True, **pipes) as process:
        try:
            yield psutil.Process(process.pid), process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                kill(psutil.Process(process.pid), everything=True)


def ranks(job: psutil.Process) -> list[psutil.Process]:
    """The trainers among a job's processes."""
    found = []
    for process in [job, *job.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any("fft/train.py" in word or "fft.train" in word for word in words) and "RANK" in process.environ():
                found.append(process)
    return found


def kill(job: psutil.Process, everything: bool, rng: random.Random | None = None) -> None:
    """SIGKILL to the whole job at once, or to one rank, whose neighbours the launcher then ends."""
    with contextlib.suppress(psutil.NoSuchProcess):
        victims = [job, *job.children(recursive=True)] if everything else [rng.choice(ranks(job))]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if everything:  # the job itself is its Popen's to wait for
            psutil.wait_procs(victims[1:], timeout=30)


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def outcome(output: Path):
    steps, _ = read_metrics(output / "run")
    tensors = {}
    for file in (output / "model").glob("*.safetensors"):
        tensors |= {name: value.tolist() for name, value in load_file(file).items()}
    return [(s["step"], s["loss"], s["grad_norm"]) for s in steps], tensors


@pytest.fixture(scope="module")
def straight(tmp_path_factory, launch, model, ragged_table):
    """A run of two stages that nothing ends."""
    output = tmp_path_factory.mktemp("straight")
    done = launch(*command("torchrun", 2), *flags(model, ragged_table, output), "--pipe_parallel_size", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return outcome(output)


def test_twenty_crashes(straight, launch, model, ragged_table, tmp_path):
    """Kills of one rank or of all, at random steps, half of them while a checkpoint is being written."""
    rng, run = random.Random(SEED), tmp_path / "run"
    given = [*flags(model, ragged_table, tmp_path), "--pipe_parallel_size", "2", "--resume", "auto"]
    within_saves = crashes = 0
    for number in range(CRASHES):
        within = number % 2 == 0
        with running(*command("torchrun", 2), *given) as (job, process):
            before, after = lines(run), rng.randint(1, 6)
            wait_until(lambda b=before, a=after: lines(run) not in range(b - 9, b + a), process)
            if within:
                wait_until(lambda: any(run.glob(".step-*.writing")), process)
                within_saves += any(run.glob(".step-*.writing"))
            else:
                time.sleep(rng.random() / 20)
            crashes += process.poll() is None
            kill(job, everything=rng.random() < 0.5, rng=rng)
            if process.wait(60) == 0:
                break
    assert crashes >= CRASHES / 2
    assert within_saves >= 3
    done = launch(*command("torchrun", 2), *given, "--overwrite")
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path) == straight
    left = {path.name for path in run.iterdir()}
    kept = {checkpoint_tag(step) for step in (STEPS - 4, STEPS - 2, STEPS)}
    assert left == kept | {"metrics.jsonl", "arguments.yaml", "data.yaml", "latest", ".lock"}
