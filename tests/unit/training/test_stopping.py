"""Which processes a rank watches, and what asks it to stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fft.training.stopping import StopRequest

ROOT = Path(__file__).resolve().parents[3]
_RANK = "from fft.training.stopping import launchers; print(len(launchers()))"


@pytest.mark.parametrize(
    ("launcher", "between", "watched"),
    [
        ("torchrun", [], 1),
        ("deepspeed", ["bash", "-c", '"$0" -c "$1"; true'], 2),  # the shell, which has to live as long
        ("supervisor", [], 0),
    ],
)
def test_what_is_watched(launcher, between, watched, tmp_path):
    """A launcher and what it needs to know of its ranks; neither a supervisor nor the shell above it."""
    script = tmp_path / launcher
    script.write_text("import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)")
    rank = [sys.executable, _RANK] if between[:1] == ["bash"] else [sys.executable, "-c", _RANK]
    command = [sys.executable, str(script), *between, *rank]
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == watched


def test_who_asks(monkeypatch):
    handled = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        above = [psutil.Process(launcher.pid)]
        try:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
            asked = StopRequest(signals=True, above=above)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert asked.reason is None
            launcher.kill()
            os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has taken note of it
            assert asked.reason == "because the launcher is gone"
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.reason == "by the signal SIGTERM"
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)
