"""A worker's :class:`UserError` reaches the driver in a file beside the output, not as a failed task.

The engine would try a failed task again, to fail again, and print stacks of two languages while it shuts workers down.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from fft.errors import UserError

Work = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Stop:
    """The file that ends a job: while it is there, tasks that begin do nothing."""

    path: str

    def requested(self) -> bool:
        """Whether a task has met an error."""
        return os.path.exists(self.path)

    def write(self, error: UserError) -> None:
        """Say why; the first to say it is heard. Raises ``error`` itself when nothing can be written here."""
        try:
            with open(self.path, "x", encoding="utf-8") as stream:
                stream.write(str(error))
        except FileExistsError:
            return
        except OSError:
            raise error from None

    def check(self) -> None:
        """Raise what a worker wrote, if one did, and remove the file. For the driver, when all tasks have ended."""
        if self.requested():
            with open(self.path, encoding="utf-8") as stream:
                reason = stream.read()
            os.unlink(self.path)
            raise UserError(reason)


@dataclass(frozen=True)
class Stoppable:
    """``work`` for ``mapInArrow`` that ends, and lets other tasks end, at a :class:`UserError`."""

    work: Work
    stop: Stop

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """What ``work`` yields until it meets an error."""
        if not self.stop.requested():
            try:
                yield from self.work(batches)
            except UserError as error:
                self.stop.write(error)
        for _ in batches:  # engines expect a task to take all of its input
            continue
