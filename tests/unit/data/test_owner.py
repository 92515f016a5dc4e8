"""One writer at a time: who lives is not disturbed, who is dead does not stand in the way."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fft.data import owner
from fft.data.owner import DEAD_AFTER, Occupied, atomic_folder, check_unowned, owned
from fft.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from fft.data.owner import owned
with owned(Path(sys.argv[1]), "it"):
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the mark."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "mark"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"mine\n"
        yield process
        process.kill()


def test_one_at_a_time(tmp_path):
    path = tmp_path / "deep" / "mark"
    for _ in range(2):
        with owned(path, "it") as mine:
            assert mine.holds()
            assert json.loads(path.read_text())["owner"] == mine.id
            with pytest.raises(Occupied, match=rf"^it is being written by another job: process {os.getpid()} on ") as e:
                check_unowned(path, "it")
            assert str(path) in str(e.value)
            with pytest.raises(Occupied), owned(path, "it"):
                pass
            mine.check()
        check_unowned(path, "it")
        assert list(path.parent.iterdir()) == []


def test_another_process_that_lives_is_not_disturbed(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)  # not even one that stands still, as long as it likes
    os.utime(tmp_path / "mark", (0, 0))
    before = (tmp_path / "mark").read_bytes()
    with (
        pytest.raises(Occupied, match=rf"process {holder.pid} on .* Wait for it, or give"),
        owned(tmp_path / "mark", ""),
    ):
        pass
    assert (tmp_path / "mark").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mark"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_that_was_killed_is_taken_over_at_once(how, holder, tmp_path):
    holder.send_signal(how)
    holder.wait()
    assert (tmp_path / "mark").exists()
    check_unowned(tmp_path / "mark", "it")
    with owned(tmp_path / "mark", "it") as mine:
        mine.check()
        with pytest.raises(Occupied):
            check_unowned(tmp_path / "mark", "it")
    assert list(tmp_path.iterdir()) == []


def elsewhere(path: Path, idle: float) -> None:
    """A mark as a job on another machine leaves it, that long ago."""
    facts = {"owner": "0" * 12, "process": 1, "started": "1", "host": "far", "machine": "other", "since": "noon"}
    path.write_text(json.dumps(facts))
    os.utime(path, (time.time() - idle,) * 2)


def test_of_another_machine_the_marks_age_tells(tmp_path, monkeypatch):
    path = tmp_path / "mark"
    elsewhere(path, DEAD_AFTER - 60)
    with pytest.raises(Occupied, match=r"process 1 on far, since noon, whose mark .*mark was renewed 6\d s ago"):
        check_unowned(path, "it")
    monkeypatch.setattr(time, "time", lambda: 0)  # this machine's clock is wrong, that of the storage is not
    with pytest.raises(Occupied), owned(path, "it"):
        pass
    os.utime(path, ns=((path.stat().st_mtime_ns - 61 * 10**9),) * 2)
    check_unowned(path, "it")
    with owned(path, "it") as mine:
        mine.check()


def test_a_mark_that_says_nothing_is_judged_by_its_age(tmp_path):
    (tmp_path / "mark").touch()
    with pytest.raises(Occupied, match="process None"):
        check_unowned(tmp_path / "mark", "it")
    os.utime(tmp_path / "mark", (0, 0))
    with owned(tmp_path / "mark", "it") as mine:
        mine.check()


def test_a_mark_of_this_machine_without_a_process_is_a_dead_jobs(tmp_path):
    with owned(tmp_path / "mark", "it") as mine:
        facts = json.loads(mine.path.read_text())
    (tmp_path / "mark").write_text(json.dumps({name: facts[name] for name in ("owner", "machine")}))
    with owned(tmp_path / "mark", "it") as mine:
        assert mine.holds()


def test_the_mark_is_renewed_while_its_job_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "RENEWED_EVERY", 0.02)
    with owned(tmp_path / "mark", "it"):
        os.utime(tmp_path / "mark", (0, 0))
        deadline = time.monotonic() + 300
        while not (tmp_path / "mark").stat().st_mtime:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_was_taken_over_stops_and_leaves_the_new_mark(tmp_path):
    with ExitStack() as held:
        with owned(tmp_path / "mark", "`output` it") as mine:
            (tmp_path / "mark").unlink()
            other = held.enter_context(owned(tmp_path / "mark", "it"))
            with pytest.raises(
                UserError, match=r"^`output` it was taken over by another job while this one stood still"
            ):
                mine.check()
        other.check()


def test_of_two_that_find_a_dead_job_one_takes_over(tmp_path, monkeypatch):
    """The other has opened the dead job's mark already, and locks it when a new one has its name."""
    path, lock = tmp_path / "mark", owner._lock
    elsewhere(path, DEAD_AFTER + 1)
    with ExitStack() as held:

        def late(mark):
            monkeypatch.setattr(owner, "_lock", lock)
            held.enter_context(owned(path, "it"))
            return lock(mark)

        monkeypatch.setattr(owner, "_lock", lambda mark: late(mark) if b"far" in os.pread(mark, 999, 0) else lock(mark))
        with pytest.raises(Occupied, match=f"process {os.getpid()} on "), owned(path, "it"):
            pass


def test_who_waits_goes_on_when_the_other_is_done(tmp_path):
    command = [sys.executable, "-c", HOLD.replace("sleep(600)", "sleep(0.5)"), tmp_path / "mark"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"mine\n"
        with owned(tmp_path / "mark", "it", wait=True):
            assert process.wait(timeout=300) == 0


@pytest.mark.parametrize("lacks", ["link", "flock"])
def test_a_file_system_without_hard_links_or_locks_will_do(lacks, holder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "not here")

    monkeypatch.setattr(owner.os if lacks == "link" else owner.fcntl, lacks, refuse)
    with pytest.raises(Occupied):  # then its process tells
        check_unowned(tmp_path / "mark", "it")
    holder.kill()
    holder.wait()
    with owned(tmp_path / "mark", "it") as mine:
        mine.check()


def test_two_that_write_one_folder_do_not_disturb_each_other(tmp_path):
    with atomic_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("first")
        with pytest.raises(Occupied, match="out is being written by another job"), atomic_folder(tmp_path / "out"):
            pass
        assert (staging / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as staging:
        (staging / "a").write_text(f"{1 / 0}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "first"
