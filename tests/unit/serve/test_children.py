"""Processes that an engine starts: none outlives this one, and what they say in the beginning is heard."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from fft.serve.engines.children import Children, Overheard, true_cause

#: Starts a child with a child of its own, is told their ids, and waits.
PARENT = """
import subprocess, sys, time
from fft.serve.engines.children import Children
children = Children()
sleep = "import time; time.sleep(600)"
child = "import subprocess, sys; subprocess.run([sys.executable, '-c', " + repr(sleep) + "])"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(2)
if {settle}:
    children.settle()
print("ready", flush=True)
time.sleep(600)
"""


def wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in psutil.wait_procs(processes, 10)[1] if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("settle", [False, True])
def test_a_kill_leaves_none(settle):
    command = [sys.executable, "-c", PARENT.replace("{settle}", str(settle))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout.readline() == "ready\n"
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) == 3  # with the guard
        parent.send_signal(signal.SIGKILL)
    assert wait_until_gone(below) == []


def test_the_end_takes_those_that_started_in_between_and_no_others():
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    before = subprocess.Popen(sleeping)
    children = Children()
    own = subprocess.Popen(sleeping)
    children.settle()
    after = subprocess.Popen(sleeping)
    try:
        begin = time.monotonic()
        children.end(0.1)
        assert time.monotonic() - begin < 5
        assert own.wait(300) == -signal.SIGKILL
        assert before.poll() is None
        assert after.poll() is None
        children.end(0.1)
    finally:
        for process in (before, own, after):
            process.kill()
            process.wait()


def test_what_is_said_is_kept_and_shown_on_demand(capfd):
    for shown in (False, True):
        with Overheard(shown) as heard:
            subprocess.run([sys.executable, "-c", "print('of a child')"], check=True)
            os.write(2, b"of this process\n")
        for _ in range(100):
            if len(heard.lines) == 2:
                break
            time.sleep(0.02)
        assert sorted(heard.lines) == ["of a child", "of this process"]
        os.write(1, b"after\n")
        time.sleep(0.05)
        out, err = capfd.readouterr()
        assert out == "after\n"
        assert ("of a child" in err) == shown


#: What vLLM 0.32 wrote when memory was missing, shortened.
LOG = """
(EngineCore pid=1) ERROR 11-25 23:00:00 [core.py:1] Traceback (most recent call last):
(Worker pid=2) ERROR [worker.py:80] ValueError: Available memory on node 0 (9.41/20.59 GiB) is less. See https://x
(EngineCore pid=1) ERROR [core.py:1] Exception: WorkerProc initialization failed, see a background process.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
""".splitlines()


def test_the_true_cause_is_what_a_process_said_first():
    hollow = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert true_cause(hollow, LOG) == "ValueError: Available memory on node 0 (9.41/20.59 GiB) is less"
    assert true_cause(TypeError("unknown argument\n 'x'"), LOG) == "TypeError: unknown argument 'x'"
    assert true_cause(hollow, []).startswith("RuntimeError: Engine core initialization failed")
