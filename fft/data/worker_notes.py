"""What workers tell the driver while they work, on any engine: an error, and how far they are.

Both are small files under hidden temporary names beside the output, which the end of a job removes.
"""

import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from fft.errors import UserError

Work = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]

#: Ending of names that are no part of a table.
WRITING = ".writing"
_NUMBERS = struct.Struct("<3q")
#: Seconds between two notes of a task.
_INTERVAL = 0.5


@dataclass(frozen=True)
class Amount:
    """Rows and tokens so far, and parts that are finished."""

    rows: int = 0
    tokens: int = 0
    parts: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.rows + other.rows, self.tokens + other.tokens, self.parts + other.parts)


class Meter:
    """Notes what one task has done; the notes of a task that failed stay, and count twice when it runs again."""

    def __init__(self, path: str) -> None:
        self._path, self._amount, self._noted = path, Amount(), time.monotonic()

    def add(self, rows: int = 0, tokens: int = 0, parts: int = 0) -> None:
        """Count what has been done since the last call."""
        self._amount += Amount(rows, tokens, parts)
        if parts or time.monotonic() - self._noted > _INTERVAL:
            self._noted, amount = time.monotonic(), self._amount
            try:
                Path(self._path).write_bytes(_NUMBERS.pack(amount.rows, amount.tokens, amount.parts))
            except OSError:  # a full disk, say: the output itself meets it, and says so
                self._noted += 60


@dataclass(frozen=True)
class WorkerNotes:
    """Files in ``folder`` whose names contain ``tag``: jobs that write versions of one table keep out of each other."""

    folder: str
    tag: str = ""

    def meter(self, what: str) -> Meter:
        """A new meter of a task that has done ``what``: "read" or "written"."""
        return Meter(f"{self._prefix}.{what}.{uuid.uuid4().hex}{WRITING}")

    def amount(self, what: str) -> Amount:
        """All tasks' notes together."""
        total = Amount()
        for path in self._files(what):
            try:
                note = path.read_bytes()
            except FileNotFoundError:
                continue  # the job has just ended
            if len(note) == _NUMBERS.size:  # else it is being written
                total += Amount(*_NUMBERS.unpack(note))
        return total

    def clear(self) -> None:
        """Remove all notes."""
        for path in self._files("*"):
            path.unlink(missing_ok=True)

    def failed(self) -> bool:
        """Whether a task has met an error."""
        return os.path.exists(self._error)

    def fail(self, error: UserError) -> None:
        """Say why; the first to say it is heard. Raises ``error`` itself when nothing can be written here."""
        try:
            with open(self._error, "x", encoding="utf-8") as stream:
                stream.write(str(error))
        except FileExistsError:
            return
        except OSError:
            raise error from None

    def check(self) -> None:
        """Raise what a worker said, if one did, and remove it. For the driver, when all tasks have ended."""
        if self.failed():
            with open(self._error, encoding="utf-8") as stream:
                reason = stream.read()
            os.unlink(self._error)
            raise UserError(reason)

    @property
    def _prefix(self) -> str:
        return f"{self.folder}/.part-notes{self.tag}"

    @property
    def _error(self) -> str:
        return f"{self._prefix}.error{WRITING}"

    def _files(self, what: str) -> Iterator[Path]:
        return Path(self.folder).glob(f".part-notes{self.tag}.{what}.{'[0-9a-f]' * 32}{WRITING}")


@dataclass(frozen=True)
class Stoppable:
    """``work`` for ``mapInArrow`` that ends at a :class:`UserError`, and does nothing where another task has met one.

    Such a task does not fail: the engine would try it again, to fail again, and print stacks of two languages.
    """

    work: Work
    notes: WorkerNotes

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """What ``work`` yields until it meets an error."""
        if not self.notes.failed():
            try:
                yield from self.work(batches)
            except UserError as error:
                self.notes.fail(error)
        for _ in batches:  # engines expect a task to take all of its input
            continue
