"""How long a save keeps training waiting on a device: ours, each way, beside DeepSpeed's and torch's."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoint import METHODS, NAMES
from benchmarks.device.frame import Cases, Row, Setting
from benchmarks.device.machine import ROOT


def cases(setting: Setting) -> Cases:
    """A way to save each, of the same state, in a process of its own."""
    for method in METHODS:
        yield NAMES[method], functools.partial(save, method, 1 if setting.smallest else 48)


def save(method: str, layers: int) -> list[Row]:
    """A row. Raises RuntimeError with the end of what the process said."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.checkpoint", "--method", method, "--layers", str(layers)]
        done = subprocess.run([*command, "--work", folder], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        told = json.loads(Path(folder, f"{method}.json").read_text(encoding="utf-8"))
    return [
        {
            "saver": NAMES[method],
            "M parameters": told["parameters"] / 1e6,
            "blocked s": told["blocked"],
            "whole s": told["whole"],
            "load s": told["load"],
            "MB on disk": told["bytes"] / 2**20,
        }
    ]
