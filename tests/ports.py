"""Ports of loopback for servers that tests start.

They lie below those that the system hands out, so that no client of another process gets one between the question and
its use, and each process of tests asks in a range of its own.
"""

import itertools
import os
import socket

_FIRST, _LAST, _EACH = 20_000, 32_000, 400
_CANDIDATES = itertools.cycle(range(_EACH))


def free_port() -> int:
    """A port of loopback on which nobody listens, and that was not given out just before."""
    first = _FIRST + os.getpid() * _EACH % (_LAST - _FIRST)
    for offset in itertools.islice(_CANDIDATES, _EACH):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + offset))
            except OSError:
                continue
            return first + offset
    raise RuntimeError(f"no port from {first} to {first + _EACH} is free")
