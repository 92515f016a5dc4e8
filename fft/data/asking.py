"""Ask file systems, of stores again where they are busy; and write a file of any size."""

import contextlib
import os
import random
import re
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from fft.files import new_file, remove_file, sync
from fft.redaction import OF_STORES

T = TypeVar("T")

#: What stores say that may answer when they are asked again: throttled, overloaded, or not reached.
_PASSING = re.compile(
    r"SLOW_?DOWN|THROTTL|SERVICE_UNAVAILABLE|UNAVAILABLE|INTERNAL_FAILURE|RESOURCE_EXHAUSTED|REQUEST_TIME|"
    r"NETWORK_CONNECTION|HTTP status (?:429|5(?!07)\d\d)|timed? ?out|connection (?:reset|refused|closed)|curlCode",
    re.IGNORECASE,
)
#: What pyarrow says of any error of a store.
_OF_STORES = re.compile(r"AWS Error|google::cloud|Azure|HDFS", re.IGNORECASE)
#: How often a store is asked, and seconds before it is asked for the second time; then twice as long, and so on.
_TRIES, _FIRST_WAIT = 6, 0.2


def file_system(base: str) -> tuple[fs.FileSystem, str]:
    """What lies behind the beginning of URLs, and their root there: one for all of them, in a process and as long as it
    asks with the same credentials, since each has connections of its own.

    Raises what pyarrow does for what it does not reach.
    """
    asked_by = frozenset((name, value) for name, value in os.environ.items() if name.startswith(OF_STORES))
    return _file_system(base, asked_by, os.getpid())


@lru_cache(maxsize=8)
def _file_system(base: str, *_: object) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(base)


def asking(ask: Callable[[], T]) -> T:
    """What ``ask`` returns. Where a store says that it is busy, or is not reached, it is asked again, later and later.

    Raises :class:`OSError`, or what else it says, at once for all other errors, and in the end.
    """
    for turn in range(1, _TRIES):
        try:
            return ask()
        except (pa.ArrowException, OSError) as error:
            if not _PASSING.search(str(error)):
                raise
        time.sleep(_FIRST_WAIT * 2 ** (turn - 1) * random.uniform(0.5, 1.5))
    return ask()


def of_storage(error: Exception) -> bool:
    """Whether an error tells of a storage, and not of what a file holds: of both, libraries say :class:`OSError`."""
    return isinstance(error, OSError) and (
        error.errno is not None or _OF_STORES.search(str(error)) is not None or _PASSING.search(str(error)) is not None
    )


def delete_object(filesystem: fs.FileSystem, path: str) -> None:
    """Remove a file of a store; one that is not there does not matter. Raises :class:`OSError`."""
    with contextlib.suppress(FileNotFoundError):
        asking(partial(filesystem.delete_file, path))


class NewFile:
    """A file that is being written, by its ``stream``; it is whole, and there for good, once :meth:`close` returns.

    In a store it has its name only then, and what a process that is killed has sent is no file; on a disk it has it
    from the beginning, so a name is given that nobody reads until it is told, and that nothing has. Raises
    :class:`OSError`.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._is_local = isinstance(filesystem, fs.LocalFileSystem)
        if self._is_local:
            os.close(new_file(path))
        self.stream = asking(partial(filesystem.open_output_stream, path))

    def close(self) -> int:
        """Finish it; returns its bytes."""
        size = self.stream.tell()
        self.stream.close()
        if self._is_local:
            sync(Path(self._path))
        return size

    def discard(self) -> None:
        """Remove it, as far as that goes: stores finish what is not finished, so it is closed first."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self.stream.close()
        with contextlib.suppress(OSError, pa.ArrowException):
            remove_file(self._path) if self._is_local else delete_object(self._filesystem, self._path)
