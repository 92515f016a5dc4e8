"""What a command tells its user on stderr: a line that lives while it works, and a table at the end."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fft.data.worker_notes import Amount, WorkerNotes


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
            text = line(time.monotonic() - start)
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
def progress(
    name: str, notes: WorkerNotes, parts: int, tokens: int | None = None, interval: float = 1.0
) -> Iterator[None]:
    """Show what tasks have noted in ``notes``, of ``parts`` and, if known, ``tokens`` in all; then clear it."""

    def line(seconds: float) -> str:
        return progress_line(name, notes.amount("read"), notes.amount("written"), parts, tokens, seconds)

    try:
        with live(line, interval=interval):
            yield
    finally:
        notes.clear()


def progress_line(name: str, read: Amount, written: Amount, parts: int, tokens: int | None, seconds: float) -> str:
    """For example ``shuffle: 1,200 rows, 2.4 of 9.6 M tokens written, 1.2 M tokens/s, 6 s left``.

    Where all rows are read before the first is written, that is half of the work. Without a number of ``tokens`` to
    expect, the share of parts that are finished says how much is left.
    """
    verb, now = ("written", written) if written.rows or not read.rows else ("read", read)
    amount = f"{now.tokens / 1e6:,.1f}{f' of {tokens / 1e6:,.1f}' if tokens else ''} M tokens {verb}"
    if tokens:
        passes = [done.tokens / tokens for done, counts in ((read, read.rows), (written, parts)) if counts]
        share = sum(min(p, 1.0) for p in passes) / max(1, len(passes))
    else:
        share = min(written.parts / parts, 1.0)
    left = f"{seconds / share * (1 - share):,.0f} s left" if share else f"{seconds:,.0f} s so far"
    return f"{name}: {now.rows:,} rows, {amount}, {now.tokens / seconds / 1e6:,.1f} M tokens/s, {left}"
