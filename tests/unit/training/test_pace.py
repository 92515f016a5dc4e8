"""Own work and waiting told apart, and who is slower than those that have the same to do."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fft.parallel.mesh import MeshSizes
from fft.training import pace
from fft.training.meeting import Peer
from fft.training.own_time import OwnTime
from fft.training.pace import Judge, Pace


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Group:
    """A process group whose collectives take as long as they are told to."""

    def __init__(self, clock):
        self.clock = clock

    def allreduce(self, seconds):
        self.clock.now += seconds
        return Work(self.clock)


class Work:
    def __init__(self, clock):
        self.clock = clock

    def wait(self, seconds):
        self.clock.now += seconds


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroup", Group)
    monkeypatch.setattr(dist, "Work", Work)
    clock = Clock()
    with OwnTime(torch.device("cpu"), clock) as own:
        yield clock, own, Group(clock)


def test_what_ranks_do_together_is_waiting_and_all_else_is_own(timed):
    clock, own, group = timed
    clock.now += 3
    group.allreduce(1.5).wait(0.5)
    assert own.lap() == (3.0, 2.0)
    with own.paused():
        clock.now += 7
        group.allreduce(9.0)
    clock.now += 1
    assert own.lap() == (1.0, 0.0)


def test_standing_still_in_a_wait_is_not_waiting(timed):
    clock, own, group = timed
    begun = clock.now
    group.allreduce(6.0)  # in which this process was stopped for 5 s
    own.stood_still(begun + 0.5, begun + 5.5)
    clock.now += 1
    own.stood_still(clock.now - 1, clock.now)  # no wait: it is own time as it is
    assert own.lap() == (6.0, 1.0)
    group.allreduce(4.0)
    assert own.lap() == (0.0, 4.0)
    own.stood_still(clock.now - 4, clock.now)  # found out when the line was written
    clock.now += 1
    assert own.lap() == (5.0, 0.0)


def test_a_device_says_itself_when_it_waited(monkeypatch):
    """The host is done with a collective before the device has begun it."""
    host, stream = Clock(), SimpleNamespace(end=0.0, reached=0.0)
    made = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at = stream.end

        def query(self):
            return self.at <= stream.reached

        def synchronize(self):
            stream.reached = max(stream.reached, self.at)

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)

    class Queued:
        def allreduce(self, seconds):
            stream.end += seconds

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(dist, "ProcessGroup", Queued)
    monkeypatch.setattr(dist, "Work", Work)
    with OwnTime(torch.device("cuda"), host) as own:
        for _ in range(3):
            stream.end += 2.0  # computing
            Queued().allreduce(0.5)
            host.now += 2.5
            own.stood_still(host.now - 2, host.now)
        assert own.lap() == (6.0, 1.5)
        assert len(made) == 6
        stream.end += 1.0
        Queued().allreduce(3.0)
        host.now += 4.0
        own.step()
        assert len(made) == 6  # of which two were used again
        assert own.lap() == (1.0, 3.0)


def test_torch_is_left_as_it_was():
    names = vars(dist.ProcessGroup), vars(dist.Work)
    before = [dict(given) for given in names]
    with OwnTime(torch.device("cpu")):
        assert vars(dist.ProcessGroup)["allreduce"] is not before[0]["allreduce"]
    assert [dict(given) for given in names] == before


def test_collectives_of_torch_are_timed(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with OwnTime(torch.device("cpu")) as own:
            dist.all_reduce(torch.ones(1))
            dist.all_to_all_single(torch.ones(1), torch.ones(1))
            dist.barrier()
            dist.all_reduce(torch.ones(1), async_op=True).wait()
            assert len(own._waits) >= 4
            assert own.lap()[1] > 0
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()


def seen(stages, *laps, steps=10):
    judge = Judge(stages)
    return [judge.see(work, steps) for work in laps]


def test_replicas_are_compared_with_one_another():
    first, even, behind, again = seen([0, 0], [1.0, 3.0], [1.0, 1.1], [1.0, 2.4], [1.0, 1.0])
    assert (first, even, again) == (None, None, None)
    assert (behind.rank, behind.times, behind.expected, behind.peers) == (1, 2.4, 1.0, True)


def test_stages_are_compared_with_their_own_past():
    """The second stage has twice as much to do as the first, always."""
    laps = [[1.0, 2.0]] * 4 + [[1.0, 4.0], [1.0, 2.0], [1.8, 3.6]]  # the last: longer documents, for both
    *_, behind, again, longer = seen([0, 1], *laps)
    assert (behind.rank, behind.times, behind.expected, behind.peers) == (1, 2.0, 2.0, False)
    assert (again, longer) == (None, None)


def test_a_stage_that_is_slow_as_a_whole():
    """All ranks of a machine, which has one stage; in the other stages nothing has changed."""
    laps = [[1.0, 1.0, 2.0, 2.0, 1.0, 1.0]] * 3 + [[1.0, 1.0, 4.0, 3.8, 1.0, 1.0]]
    *_, even, behind = seen([0, 0, 1, 1, 2, 2], *laps)
    assert even is None
    assert (behind.rank, behind.times, behind.peers) == (2, 2.0, False)
    *_, behind = seen([0, 0, 1, 1, 2, 2], *laps[:3], [1.0, 1.0, 2.0, 4.0, 1.0, 1.0])
    assert (behind.rank, behind.times, behind.peers) == (3, 2.0, True)


def test_what_lasts_is_told_as_long_as_it_lasts():
    laps = [[1.0, 1.0]] * 3 + [[1.0, 2.0]] * 50
    found = seen([0, 1], *laps)
    assert found[:3] == [None] * 3
    assert {behind.rank for behind in found[3:]} == {1}


def test_what_costs_next_to_nothing_is_not_told():
    assert seen([0, 0], *[[0.01, 0.05]] * 3) == [None] * 3
    assert seen([0, 0], *[[0.0, 0.0]] * 3) == [None] * 3


def test_numbers_and_sentence(monkeypatch):
    told = [[0.5, 1.5, 0.0], [0.5, 1.5, 0.0], [1.9, 0.1, 1.4], [0.5, 1.5, 0.0]]
    monkeypatch.setattr(pace, "tell_all", lambda value, control: told)
    peers = [Peer(rank, host, "10.0.0.1") for rank, host in enumerate("aabb")]
    own = SimpleNamespace(lap=lambda: (5.0, 15.0))
    followed = Pace(own, peers, MeshSizes(data=2, pipe=2), None)
    followed.begin(30)
    assert followed.lap(40, 0.0)[2] == ""
    numbers, by_rank, sentence = followed.lap(50, 0.0)
    assert sentence == (
        "rank 2 (on b) took 3.8 times as long as the other ranks of its stage for steps 41 to 50: 1.90 s of own work a "
        "step, 1.40 s of it for its data, they 0.50 s"
    )
    assert numbers == {
        "slowest_rank": 2,
        "slowest_rank_seconds": 1.9,
        "fastest_rank_seconds": 0.5,
        "rank_behind": 2,
        "rank_behind_times": pytest.approx(3.8),
    }
    assert by_rank == {"rank_work": [0.5, 0.5, 1.9, 0.5], "rank_wait": [1.5, 1.5, 0.1, 1.5]}
