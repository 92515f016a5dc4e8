"""What a job tells its user on stderr: a line that lives while it writes, and a table at the end."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def say(text: str) -> None:
    """One line for the user."""
    print(text, file=sys.stderr, flush=True)


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
def progress(name: str, folder: Path, expected_bytes: int, interval: float = 1.0) -> Iterator[None]:
    """Show how much has been written below ``folder``, the rate, and when about ``expected_bytes`` will be there.

    The listing works on every engine. A terminal gets one line rewritten, a log file one line every half minute.
    """
    tty = sys.stderr.isatty()
    stop = threading.Event()
    thread = threading.Thread(
        target=_poll, args=(name, lambda: written_bytes(folder), expected_bytes, interval if tty else 30.0, stop, tty)
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _poll(
    name: str, measure: Callable[[], int], expected: int, interval: float, stop: threading.Event, tty: bool
) -> None:
    start = time.monotonic()
    while not stop.wait(interval):
        line = progress_line(name, measure(), expected, time.monotonic() - start)
        print(f"\r{line}\x1b[K" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)
    if tty:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def progress_line(name: str, done: int, expected: int, seconds: float) -> str:
    """For example ``shuffle: 12.0 of about 48.0 MB written, 6.0 MB/s, 6 s left``."""
    rate = done / seconds
    left = f"{max(expected - done, 0) / rate:,.0f} s left" if done else f"{seconds:,.0f} s so far"
    expected = max(expected, done)
    return f"{name}: {done / 1e6:,.1f} of about {expected / 1e6:,.1f} MB written, {rate / 1e6:,.1f} MB/s, {left}"


def written_bytes(folder: Path) -> int:
    """Bytes of all parquet files below, finished or not. Files may come and go while this looks."""
    total = 0
    for place, _, names in os.walk(folder):  # passes over folders that vanish
        for name in names:
            if name.endswith((".parquet", ".writing")):
                try:
                    total += os.stat(os.path.join(place, name)).st_size
                except FileNotFoundError:  # moved to its final place since it was listed
                    continue
    return total
