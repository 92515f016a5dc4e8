"""Who writes to an output that lies in a store, or on a mounted one: where nothing can be locked, linked or renamed.

Every job that asks puts a mark of its own, ``_fft_owners/ID.json``, and then looks which others are there: stores list
what has been put. It is the owner when there is no other. One that finds an owner takes its mark away and is refused.
Of two that ask at once, each of which may find the other, the one with the smaller id waits for the other to go.

An owner renews its mark by putting it again. Whose mark is older than :data:`fft.data.owner.DEAD_AFTER` seconds by the
clock of the store is dead, and so is a process of this machine that is gone. The next owner removes its mark; should it
wake up after all, it finds that and stops.
"""

import contextlib
import errno
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from fft.data import owner
from fft.data.owner import DEAD_AFTER, OWNER_NAME, Owner, facts_of_job, lives_here, occupied, owned, taken_over
from fft.data.storage import Storage
from fft.json_text import json_value

#: The folder, in that of an output, of the marks of those who write there or ask to.
OWNERS = "_fft_owners"
#: What mounted stores say when they are asked for what only disks do.
_NO_DISK = (errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EINVAL)
_ASKING, _WRITING = "asking", "writing"
#: Seconds between two looks of who waits for another that asks.
_LOOKED_EVERY = 0.2


class StoreOwner:
    """Holds the mark ``mark`` of the job ``id`` until :meth:`release`. See :func:`owning`."""

    def __init__(self, place: Storage, what: str) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.mark = f"{OWNERS}/{self.id}.json"
        self._place, self._what, self._stop = place, what, threading.Event()
        #: Held while the mark is put again: it would come back when it has been removed meanwhile.
        self._renewing = threading.Lock()
        #: Jobs that were dead when this one became the owner; should their marks come back, they are nothing.
        self._dead: set[str] = set()

    def ask(self) -> None:
        """Become the owner. Raises :class:`Occupied` while another job lives that is, :class:`OSError` where the mark
        cannot be put."""
        self._place.below(OWNERS).make()
        self._put(_ASKING)
        try:
            while self._other_asks():
                time.sleep(_LOOKED_EVERY)
            self._put(_WRITING)
            self._place.delete([f"{OWNERS}/{name}.json" for name in self._dead])
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._renew, daemon=True, name=f"owner of {self._place.name}").start()

    def _other_asks(self) -> bool:
        """Whether one asks that has to go first; those that are dead are noted."""
        now = _mtime(self._place, self.id)
        for name, facts in _marks(self._place).items():
            if name in (self.id, *self._dead):
                continue
            idle = now - _mtime(self._place, name)
            if not _lives(facts, idle):
                self._dead.add(name)
            elif facts.get("state") == _ASKING and name > self.id:
                return True
            else:
                raise occupied(self._what, facts, self._place.shown(f"{OWNERS}/{name}.json"), idle)
        return False

    def holds(self) -> bool:
        """Whether this job still is the owner, as far as the store says."""
        marks, known = _marks(self._place), {self.id, *self._dead}
        others = [name for name, facts in marks.items() if facts.get("state") == _WRITING and name not in known]
        return self.id in marks and not others

    def check(self) -> None:
        """Raise :class:`UserError` when another job has taken over meanwhile, as one may when this one was asleep."""
        if not self.holds():
            raise taken_over(self._what, self._place.shown(self.mark))

    def release(self) -> None:
        """Let go, and remove the mark."""
        self._stop.set()
        with self._renewing, contextlib.suppress(OSError, pa.ArrowException):
            self._place.delete([self.mark])
            self._place.below(OWNERS).delete_empty()

    def _put(self, state: str) -> None:
        self._place.write(self.mark, json.dumps(facts_of_job(self.id) | {"state": state}, indent=1))

    def _renew(self) -> None:
        while not self._stop.wait(owner.RENEWED_EVERY):
            with self._renewing, contextlib.suppress(OSError, pa.ArrowException):  # a store that is away for a while
                if not self._stop.is_set() and self._place.exists(self.mark):
                    self._put(_WRITING)


@contextmanager
def owning(place: Storage, what: str) -> Iterator[Owner | StoreOwner]:
    """Be the one who writes to ``place``, a folder, which ``what`` names. On a disk by :func:`fft.data.owner.owned`.

    Raises :class:`Occupied` while another job lives that is, :class:`OSError` where nothing can be written.
    """
    with contextlib.ExitStack() as held:
        found: Owner | StoreOwner | None = None
        if place.is_local:
            try:
                found = held.enter_context(owned(Path(place.path(OWNER_NAME)), what))
            except OSError as error:
                if error.errno not in _NO_DISK:
                    raise
        if found is None:
            found = StoreOwner(place, what)
            found.ask()
            held.callback(found.release)
        yield found


def check_place_unowned(place: Storage, what: str) -> None:
    """Raise :class:`Occupied` while a job lives that is the owner of ``place``, of either kind."""
    if place.is_local:
        owner.check_unowned(Path(place.path(OWNER_NAME)), what)
    for name, facts in _marks(place).items():
        lives, idle = lives_here(facts), 0.0
        if lives is None:
            idle = _now(place) - _mtime(place, name)
        if facts.get("state") == _WRITING and _lives(facts, idle):
            raise occupied(what, facts, place.shown(f"{OWNERS}/{name}.json"), idle)


def _lives(facts: dict[str, Any], idle: float) -> bool:
    here = lives_here(facts)
    return idle < DEAD_AFTER if here is None else here


def _marks(place: Storage) -> dict[str, dict[str, Any]]:
    """All marks by the ids of their jobs; of one that has just gone, or says nothing, no facts."""
    names = [name for name, size in place.below(OWNERS).here().items() if name.endswith(".json") and size is not None]
    return {name.removesuffix(".json"): _facts(place, f"{OWNERS}/{name}") for name in sorted(names)}


def _facts(place: Storage, name: str) -> dict[str, Any]:
    try:
        facts = json_value(place.fetch(name))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _mtime(place: Storage, name: str) -> float:
    """When a mark was put, in seconds; long ago if it has gone."""
    return (place.info(f"{OWNERS}/{name}.json").mtime_ns or 0) / 1e9


def _now(place: Storage) -> float:
    """The time by the clock of the store; machines' own may differ."""
    probe = f"{OWNERS}/{uuid.uuid4().hex}.now"
    try:
        place.write(probe, "")
        return (place.info(probe).mtime_ns or 0) / 1e9
    except OSError:  # not to be written to
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            place.delete([probe])
