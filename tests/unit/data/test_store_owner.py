"""One writer at a time where nothing can be locked: in a store, and on a disk that is used like one."""

import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from object_store import refuse_like_a_mounted_store

from fft.data import owner, store_owner
from fft.data.owner import Occupied
from fft.data.storage import Storage
from fft.data.store_owner import OWNERS, StoreOwner, check_place_unowned, owning
from fft.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from fft.data.storage import Storage
from fft.data.store_owner import StoreOwner
StoreOwner(Storage.at(sys.argv[1]), "it").ask()
print("mine", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["store", "mounted"])
def place(request, store, tmp_path, monkeypatch):
    """A folder of a store, and one of a disk that refuses what mounted stores refuse."""
    if request.param == "store":
        return Storage.at(f"s3://lake/{tmp_path.name}")
    refuse_like_a_mounted_store(monkeypatch)
    return Storage.at(tmp_path / "out")


def test_one_at_a_time(place):
    for _ in range(2):
        with owning(place, "it") as mine:
            assert isinstance(mine, StoreOwner)
            assert (mine.holds(), list(place.here())) == (True, [OWNERS])
            with pytest.raises(Occupied, match=r"^it is being written by another job: process \d+ on .*/_fft_owners/"):
                check_place_unowned(place, "it")
            with pytest.raises(Occupied, match="If it is dead, this one takes over"), owning(place, "it"):
                pass
            mine.check()
        check_place_unowned(place, "it")
        assert place.here() == {}


def test_a_process_of_this_machine_that_was_killed_is_taken_over_at_once(place):
    if place.is_local:
        pytest.skip("another process would lock it")
    with subprocess.Popen([sys.executable, "-c", HOLD, place.name], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(Occupied, match=f"process {other.pid} on "), owning(place, "it"):
            pass
        other.kill()
    check_place_unowned(place, "it")
    with owning(place, "it") as mine:
        assert list(place.below(OWNERS).here()) == [f"{mine.id}.json"]


def test_of_another_machine_the_marks_age_tells(place, monkeypatch):
    """And a job that was taken over stops, also when it puts its mark again."""
    monkeypatch.setattr(store_owner, "lives_here", lambda facts: None)
    with ExitStack() as held:
        first = held.enter_context(owning(place, "it"))
        monkeypatch.setattr(time, "time", lambda: 10.0**12)  # this machine's clock is wrong, that of the store is not
        with pytest.raises(Occupied, match=r"was renewed [0-9] s ago"):
            check_place_unowned(place, "it")
        monkeypatch.setattr(store_owner, "DEAD_AFTER", -5.0)
        check_place_unowned(place, "it")
        second = held.enter_context(owning(place, "it"))
        monkeypatch.setattr(store_owner, "DEAD_AFTER", 120.0)
        for _ in range(2):
            with pytest.raises(UserError, match="was taken over by another job while this one stood still"):
                first.check()
            second.check()
            first._put("writing")


def test_of_many_that_ask_at_once_one_writes(place):
    inside, most, done, said = [], [], [], []

    def job():
        try:
            with owning(place, "it") as mine:
                inside.append(mine.id)
                most.append(len(inside))
                time.sleep(0.3)
                mine.check()
                inside.remove(mine.id)
                done.append(mine.id)
        except Occupied as error:
            said.append(error)

    threads = [threading.Thread(target=job) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(done) + len(said) == 8
    assert place.here() == {}


def test_the_mark_is_renewed_while_its_job_lives(place, monkeypatch):
    monkeypatch.setattr(owner, "RENEWED_EVERY", 0.2)
    with owning(place, "it") as mine:
        first, deadline = place.info(mine.mark).mtime_ns, time.monotonic() + 300
        while place.info(mine.mark).mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_mark_that_is_being_renewed_is_removed_all_the_same(place, monkeypatch):
    """A renewal that is under way when its job ends puts nothing back."""
    monkeypatch.setattr(owner, "RENEWED_EVERY", 0.01)
    begun, ending, write = threading.Event(), threading.Event(), Storage.write

    def slow(*given):
        if threading.current_thread().name.startswith("owner of "):
            begun.set()
            ending.wait(300)
            time.sleep(0.2)
        return write(*given)

    monkeypatch.setattr(Storage, "write", slow)
    with owning(place, "it"):
        assert begun.wait(300)
        (renewing,) = [t for t in threading.enumerate() if t.name == f"owner of {place.name}"]
        ending.set()
    renewing.join()
    assert place.here() == {}
