"""Is a rank slower than it should be? Its own work is compared with that of ranks which have the same to do.

What a rank has to do depends on its stage. So it is compared, in seconds of own work (:mod:`fft.training.own_time`),
with the other ranks of its stage: replicas, and those that share rows or parameters. Where it has none of these, or
they are as slow as it is (all of a machine, say), its stage is compared with its own past; what all other stages have
become slower by since then, as longer documents make them, is allowed to it.
"""

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.distributed as dist

from fft.parallel.groups import tell_all
from fft.parallel.mesh import MeshSizes
from fft.parallel.role import StageRole
from fft.training.meeting import Peer
from fft.training.own_time import OwnTime
from fft.training.watch import Watch

#: Who takes so many times longer than he should, and by that loses so many seconds between two lines, is told of.
FACTOR, _LOST = 1.5, 1.0
#: Laps that are a rank's past, and how many it takes.
_PAST, _ENOUGH = 32, 2


@dataclass(frozen=True)
class Behind:
    """A rank that is behind: how many times as long it took, its seconds of work a step, those it should have had, and
    whether other ranks of its stage say so, or its past.
    """

    rank: int
    times: float
    seconds: float
    expected: float
    peers: bool


@dataclass
class Judge:
    """Judges laps of all ranks, one after another; rank ``r`` of a mesh has stage ``stages[r]``."""

    stages: Sequence[int]
    _past: dict[int, deque[float]] = field(default_factory=dict)
    _laps: int = 0

    def see(self, work: Sequence[float], steps: int) -> Behind | None:
        """The rank that is most behind, if one is; ``work`` are seconds a step by rank, the mean of ``steps``.

        The first lap, in which much is made that is made once, does not count.
        """
        self._laps += 1
        if self._laps == 1:
            return None
        found = [behind for rank in range(len(work)) if (behind := self._behind(rank, work, steps)) is not None]
        slow = {behind.rank for behind in found}
        for rank, seconds in enumerate(work):
            if rank not in slow:
                self._past.setdefault(rank, deque(maxlen=_PAST)).append(seconds)
        return max(found, key=lambda behind: behind.times, default=None)

    def _behind(self, rank: int, work: Sequence[float], steps: int) -> Behind | None:
        same = [work[other] for other, stage in enumerate(self.stages) if stage == self.stages[rank] and other != rank]
        for expected, peers in ((median(same) if same else None, True), (self._allowed(rank, work), False)):
            if not expected:
                continue
            times = work[rank] / expected
            if times >= FACTOR and (work[rank] - expected) * steps >= _LOST:
                return Behind(rank, times, work[rank], expected, peers)
        return None

    def _allowed(self, rank: int, work: Sequence[float]) -> float | None:
        """What a rank took in the past, times what ranks of other stages now take of theirs."""
        others = [other for other, stage in enumerate(self.stages) if stage != self.stages[rank]]
        if not others or any(len(self._past.get(other, ())) < _ENOUGH for other in (rank, *others)):
            return None
        changes = [work[other] / before for other in others if (before := median(self._past[other]))]
        return median(self._past[rank]) * median(changes) if changes else None


class Pace:
    """The pace of a run's ranks, from one line to the next. ``control`` sends what is in host memory."""

    def __init__(self, own: OwnTime, peers: Sequence[Peer], mesh: MeshSizes, control: dist.ProcessGroup) -> None:
        self._own, self._peers, self._control = own, peers, control
        self._judge = Judge([StageRole.of(mesh, rank).stage for rank in range(mesh.world)])
        self._step = 0

    def begin(self, step: int) -> None:
        """Steps begin after ``step``: what was before them does not count."""
        self._step = step
        self._own.lap()

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """What is done in this block is no step's."""
        return self._own.paused()

    def stepped(self) -> None:
        """A step was taken."""
        self._own.step()

    def lap(self, step: int, data: float) -> tuple[dict[str, float], dict[str, list[float]], str]:
        """Of the steps since the last lap up to ``step``: numbers, numbers by rank, and a sentence if one is behind.

        ``data`` are the seconds in them that this rank waited for its data. The same on all ranks. Collective.
        """
        first, steps = self._step + 1, step - self._step
        self._step = step
        told = tell_all([round(seconds / steps, 6) for seconds in (*self._own.lap(), data)], self._control)
        work, waits, data_waits = ([rank[i] for rank in told] for i in range(3))
        slowest = max(range(len(work)), key=work.__getitem__)
        numbers = {"slowest_rank": slowest, "slowest_rank_seconds": work[slowest], "fastest_rank_seconds": min(work)}
        behind, sentence = self._judge.see(work, steps), ""
        if behind is not None:
            numbers |= {"rank_behind": behind.rank, "rank_behind_times": behind.times}
            sentence = self._told(behind, data_waits[behind.rank], first, step)
        return numbers, {"rank_work": work, "rank_wait": waits}, sentence

    def _told(self, behind: Behind, data: float, first: int, last: int) -> str:
        steps = f"steps {first:,} to {last:,}" if last > first else f"step {last:,}"
        than, they = ("before", "before") if not behind.peers else ("the other ranks of its stage", "they")
        unlike = "" if behind.peers else ", which other stages did not"
        waits = f", {data:.2f} s of it for its data" if data > behind.seconds / 2 else ""
        return (
            f"{self._peers[behind.rank]} took {behind.times:.1f} times as long as {than} for {steps}{unlike}: "
            f"{behind.seconds:.2f} s of own work a step{waits}, {they} {behind.expected:.2f} s"
        )


def follow(watch: Watch, mesh: MeshSizes, device: torch.device, control: dist.ProcessGroup) -> Pace | None:
    """Follow the pace of all ranks until ``watch`` lets go; None where there is one."""
    if mesh.world == 1:
        return None
    own = watch.held.enter_context(OwnTime(device))
    watch.on_still = own.stood_still
    return Pace(own, watch.meeting.peers, mesh, control)
