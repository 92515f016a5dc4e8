"""Which device there is, and with which versions: what every report of it says first."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = (
    "torch",
    "torch-npu",
    "triton",
    "deepspeed",
    "transformers",
    "liger-kernel",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
)
#: What tells a process that a launcher started it.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Asked of a process of its own: whoever opens a device holds some of its memory.
_ASK = """
import json, sys, torch
from pathlib import Path
from fft.training.environment import commit_of
kind, root = sys.argv[1:]
if kind == "npu":
    import torch_npu
module = None if kind == "cpu" else torch.get_device_module(kind)
there = module is None or module.is_available()
name = "CPU" if module is None else module.get_device_name(0) if there else ""
print(json.dumps({"there": there, "device": name, "cuda": torch.version.cuda, "commit": commit_of(Path(root))}))
"""


def look(device: str) -> dict | None:
    """The device of a type, and the versions of what computes on it; None, with the reason on stderr, without one."""
    command = [sys.executable, "-W", "ignore", "-c", _ASK, device, str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"there": False}
    if not found.pop("there"):
        said = "".join(f" ({text})" for text in done.stderr.strip().splitlines()[-1:])
        print(f"error: torch of {sys.executable} sees no {device}{said}: run this where it does.", file=sys.stderr)
        return None
    versions = {package: v for package in PACKAGES if (v := _version(package))}
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {**found, "when": when, "python": platform.python_version(), "versions": versions}


def unlaunched() -> dict[str, str]:
    """The environment for a process that is to be no rank of this one's group."""
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHED}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
