"""Signals that ask a command to end: they end it in order, by the code that shells know."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(SystemExit):
    """A signal has asked for the end; ``code`` is 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def ending_in_order() -> Iterator[None]:
    """In this block, SIGTERM, SIGINT and SIGHUP raise :class:`Stopped` in the main thread, once: further ones are
    passed over, so that they do not interrupt the end."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in _SIGNALS:
        # Who starts a command with nohup has it ignore the terminal's end.
        if number != signal.SIGHUP or before[number] == signal.SIG_DFL:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)
