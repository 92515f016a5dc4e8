"""Where a rank's own work ends and its waiting begins.

Ranks of a step take the same time, whoever of them is slow: the others wait. What they wait in are the methods of
torch's process groups, by which all that they exchange goes, DeepSpeed's part too, and the ``wait`` of what was begun
there. That time is taken here; the rest of a step is the rank's own: computing, its data, standing still. A device
works behind the host's back: marks in its stream, before and after, say when it waited.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

#: What ranks do together, by torch's names, of which a version may lack some.
_TOGETHER = ("allgather", "all_gather_single", "_allgather_base", "allreduce", "all_to_all_single", "alltoall")
_TOGETHER += ("alltoall_base", "barrier", "broadcast", "gather", "recv", "reduce", "reduce_scatter")
_TOGETHER += ("reduce_scatter_single", "_reduce_scatter_base", "scatter", "send")
#: Waits that are remembered, of which one may turn out to have been something else.
_REMEMBERED = 64


class OwnTime:
    """Seconds of own work and of waiting, from one lap to the next, within a ``with`` block; of the main thread."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._events = clock, None if device.type == "cpu" else torch.get_device_module(device)
        self._held = contextlib.ExitStack()
        self._started, self._left_out, self._waited, self._still = clock(), 0.0, 0.0, 0.0
        self._since: float | None = None  # when what is waited for now began
        self._paused = False
        self._waits: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._marks: deque[tuple[Any, Any]] = deque()
        self._spare: list[Any] = []

    def __enter__(self) -> "OwnTime":
        for kind, names in ((dist.ProcessGroup, _TOGETHER), (dist.Work, ("wait",))):
            for name in names:
                if (own := vars(kind).get(name)) is not None:
                    setattr(kind, name, self._timed(getattr(kind, name)))
                    self._held.callback(setattr, kind, name, own)  # not what getattr gives, which binds to nothing
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(*given: Any, **named: Any) -> Any:
            if self._paused or self._since is not None:
                return method(*given, **named)
            begun, mark = self._clock(), self._mark()
            self._since = begun
            try:
                return method(*given, **named)
            finally:
                self._since = None
                if mark is None:
                    ended = self._clock()
                    self._waited += ended - begun
                    self._waits.append((begun, ended))
                else:
                    self._marks.append((mark, self._mark()))

        return timed

    def _mark(self) -> Any:
        """A mark in the device's stream; None on the host, which has its clock."""
        if self._events is None:
            return None
        mark = self._spare.pop() if self._spare else self._events.Event(enable_timing=True)
        mark.record()
        return mark

    def stood_still(self, begun: float, ended: float) -> None:
        """Learn that this process did not run between two times of the clock: nobody else was waited for then.

        Another thread calls it.
        """
        if self._events is not None:  # a device does not wait because its host stands still
            return
        since = self._since
        waits = [*self._waits] + ([] if since is None else [(since, ended)])
        self._still += sum(max(0.0, min(ended, b) - max(begun, a)) for a, b in waits)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a block out."""
        begun, self._paused = self._clock(), True
        try:
            yield
        finally:
            self._paused = False
            self._left_out += self._clock() - begun

    def step(self) -> None:
        """Take up the marks of a step that the device has done: they are used again."""
        while self._marks and self._marks[0][1].query():
            begun, ended = self._marks.popleft()
            self._waited += begun.elapsed_time(ended) / 1000
            self._spare += (begun, ended)

    def lap(self) -> tuple[float, float]:
        """Seconds of own work, and those waited, since the last lap or the beginning."""
        if self._marks:
            self._marks[-1][1].synchronize()
        self.step()
        now, still = self._clock(), self._still
        own = now - self._started - self._left_out - self._waited + still
        waited = self._waited - still
        self._still -= still
        self._started, self._left_out, self._waited = now, 0.0, 0.0
        return max(0.0, own), max(0.0, waited)
