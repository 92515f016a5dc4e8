"""Ports of loopback for servers that tests start.

They lie below those that the system hands out, so that no client of another process gets one between the question and
its use, and each process of tests asks in a range that is its own while it runs.
"""

import functools
import itertools
import os
import socket

_FIRST, _LAST, _EACH = 20_000, 32_000, 400
_CANDIDATES = itertools.cycle(range(_EACH))


@functools.cache
def _own_range() -> tuple[int, socket.socket]:
    """The first port of a range, and what keeps it this process's: a name that goes with it, as the ports do."""
    ranges = (_LAST - _FIRST) // _EACH
    for number in range(os.getpid(), os.getpid() + ranges):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0fft-tests-ports-{number % ranges}")
        except OSError:
            claim.close()
            continue
        return _FIRST + number % ranges * _EACH, claim
    raise RuntimeError(f"{ranges} processes of tests hold all ports from {_FIRST} to {_LAST}")


def free_port() -> int:
    """A port of loopback on which nobody listens, and that was not given out just before."""
    first, _ = _own_range()
    for offset in itertools.islice(_CANDIDATES, _EACH):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + offset))
            except OSError:
                continue
            return first + offset
    raise RuntimeError(f"no port from {first} to {first + _EACH} is free")
