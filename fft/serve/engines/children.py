"""Processes that vLLM starts: what they say while they start, and that none outlives this one, however it ends.

vLLM's processes go on computing, or sleep for good, when the one that started them is killed. A guard, a process of its
own, waits for this one's end and then ends them.
"""

import contextlib
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterable

import psutil

from fft.errors import one_line

#: Seconds between two looks of the guard.
_LOOK = 0.5
#: Lines of output that are kept.
_LINES = 10_000
#: What a traceback ends with.
_ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+)$")
#: Where the first sentence ends: what follows is vLLM's advice, for its own flags.
_SENTENCE = re.compile(r"(?<=[.!])\s+(?=[A-Z])")
#: What errors say of which another one is the cause.
_HOLLOW = ("root cause", "stack trace", "initialization failed", "background process")
_GUARD = "import sys; from fft.serve.engines.children import guard; guard(*map(int, sys.argv[1:]))"


class Children:
    """The processes that start, below this one, until :meth:`settle`: a guard ends them when this one has ended."""

    def __init__(self) -> None:
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self._own: list[psutil.Process] | None = None
        self._ended = False
        # A session of its own: what ends this process's group, as Ctrl-C does, leaves the guard to its work.
        self._guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD, str(os.getpid()), *map(str, self._before)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # also where this code came in a zip
        )
        if self._guard.stdout is not None:
            self._guard.stdout.read(1)  # from now on it looks
        self._before.add(self._guard.pid)

    def settle(self) -> None:
        """All have started: what starts from now on is none of them."""
        self._own = _started(os.getpid(), self._before)
        if self._guard.stdin is not None:
            with contextlib.suppress(OSError):  # a guard that was killed guards nothing
                self._guard.stdin.write(" ".join(str(child.pid) for child in self._own).encode() + b"\n")
                self._guard.stdin.flush()

    def end(self, patience: float) -> None:
        """Give them some seconds to end by themselves, then kill; and end the guard."""
        if self._ended:
            return
        self._ended = True
        _end(_started(os.getpid(), self._before) if self._own is None else self._own, patience)
        if self._guard.stdin is not None:
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
        self._guard.wait()
        if self._guard.stdout is not None:
            self._guard.stdout.close()


def guard(parent: int, *before: int) -> None:
    """Wait until the process ``parent``, which started this one, has ended or closed this one's input; then kill what
    has started below it. A line of process ids on the input says that there will be no others."""
    found: dict[int, psutil.Process] = {}
    others, settled = {os.getpid(), *before}, False
    os.write(1, b".")
    while os.getppid() == parent:
        if not settled:
            found |= {child.pid: child for child in _started(parent, others)}
        if select.select([0], [], [], _LOOK)[0]:
            line = os.read(0, 1 << 16)
            if not line:
                break
            settled, found = True, {int(pid): process for pid in line.split() for process in _living(int(pid))}
    _end(found.values(), 0.0)


def _started(parent: int, before: set[int]) -> list[psutil.Process]:
    """Processes below ``parent`` that were not there before, but for Python's tracker of resources, which clears up
    after all and then ends by itself."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.pid not in before and "resource_tracker" not in " ".join(child.cmdline()):
                    found.append(child)
    return found


def _end(processes: Iterable[psutil.Process], patience: float) -> None:
    """Kill those that live after so many seconds, and what they have started."""
    living = list(processes)
    below = [child for process in living if process.is_running() for child in _below(process)]
    _, living = psutil.wait_procs(living, patience)
    for process in {*living, *below}:
        with contextlib.suppress(psutil.Error):
            process.kill()  # psutil knows by its time of start that it is the same


def _living(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid)]
    return []


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


class Overheard:
    """What this process and those that it starts write to stdout or stderr in a block, and these as long as they live.

    It goes to stderr while ``shown``; of ``lines`` the first ones are kept.
    """

    def __init__(self, shown: bool) -> None:
        self.shown, self.lines = shown, list[str]()

    def __enter__(self) -> "Overheard":
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        read, write = os.pipe()
        self._kept = os.dup(1), os.dup(2)
        threading.Thread(target=self._pass_on, args=(read, os.dup(2)), daemon=True).start()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        return self

    def __exit__(self, *_: object) -> None:
        for number, (stream, kept) in enumerate(zip((sys.stdout, sys.stderr), self._kept, strict=True), 1):
            stream.flush()
            os.dup2(kept, number)
            os.close(kept)

    def _pass_on(self, read: int, stderr: int) -> None:
        with os.fdopen(read, "rb") as stream, os.fdopen(stderr, "wb", buffering=0) as out:
            for line in stream:
                if len(self.lines) < _LINES:
                    self.lines.append(line.decode(errors="replace").rstrip())
                if self.shown:
                    out.write(line)


def true_cause(error: Exception, lines: Iterable[str]) -> str:
    """What went wrong in the first place: the error itself, or where that only points to another one, what another
    process said."""
    said = f"{type(error).__name__}: {one_line(error)}"
    if any(word in said for word in _HOLLOW):
        causes = (found[1] for line in lines if (found := _ERROR.search(line)))
        said = next((cause for cause in causes if not any(word in cause for word in _HOLLOW)), said)
    return _SENTENCE.split(said)[0][:400].rstrip(" .")
