"""Who writes to an output: one job at a time, known by an id.

The mark is a small file that names its job. The job holds it locked, and touches it every few seconds while it lives. A
second job is refused as long as the first may live:

- On the same machine the lock and the process tell at once whether it does.
- Of another machine, whose locks and processes may not be seen here, the mark tells: a job that has not touched it for
  :data:`DEAD_AFTER` seconds, by the clock of the storage, is taken for dead.

The mark of a dead job is replaced by that of the next. Its job, should it wake up after all, finds that and stops: see
:meth:`Owner.check`.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fft.errors import UserError
from fft.files import (
    end_of,
    hidden,
    new_file,
    own_file,
    remove_file,
    remove_path,
    replace_folder,
    start_folder,
    try_folder,
)
from fft.json_text import json_value

#: The mark of who writes to a folder, in that folder. Readers, Spark's too, pass over names like this.
OWNER_NAME = "_fft_owner.json"
#: Seconds between two touches of a mark; and after which a job on another machine counts as dead.
RENEWED_EVERY, DEAD_AFTER = 5.0, 120.0
#: Seconds between two looks of who waits; and how often a folder may vanish.
_LOOKED_EVERY, _TRIES = 0.2, 100


class Occupied(UserError):
    """Another job, which lives, has what this one would write to."""


class Owner:
    """Holds a mark, of the name ``mark`` in the folder, until :meth:`release`, or until this process ends. See
    :func:`owned`."""

    def __init__(self, path: Path, what: str, mark: int, owner: str) -> None:
        self.mark = path.name
        self.id, self.path, self._what, self._mark, self._stop = owner, path, what, mark, threading.Event()
        #: Held while the mark is touched: its descriptor is another file's once it is closed.
        self._renewing = threading.Lock()
        threading.Thread(target=self._renew, daemon=True, name=f"owner of {path}").start()

    def holds(self) -> bool:
        """Whether the mark still is this job's."""
        return _read(self.path).get("owner") == self.id

    def check(self) -> None:
        """Raise :class:`UserError` when another job has taken over meanwhile, as one may when this one was asleep."""
        if not self.holds():
            raise taken_over(self._what, str(self.path))

    def release(self) -> None:
        """Let go, and remove the mark."""
        self._stop.set()
        with contextlib.suppress(OSError):
            if self.holds():
                remove_file(self.path)
        with self._renewing:
            _unlock(self._mark)

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED_EVERY):
            with self._renewing, contextlib.suppress(OSError):  # storage that is away for a while
                if not self._stop.is_set():
                    os.utime(self._mark)


@contextmanager
def owned(path: Path, what: str, wait: bool = False) -> Iterator[Owner]:
    """Be the one who writes to ``what``, by the mark ``path``, whose folder is made.

    Raises :class:`Occupied` while another job lives that is; with ``wait``, waits for its end instead.
    """
    gone = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            owner = _take(path, what)
            break
        except FileNotFoundError:  # another job has just ended and removed its empty folder
            gone += 1
            if gone == _TRIES:
                raise
        except Occupied:
            if not wait:
                raise
            _wait(path, what)
    try:
        yield owner
    finally:
        owner.release()


@contextmanager
def atomic_folder(path: str | os.PathLike[str], wait: bool = False) -> Iterator[Path]:
    """Yield where to write what shall be the folder ``path``: it gets that name at the end of the ``with`` block.

    A folder that is there, or where a link ends, is replaced, or stays as it is when the block raises. Raises
    :class:`Occupied` while another process writes the same folder; with ``wait``, waits for its end instead. Raises
    :class:`OSError` where it cannot be made.
    """
    target = end_of(path)
    try_folder(target)
    with owned(hidden(target, "owner"), str(path), wait) as owner, staged_folder(target, owner) as staging:
        yield staging


@contextmanager
def staged_folder(path: str | os.PathLike[str], owner: Owner) -> Iterator[Path]:
    """:func:`atomic_folder` of the one ``owner`` who may write there, and checks at the end that he still is."""
    staging = start_folder(path)
    try:
        yield staging
        owner.check()
        replace_folder(path)
    except BaseException:
        if owner.holds():
            with contextlib.suppress(OSError):
                remove_path(staging)
        raise


def _wait(path: Path, what: str) -> None:
    """Return when nobody holds the mark, looking at it from time to time."""
    while True:
        time.sleep(_LOOKED_EVERY)
        with contextlib.suppress(Occupied):
            return check_unowned(path, what)


def check_unowned(path: Path, what: str) -> None:
    """Raise :class:`Occupied` while a job lives that has the mark ``path``, :class:`UserError` if it cannot be read."""
    found = _open(path)
    if found is not None:
        try:
            _check_dead(found, path, what)
        finally:
            _unlock(found)


def facts_of_job(owner: str) -> dict[str, Any]:
    """What a mark says of this process."""
    facts = {"owner": owner, "process": os.getpid(), "started": _started(os.getpid())}
    return facts | {"host": socket.gethostname(), "machine": _machine(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}


def lives_here(facts: dict[str, Any]) -> bool | None:
    """Whether the job of a mark lives on this machine; None if it is of another one."""
    if facts.get("machine") != _machine():
        return None
    return _started(facts.get("process")) == facts.get("started")


def occupied(what: str, facts: dict[str, Any], mark: str, idle: float) -> Occupied:
    """The error that says that a job lives, ``idle`` seconds after it has renewed its mark."""
    return Occupied(
        f"{what} is being written by another job: process {facts.get('process')} on {facts.get('host')}, since "
        f"{facts.get('since')}, whose mark {mark} was renewed {idle:.0f} s ago. Wait for it, or give another folder. "
        f"If it is dead, this one takes over {DEAD_AFTER:.0f} s after the last renewal, or once you remove the mark."
    )


def taken_over(what: str, mark: str) -> UserError:
    """The error that says that another job has become the owner."""
    return UserError(
        f"{what} was taken over by another job while this one stood still: its mark {mark} is no longer there. Nothing "
        "of that job's was touched; run this one again when it is done."
    )


def _take(path: Path, what: str) -> Owner:
    owner = uuid.uuid4().hex[:12]
    facts = facts_of_job(owner)
    aside = hidden(path, f"{owner}.writing")
    mark = own_file(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.write(mark, json.dumps(facts, indent=1).encode())
        os.fsync(mark)
        _lock(mark)  # before anybody else can see it
        while not _put(aside, path, what):
            continue
        return Owner(path, what, mark, owner)
    except BaseException:
        _unlock(mark)
        raise
    finally:
        remove_file(aside)


def _put(aside: Path, path: Path, what: str) -> bool:
    """Give a mark its name, in the place of a dead job's if there is one; False when it has to be tried again."""
    found = _open(path)
    if found is None:
        return _name(aside, path)
    try:
        if not _check_dead(found, path, what):
            return False
        os.replace(aside, path)  # while the old one is locked, so nobody else does the same
        return True
    finally:
        _unlock(found)


def _name(aside: Path, path: Path) -> bool:
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        os.replace(aside, path)
    return True


def _check_dead(mark: int, path: Path, what: str) -> bool:
    """Whether the mark is a dead job's; False when it has gone meanwhile. Raises :class:`Occupied` if the job lives."""
    free = _lock(mark)
    try:
        here, there = os.fstat(mark), path.stat()
    except FileNotFoundError:
        return False
    if not os.path.samestat(here, there):
        return False
    facts = _read(path)
    idle = max(0.0, time.time() - there.st_mtime)
    lives = lives_here(facts) if free else True
    if lives is None:
        idle = max(0.0, _now(path) - there.st_mtime)
        lives = idle < DEAD_AFTER
    if not lives:
        return True
    raise occupied(what, facts, str(path), idle)


def _open(path: Path) -> int | None:
    for access in (os.O_RDWR, os.O_RDONLY):  # another user's may be read only
        try:
            return own_file(path, access)
        except FileNotFoundError:  # it may be there again by now, as another job's
            return None
        except OSError:
            continue
    raise UserError(f"{path}, the mark of a job, cannot be read: see whose it is, and remove it if that job is dead.")


def _lock(mark: int) -> bool:
    """Whether nobody else holds the mark, as far as this file system can tell; then it is held here."""
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _unlock(mark: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(mark, fcntl.LOCK_UN)  # also for children that were forked, and have it open
    os.close(mark)


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json_value(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _now(path: Path) -> float:
    """The time by the clock of the storage, which stamps files; machines' own clocks may differ."""
    probe = hidden(path, f"{uuid.uuid4().hex}.writing")
    try:
        os.close(new_file(probe))
        return probe.stat().st_mtime
    except OSError:  # full, or not to be written to
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            remove_file(probe)


def _machine() -> str:
    """What processes have in common that see each other: the system since its last start, and their namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: only the mark's age tells
        return uuid.uuid4().hex


def _started(process: int | None) -> str:
    """When a process of this machine began, in the system's own terms; "" when it is gone."""
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else numbers[18]
