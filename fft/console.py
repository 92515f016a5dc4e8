"""What a command tells its user on stderr: a line that lives while it works, and a table at the end."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fft.redaction import fit_to_print


def say(text: str) -> None:
    """One line for the user, without what is secret in it, or what a terminal would obey."""
    print(fit_to_print(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``83.2`` -> ``1:23``, and from an hour on ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned, numbers with thousands separators and to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

    def line(row: list[str]) -> str:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def live(line: Callable[[float], str], last: bool = False, interval: float = 1.0) -> Iterator[None]:
    """Show how far the block is: ``line`` says so, given the seconds since its begin, and is called by a thread.

    A terminal has one line, rewritten every ``interval`` seconds and cleared at the end; a log file gets one every half
    minute. With ``last`` the line is shown once more, to stay, when the block ends without an error.
    """
    tty = sys.stderr.isatty()
    stop = threading.Event()
    start = time.monotonic()

    def poll() -> None:
        while not stop.wait(interval if tty else 30.0):
            text = fit_to_print(line(time.monotonic() - start))
            print(f"\r{text}\x1b[K" if tty else text, end="" if tty else "\n", file=sys.stderr, flush=True)
        if tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if last:
        say(line(time.monotonic() - start))


@contextmanager
def progress(name: str, tasks: Callable[[], tuple[int, int]], interval: float = 1.0) -> Iterator[None]:
    """Show how many ``tasks`` have ended, of how many; then clear it."""
    with live(lambda seconds: progress_line(name, *tasks(), seconds), interval=interval):
        yield


def progress_line(name: str, ended: int, tasks: int, seconds: float) -> str:
    """For example ``shuffle: 12 of 64 tasks, 26 s left``; without tasks, and before one has ended, the time so far."""
    done = f"{ended:,} of {tasks:,} tasks, " if tasks else ""
    left = f"{seconds / ended * (tasks - ended):,.0f} s left" if ended else f"{seconds:,.0f} s so far"
    return f"{name}: {done}{left}"
