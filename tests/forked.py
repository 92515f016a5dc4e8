"""A launcher for tests: ranks are forked from one process that has imported torch and DeepSpeed, once for all tests.

To the trainer it is a launcher like any other: environment variables say who a rank is, a rank that fails ends the
others. The imports, most of what a small run costs, are saved; every rank is a process of its own that nothing has
been computed in. Tests of launchers and of crashes start real ones.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ports import free_port

ROOT = Path(__file__).resolve().parent.parent

_CONTEXT = multiprocessing.get_context("forkserver")
#: The second is what DeepSpeed imports, with torch's compiler, when it makes an optimizer.
_CONTEXT.set_forkserver_preload(["fft.training.trainer", "deepspeed.runtime.zero.muon.original_muon"])


@contextlib.contextmanager
def started(
    ranks: int, *argv: object, module: str = "fft.train", env: dict[str, str] | None = None
) -> Iterator[tuple[list, list[Path]]]:
    """``python -m module argv`` in so many ranks: the processes and the files they print to; all end with the block."""
    port = free_port()
    words = [str(word) for word in argv]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        for stream in streams:
            stream.touch()
        given = ranks, port, module, words, streams, env or {}
        processes = [_CONTEXT.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            yield processes, streams
        finally:
            for process in processes:
                process.kill()
                process.join()


def run_ranks(
    ranks: int,
    *argv: object,
    module: str = "fft.train",
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run ``python -m module argv`` from the repository's root in so many ranks; returns the job when it has ended."""
    with started(ranks, *argv, module=module, env=env) as (processes, streams):
        code = _wait(processes, time.monotonic() + timeout)
        return subprocess.CompletedProcess([module, *argv], code, *(stream.read_text() for stream in streams))


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
    rank: int, ranks: int, port: int, module: str, argv: list[str], streams: list[Path], env: dict[str, str]
) -> None:
    gc.freeze()  # what was imported is not looked through again: DeepSpeed collects a dozen times as it starts
    for descriptor, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(ROOT)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
