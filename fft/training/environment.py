"""What a run ran on: written into its folder, for whoever wants to repeat it."""

import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

import fft


def environment(group: dist.ProcessGroup, device: torch.device) -> dict:
    """Versions, the command, and where every rank is, this one on ``device``. Collective over ``group``."""
    hosts: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(hosts, f"{socket.gethostname()} {_name(device)}", group)
    return {
        "command": shlex.join(sys.orig_argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "flash-fine-tuning": fft.__version__,
        "commit": commit_of(Path(fft.__file__).parent.parent),
        "ranks": dict(enumerate(hosts)),
    }


def commit_of(checkout: Path) -> str | None:
    """Commit of a git checkout, with ``-dirty`` where files differ from it; None where there is none, or no git."""
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    name = torch.get_device_module(device).get_device_name(device)
    return f"{device.type}:{torch.accelerator.current_device_index()} {name}"
