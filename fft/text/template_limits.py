"""Templates are programs of strangers: how long one may run, and in how much memory it is tried."""

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FrameType

#: Seconds of a processor, and bytes, of which a rendering of two short messages takes thousandths.
_TRIED_SECONDS, _TRIED_BYTES = 10, 1 << 30
#: Seconds in which a trial that waits for its turn, or for nothing, has to end.
_TRIED_WITHIN = 120
#: Seconds that rendering one conversation may take.
LONGEST = 60.0
#: Exit code of a trial that memory did not suffice for.
_NO_MEMORY = 3


def fault_of(trial: Callable[[], object]) -> str | None:
    """What is wrong with ``trial`` if it does not end, or does not fit, and None if it returns or raises what it likes.

    It is called in a child of this process, with limits, whose memory goes with it.
    """
    child = os.fork()
    if child == 0:
        code = 0
        try:
            _limit()
            trial()
        except BaseException as error:  # of any other, the caller will meet it again
            code = _NO_MEMORY if isinstance(error.__cause__ or error, MemoryError) else 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + _TRIED_WITHIN
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"does not end within {_TRIED_WITHIN} s"
        time.sleep(0.002)
    if status == 0:
        return None
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"does not end within {_TRIED_SECONDS} s"
    return f"takes more than {_TRIED_BYTES:,} bytes of memory"


def _limit() -> None:
    """Limits of this process: seconds from now on, and bytes beyond those that it has."""
    for number in (signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (_TRIED_SECONDS, _TRIED_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not Linux, or a limit of the user's that is lower
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _TRIED_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Deadline:
    """Raises :class:`TimeoutError` in its ``with`` block when that takes longer; only a process's main thread can.

    (A class, and an alarm that stays taken: it is set for every rendering, which takes some ten microseconds.)
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds if threading.get_ident() == threading.main_thread().ident else 0
        if self._seconds:
            _take_alarm()

    def __enter__(self) -> None:
        if self._seconds:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)


@lru_cache(maxsize=1)
def _take_alarm() -> None:
    signal.signal(signal.SIGALRM, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise TimeoutError
