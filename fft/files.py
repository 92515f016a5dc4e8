"""Files and folders that appear whole or not at all, whatever a crash interrupts.

All is written beside its place, on the same file system, under a hidden name that Spark and the readers here pass
over, brought to the disk, and only then renamed. The hidden names are ``.NAME.MARK``:

- ``.NAME.writing``: a folder that is being written; ``.NAME.RANDOM.writing``: a file that is. Left by a crash they are
  nothing; the next writer clears a folder's, and who goes on in a run's or a table's folder those of its files.
- ``.NAME.old``: a folder while another takes its place. :func:`recover_folder` knows what to do with one it finds.

Others may write to the same folder, and leave links in it. Nothing is written, emptied or removed through one: the
folder that a user names may be a link, see :func:`end_of`; what we make or remove in it is taken for what it is. All of
the product that writes or removes does it by these functions.

Depends on nothing but the standard library.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WRITING, _OLD = "writing", "old"

#: What file systems say that cannot bring a folder's names to the disk by themselves, as some mounted stores.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
#: What mounted stores say that cannot give a file another name.
_NO_RENAME = (errno.ENOSYS, errno.ENOTSUP, errno.EPERM)
#: What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
#: How a folder is opened to name what is in it, which needs no permission to list it where the system can do without.
_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


def own_file(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """Open a file to write to it, by ``flags`` and ``mode`` of ``os.open``; returns the descriptor.

    Raises :class:`OSError` for a link to another one, and for what is no file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise _no_own("file", path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_own("file", path)
    return descriptor


def new_file(path: str | os.PathLike[str], mode: int = 0o666) -> int:
    """Make a file to write to; returns the descriptor. Raises :class:`FileExistsError` where anything has its name."""
    return own_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def claim_file(path: Path) -> None:
    """Have an empty file of this name, in the place of whatever has it, for who can only write to names."""
    remove_path(path)
    os.close(new_file(path))


def utf8(content: str | bytes) -> bytes:
    """What a file is given of a text. Half a character, which an escape in strangers' JSON makes and UTF-8 cannot hold,
    becomes that escape again."""
    return content if isinstance(content, bytes) else content.encode(errors="backslashreplace")


def write_file(path: Path, content: str | bytes) -> None:
    """Make a file of ``content``, text as UTF-8, in the place of whatever has its name: in a folder that is not read
    yet; elsewhere by :func:`write_atomically`."""
    remove_path(path)
    with open(new_file(path), "wb") as stream:
        stream.write(utf8(content))


def copy_file(source: Path, target: Path) -> None:
    """Make a file of the content of ``source``, as :func:`write_file` does."""
    remove_path(target)
    with open(source, "rb") as read, open(new_file(target), "wb") as written:
        shutil.copyfileobj(read, written, 1 << 20)


def private_folder(name: str) -> Path:
    """A folder of this user alone in the machine's temporary one, under a name that others may guess.

    Raises :class:`OSError` where it cannot be made, and where somebody else has made it: what lies there cannot be
    trusted.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "it belongs to somebody else, or is open to others", str(folder))
    return folder


def own_folder(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
    """Have a folder there, and those above it; see :func:`check_own`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    check_own(path, base)


def check_own(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
    """Raise :class:`OSError` where a folder is a link, or one leads to it from ``base``, a folder above it."""
    with _folder(Path(path) / "_", Path(path).parent if base is None else base):
        pass


def remove_path(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
    """Remove what has this name, if anything: a link, not what it leads to; a file; a folder with all that is in it.

    Nothing is removed through links on the way from ``base``, a folder above it, of which the parent is one. Raises
    :class:`OSError` where it cannot be removed.
    """
    path = _placed(path) if base is None else Path(path)
    with suppress(FileNotFoundError), _folder(path, base) as above:
        if stat.S_ISDIR(os.lstat(path.name, dir_fd=above).st_mode):
            shutil.rmtree(path.name, dir_fd=above)  # which neither follows links, nor one that takes its place now
        else:
            os.unlink(path.name, dir_fd=above)


def remove_file(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
    """Remove a file, or a link itself, as :func:`remove_path` does, but no folder."""
    path = Path(path)
    with suppress(FileNotFoundError), _folder(path, base) as above:
        os.unlink(path.name, dir_fd=above)


def remove_empty(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> None:
    """Remove a folder if it is there, empty, and no link; see :func:`remove_path`."""
    path = Path(path)
    with suppress(OSError), _folder(path, base) as above:
        os.rmdir(path.name, dir_fd=above)


@contextmanager
def _folder(path: Path, base: str | os.PathLike[str] | None) -> Iterator[int]:
    """A descriptor of the folder of ``path``; no link leads to it from ``base``, which may be one."""
    base = path.parent if base is None else Path(base)
    above = os.open(base, _FOLDER)
    try:
        for part in path.parent.relative_to(base).parts:
            try:
                below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise _no_own("folder", path.parent) from error
                raise
            os.close(above)
            above = below
        yield above
    finally:
        os.close(above)


def _no_own(kind: str, path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.ELOOP, f"it is a link, or no {kind}: remove it", str(path))


def _is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has this name, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def end_of(path: str | os.PathLike[str]) -> Path:
    """The folder, or file, that a user names: where a link of his ends, so that the link stays."""
    return Path(path).resolve()


@contextmanager
def alone(lock: Path, mode: int = 0o666, wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the file ``lock``, made with ``mode``, as at most one process does at a time, which ends with its process.

    ``wait`` is called before another one's end is waited for. Where a file system has no locks, nobody waits.
    """
    descriptor = own_file(lock, os.O_CREAT | os.O_RDWR, mode)
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


def is_plain(name: object) -> bool:
    """Whether a name, as a file of a directory tells it, is one of a file in that directory."""
    try:
        bytes_of = name.encode() if isinstance(name, str) else b""
    except UnicodeEncodeError:
        return False
    return 0 < len(bytes_of) < 256 and name not in (".", "..") and not {"/", "\\", "\0"} & set(str(name))


def hidden(path: Path, mark: str) -> Path:
    """A name beside ``path`` that is no part of a table, a run or a model; ``mark`` says why it is there."""
    return path.with_name(f".{path.name}.{mark}")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk. Raises :class:`OSError` when that fails."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
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
    aside = hidden(path, f"{secrets.token_hex(8)}.{_WRITING}")
    try:
        os.close(new_file(aside))
        yield aside
        sync(aside)
        move_file(aside, path)
        sync(path.parent)
    finally:
        remove_file(aside)


def move_file(source: Path, target: Path) -> None:
    """Give a file another name; where files cannot be renamed, it is copied. Raises :class:`OSError`."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(source, "rb") as read, open(own_file(target, flags), "wb") as written:
            shutil.copyfileobj(read, written, 1 << 20)
        sync(target)
        remove_file(source)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Make a file of ``content``, text as UTF-8; see :func:`atomic_file`."""
    with atomic_file(path) as aside:
        aside.write_bytes(utf8(content))


def staging_folder(path: str | os.PathLike[str]) -> Path:
    """Where the folder ``path`` is written before :func:`replace_folder`; the same for all processes."""
    return hidden(_placed(path), _WRITING)


def nearest_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of this name or, as long as there is none, the nearest above it; absolute."""
    path = Path(path).absolute()
    return next(above for above in (path, *path.parents) if above.is_dir())


#: How names end of what lies in a place for a moment, while somebody finds out whether it can be written to; and such
#: names: no part of what lies there.
TRYING = ".trying"
TRIAL = re.compile(rf"\.\w+{re.escape(TRYING)}")


def try_folder(path: str | os.PathLike[str]) -> None:
    """Find out whether :func:`start_folder` can make the folder ``path``, by making one like it, which goes again.

    Raises :class:`OSError` where it cannot. Processes may try at the same time; nothing stays.
    """
    staging = staging_folder(path)
    place = next(above for above in staging.parents if os.path.lexists(above))
    with tempfile.TemporaryDirectory(prefix=".", suffix=TRYING, dir=place) as scratch:
        (Path(scratch) / staging.relative_to(place)).mkdir(parents=True)


def start_folder(path: str | os.PathLike[str]) -> Path:
    """Make an empty :func:`staging_folder`, and its parents; an interrupted replacement is settled first."""
    recover_folder(path)
    staging = staging_folder(path)
    remove_path(staging)
    staging.mkdir(parents=True)
    return staging


def replace_folder(path: str | os.PathLike[str]) -> None:
    """Give a finished :func:`staging_folder`, once it is on the disk, its name. What stood there is replaced: a folder,
    or a link, but not what that leads to.

    That takes two renames: first the old one is moved away. Interrupted between them, there is no folder ``path``;
    :func:`recover_folder` brings it back.
    """
    target, staging = _placed(path), staging_folder(path)
    for below in staging.rglob("*"):
        sync(below)
    sync(staging)
    old = hidden(target, _OLD)
    if os.path.lexists(target):
        remove_path(old)
        os.replace(target, old)
    os.replace(staging, target)
    sync(target.parent)
    with suppress(OSError):
        remove_path(old)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Settle a :func:`replace_folder` that was interrupted; nothing is done when none was.

    Where the old folder was moved away, the new one is whole, since that comes first: it gets its name. Only if it has
    been removed since does the old one get its name back. What is being written for the first time stays as it is.
    """
    target, staging = _placed(path), staging_folder(path)
    old = hidden(target, _OLD)
    if _is_folder(old) and not os.path.lexists(target):
        os.replace(staging if _is_folder(staging) else old, target)
        sync(target.parent)
    with suppress(OSError):
        remove_path(old)


def _placed(path: str | os.PathLike[str]) -> Path:
    """The name in its real folder, which is not followed where it is a link's; a real one for ``.``."""
    path = Path(path)
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
