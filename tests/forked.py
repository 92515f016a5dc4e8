"""A launcher for tests: ranks are forked from one process that has imported all that they need, once for all tests.

To the trainer it is a launcher like any other: environment variables say who a rank is, a rank that fails ends the
others. The imports, most of what a small run costs, are those of `warm.py`; every rank is a process of its own that
nothing has been computed in. Tests of launchers and of crashes start real ones.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ports import free_port

from benchmarks.hosts import Hosts, enter

ROOT = Path(__file__).resolve().parent.parent

#: Every test's processes are forked by this one server: there is one in a process, and what it imports is said once.
CONTEXT = multiprocessing.get_context("forkserver")
_WARM = "tests.warm"
CONTEXT.set_forkserver_preload([_WARM])


@contextlib.contextmanager
def started(
    ranks: int,
    *argv: object,
    module: str = "fft.train",
    hosts: Hosts | None = None,
    env: dict | None = None,
    folder: Path = ROOT,
) -> Iterator[tuple[list, list[Path]]]:
    """``python -m module argv`` from ``folder`` in so many ranks: the processes and the files they print to; all end
    with the block.

    On ``hosts``, if there are some, which share the ranks out and print to files of their own: stdout, stderr of each.
    """
    places, here = hosts.pids if hosts else [0], ranks // (hosts.count if hosts else 1)
    given = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": here, "MASTER_PORT": free_port()}
    given |= {"MASTER_ADDR": hosts.addresses[0] if hosts else "127.0.0.1", **(env or {})}
    with tempfile.TemporaryDirectory() as printed:
        streams = [Path(printed, f"{name}{place}") for place in places for name in ("stdout", "stderr")]
        for stream in streams:
            stream.touch()
        processes = []
        for rank in range(ranks):
            host, local = divmod(rank, here)
            variables = {name: str(x) for name, x in {**given, "RANK": rank, "LOCAL_RANK": local}.items()}
            told = [str(word) for word in argv], variables, streams[2 * host : 2 * host + 2], places[host], folder
            processes.append(CONTEXT.Process(target=_rank, args=(module, *told)))
        for process in processes:
            process.start()
        try:
            yield processes, streams
        finally:
            for process in processes:
                process.kill()
                process.join()


#: As libraries write them, Python's own and those of loggers; what DeepSpeed says of gradients is news.
WARNINGS = re.compile(
    r"^(?!.*OVERFLOW! Skipping step)(?:\S+:\d+: \w*Warning: |\[\S+ \S+\] \[WARNING\] |W\d{4} |WARNING:).*", re.MULTILINE
)


def run_ranks(
    ranks: int,
    *argv: object,
    module: str = "fft.train",
    timeout: float = 300,
    env: dict[str, str] | None = None,
    folder: Path = ROOT,
) -> subprocess.CompletedProcess:
    """Run ``python -m module argv`` from ``folder`` in so many ranks; returns the job when it has ended.

    No library may warn of anything.
    """
    with started(ranks, *argv, module=module, env=env, folder=folder) as (processes, streams):
        code = _wait(processes, time.monotonic() + timeout)
        told = [stream.read_text() for stream in streams]
    warned = WARNINGS.search("".join(told))
    assert warned is None, f"{module} {argv}: {warned[0]}"
    return subprocess.CompletedProcess([module, *argv], code, *told)


def _wait(processes: list, deadline: float) -> int:
    """0 when all have ended well, else the exit code of the first that did not."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = multiprocessing.connection.wait(list(running), deadline - time.monotonic())
        if not ended:
            raise TimeoutError(f"{len(running)} of {len(processes)} ranks are still running")
        for process in [running.pop(sentinel) for sentinel in ended]:
            process.join()
            if process.exitcode:
                return process.exitcode
    return 0


def _rank(
    module: str, argv: list[str], variables: dict[str, str], streams: list[Path], place: int, folder: Path
) -> None:
    assert _WARM in sys.modules, "the server had other things to import, or could not"
    gc.freeze()  # what was imported is not looked through again: DeepSpeed collects a dozen times as it starts
    if place:
        enter(place)
    for descriptor, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(folder)
    os.environ.update(variables)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
