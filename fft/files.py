"""Files and folders that appear whole or not at all, whatever a crash interrupts.

All is written beside its place, on the same file system, under a hidden name that Spark and the readers here pass
over, brought to the disk, and only then renamed. The hidden names are ``.NAME.MARK``:

- ``.NAME.writing``: a folder that is being written; ``.NAME.PID.writing``: a file that process PID is writing. Left by
  a crash they are nothing; the next writer clears a folder's.
- ``.NAME.old``: a folder while another takes its place. :func:`recover_folder` knows what to do with one it finds.

Depends on nothing but the standard library.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITING, _OLD = "writing", "old"

#: What file systems say that cannot bring a folder's names to the disk by themselves, as some mounted stores.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
#: What mounted stores say that cannot give a file another name.
_NO_RENAME = (errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
#: What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def alone(lock: Path, mode: int = 0o666, wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the file ``lock``, made with ``mode``, as at most one process does at a time, which ends with its process.

    ``wait`` is called before another one's end is waited for. Where a file system has no locks, nobody waits.
    """
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, mode)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def hidden(path: Path, mark: str) -> Path:
    """A name beside ``path`` that is no part of a table, a run or a model; ``mark`` says why it is there."""
    return path.with_name(f".{path.name}.{mark}")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk. Raises :class:`OSError` when that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield where to write what shall be the file ``path``: it gets that name at the end of the ``with`` block.

    A file that is there is replaced, or stays as it is when the block raises. Processes that write the same file at
    once do not disturb each other: the last one's stays. Where files cannot be renamed, as in a mounted store, whose
    files appear when they are closed, it is copied.
    """
    aside = hidden(path, f"{os.getpid()}.{_WRITING}")
    try:
        yield aside
        sync(aside)
        move_file(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def move_file(source: Path, target: Path) -> None:
    """Give a file another name; where files cannot be renamed, it is copied. Raises :class:`OSError`."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        shutil.copyfile(source, target)
        sync(target)
        source.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Make a file of ``content``, text as UTF-8; see :func:`atomic_file`."""
    with atomic_file(path) as aside:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode())


def staging_folder(path: str | os.PathLike[str]) -> Path:
    """Where the folder ``path`` is written before :func:`replace_folder`; the same for all processes."""
    return hidden(_resolved(path), _WRITING)


def try_folder(path: str | os.PathLike[str]) -> None:
    """Find out whether :func:`start_folder` can make the folder ``path``, by making one like it, which goes again.

    Raises :class:`OSError` where it cannot. Processes may try at the same time; nothing stays.
    """
    staging = staging_folder(path)
    place = next(above for above in staging.parents if os.path.lexists(above))
    with tempfile.TemporaryDirectory(prefix=".", suffix=".trying", dir=place) as scratch:
        (Path(scratch) / staging.relative_to(place)).mkdir(parents=True)


def start_folder(path: str | os.PathLike[str]) -> Path:
    """Make an empty :func:`staging_folder`, and its parents; an interrupted replacement is settled first."""
    recover_folder(path)
    staging = staging_folder(path)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def replace_folder(path: str | os.PathLike[str]) -> None:
    """Give a finished :func:`staging_folder`, once it is on the disk, its name. A folder that stood there is replaced.

    That takes two renames: first the old one is moved away. Interrupted between them, there is no folder ``path``;
    :func:`recover_folder` brings it back.
    """
    target, staging = _resolved(path), staging_folder(path)
    for below in staging.rglob("*"):
        sync(below)
    sync(staging)
    if target.exists():
        shutil.rmtree(hidden(target, _OLD), ignore_errors=True)
        os.replace(target, hidden(target, _OLD))
    os.replace(staging, target)
    sync(target.parent)
    shutil.rmtree(hidden(target, _OLD), ignore_errors=True)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Settle a :func:`replace_folder` that was interrupted; nothing is done when none was.

    Where the old folder was moved away, the new one is whole, since that comes first: it gets its name. Only if it has
    been removed since does the old one get its name back. What is being written for the first time stays as it is.
    """
    target, staging = _resolved(path), staging_folder(path)
    old = hidden(target, _OLD)
    if not old.is_dir():
        return
    if not target.exists():
        os.replace(staging if staging.is_dir() else old, target)
        sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _resolved(path: str | os.PathLike[str]) -> Path:
    """The folder itself: a link's end (so that the link stays), a real name for ``.``."""
    return Path(path).resolve()
