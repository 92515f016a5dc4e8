"""What workers tell the driver, on any engine, when their input is wrong: a small file beside the output.

All of them see it, since all write there. What a storage does not do is none of it: that goes to the engine, which
tries again, see :class:`fft.errors.StorageError`.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from fft.data.storage import Storage, reaching
from fft.errors import StorageError, UserError

Work = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]

#: Ending of names that are no part of a table.
WRITING = ".writing"


@dataclass(frozen=True)
class WorkerNotes:
    """A file in ``folder``, an absolute path or a URL, whose name contains ``tag``: jobs that write versions of one
    table keep out of each other. Where a worker does not find the file ``seen``, it is not where the driver is."""

    folder: str
    tag: str = ""
    seen: str = ""

    def failed(self) -> bool:
        """Whether a task has met an error. Raises :class:`StorageError` where it does not see what the driver sees."""
        storage = Storage.at(self.folder)
        with reaching(self.folder):
            error = storage.info(self._error)
            there = not self.seen or storage.info(self.seen).type != fs.FileType.NotFound
        if not there:
            raise StorageError(
                f"a worker on {socket.gethostname()} does not find {storage.shown(self.seen)}, the mark of this job: "
                "`output` must lie on storage that all machines of the cluster mount alike, or be a URL that all can "
                "write to (s3://bucket/table)."
            )
        return error.type != fs.FileType.NotFound

    def fail(self, error: UserError) -> None:
        """Say why; the first to say it is heard. Raises ``error`` itself when nothing can be written here."""
        storage = Storage.at(self.folder)
        try:
            if not storage.exists(self._error):
                storage.write(self._error, str(error))
        except (OSError, pa.ArrowException, StorageError):
            raise error from None

    def check(self) -> None:
        """Raise what a worker said, if one did, and remove it. For the driver, when all tasks have ended."""
        storage = Storage.at(self.folder)
        if storage.exists(self._error):
            reason = storage.read(self._error).decode()
            with contextlib.suppress(OSError):
                storage.delete([self._error])
            raise UserError(reason)

    @property
    def _error(self) -> str:
        return f".part-notes{self.tag}.error{WRITING}"


@dataclass(frozen=True)
class Stoppable:
    """``work`` for ``mapInArrow`` that ends at a :class:`UserError`, and does nothing where another task has met one.

    Such a task does not fail: the engine would try it again, to fail again, and print stacks of two languages. It does
    at a :class:`StorageError`.
    """

    work: Work
    notes: WorkerNotes

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """What ``work`` yields until it meets an error."""
        if not self.notes.failed():
            try:
                yield from self.work(batches)
            except StorageError:
                raise
            except UserError as error:
                self.notes.fail(error)
        for _ in batches:  # engines expect a task to take all of its input
            continue
