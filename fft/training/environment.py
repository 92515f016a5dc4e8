"""What a run runs on: what its launcher says, and what is written into its folder for whoever wants to repeat it."""

import os
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
from fft.errors import UserError
from fft.parallel.groups import tell_all
from fft.redaction import redact

#: What launchers tell every rank.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: What launchers that do not tell it would leave of theirs: each process would take itself for the whole run.
_OTHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
#: Where settings of torch's allocator are looked for.
_ALLOCATOR = frozenset({"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"})


def let_memory_grow() -> None:
    """Have torch's allocator on GPUs grow its pieces of memory, so that rows of many lengths leave few gaps.

    It looks once, when CUDA is first used: this has to come before. What the user has set for it stays.
    """
    if not _ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def world_size() -> int:
    """How many ranks a launcher started; 1 without one. Raises :class:`UserError` where its variables do not fit."""
    given = {name: os.environ[name] for name in _LAUNCHED if name in os.environ}
    if "RANK" not in given:
        for name in _OTHERS:
            if os.environ.get(name, "1") != "1":
                raise UserError(
                    f"{name} is {os.environ[name]} but RANK is not set: start ranks with torchrun or deepspeed, or "
                    f"unset {name} to train in one process."
                )
        return 1
    missing = [name for name in _LAUNCHED if name not in given]
    if missing:
        raise UserError(f"RANK is set but {', '.join(missing)} is not: start ranks with torchrun or deepspeed.")
    numbers = [given[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if not all(number.isdecimal() for number in numbers) or not int(numbers[0]) < int(numbers[2]):
        told = ", ".join(f"{name}={given[name]}" for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        raise UserError(f"{told} in the environment is no rank of a run: start ranks with torchrun or deepspeed.")
    return int(given["WORLD_SIZE"])


def environment(group: dist.ProcessGroup, device: torch.device) -> dict:
    """Versions, the command, and where every rank is, this one on ``device``. Collective over ``group``."""
    hosts = tell_all(f"{socket.gethostname()} {_name(device)}", group)
    return {
        "command": redact(shlex.join(sys.orig_argv)),
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
