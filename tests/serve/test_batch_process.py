"""The command as a process, on a real vLLM: a signal and a kill in mid-run change nothing of what it writes, and leave
no process."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from generation import complete, make_model

ROOT = Path(__file__).resolve().parents[2]
#: Slow enough to be interrupted: two prompts at a time.
ARGUMENTS = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 2}
PROMPTS = [f"def f{i}(x):" for i in range(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "plain", hidden_size=64, num_attention_heads=2)


@pytest.fixture
def start():
    """Starts runs, none of which outlives its test."""
    runs = []

    def start(*given: object, **more: tuple[object, ...]) -> subprocess.Popen:
        runs.append(started(*given, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.wait()


#: The command, which is sent a signal by a thread of its own once it has written so many answers: however fast it is,
#: it is in the midst of them.
SIGNALLED = """
import os, sys, threading
from fft.serve.batch_infer import cli
from fft.serve.outputs import Partial

number, left = int(sys.argv.pop(1)), int(sys.argv.pop(1))
add = Partial.add

def add_and_count(self, row):
    global left
    add(self, row)
    left -= 1
    if left == 0:
        threading.Thread(target=os.kill, args=(os.getpid(), number)).start()

Partial.add = add_and_count
cli()
"""
COMMAND = ("-m", "fft.serve.batch_infer")


def started(
    model: Path, folder: Path, mark: str, *flags: object, program: tuple[object, ...] = COMMAND
) -> subprocess.Popen:
    """A run on the prompts of the folder, whose processes can be told by a mark in their environment."""
    command = [sys.executable, *program, "--model", model, "--engine", "vllm", *flags]
    command += ["--input", folder / "in.jsonl", "--output", folder / "out.jsonl", "--max_new_tokens", 32, "--seed", 7]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            list(map(str, command)), stderr=log, stdout=log, cwd=ROOT, env=os.environ | {"FFT_TEST": mark}
        )


def answered(folder: Path) -> int:
    partial = folder / ".out.jsonl.partial"
    return partial.read_bytes().count(b"\n") if partial.exists() else 0


def left(mark: str) -> list[str]:
    """Processes of a run that are there although it has ended: those that are on their way out are waited for."""
    for _ in range(600):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FFT_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        if not found:
            break
        time.sleep(0.1)
    return found


def test_a_signal_and_a_kill_change_nothing(model, start, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": p, "n": i}) + "\n" for i, p in enumerate(PROMPTS)))
    flags, log = ("--engine_args", json.dumps(ARGUMENTS)), tmp_path / "log"
    for number, more in ((signal.SIGTERM, 20), (signal.SIGKILL, 30)):
        mark, before = uuid.uuid4().hex, answered(tmp_path)
        run = start(model, tmp_path, mark, *flags, program=("-c", SIGNALLED, int(number), more))
        assert run.wait(600) == (143 if number == signal.SIGTERM else -9), log.read_text()
        assert left(mark) == []
        assert not (tmp_path / "out.jsonl").exists()
        assert before + more <= answered(tmp_path) < len(PROMPTS)
    mark = uuid.uuid4().hex
    assert start(model, tmp_path, mark, *flags).wait(600) == 0, log.read_text()
    assert left(mark) == []
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["n"]) for row in rows] == [(p, i) for i, p in enumerate(PROMPTS)]
    assert [row["text"] for row in rows] == [one.text for one in complete(model, PROMPTS, 32, max_new_tokens=32)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "log", "out.jsonl"]
    said = log.read_text()
    assert "stopped by SIGTERM" in said
    assert said.count("of them answered before") == 2
    assert not [line for line in said.splitlines() if "Error" in line or "WARNING" in line or "leaked" in line], said


def test_a_start_that_fails_is_one_sentence_with_its_cause(model, start, tmp_path):
    """The cause is said by a process of vLLM alone: memory that is not there."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    mark = uuid.uuid4().hex
    run = start(model, tmp_path, mark, "--gpu_memory_utilization", 1, "--engine_args", '{"enforce_eager": true}')
    assert run.wait(600) == 2
    said = (tmp_path / "log").read_text()
    assert left(mark) == []
    assert said.count("\n") == 1, said
    assert said.startswith("error: vLLM cannot start: ValueError: Available memory on node"), said
    assert "free memory, or take less of it with --gpu_memory_utilization" in said
