"""The checkpoints of a run on a disk, sent to a store behind the training, which never waits for that."""

import threading
import time
from collections.abc import Callable

import pyarrow as pa

from fft.checkpoint.folder import SUMS, checkpoint_tag, kept
from fft.checkpoint.run import RunFolder
from fft.checkpoint.stored_run import StoredRun
from fft.data.views import send
from fft.errors import UserError, one_line

#: Seconds between two looks for new checkpoints.
_PERIOD = 1.0
#: Seconds until a store that failed is asked again: the first time, and at most. Each of these asks several times.
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 300.0
#: Seconds that the end of a run waits for what is left.
PATIENCE = 300.0


class Mirror:
    """Sends what ``run`` has of the checkpoints to keep, the newest first, and removes the others from ``store``.

    A store that fails is told of by ``log``, and asked again later and later. :meth:`close` ends it.
    """

    def __init__(self, run: RunFolder, store: StoredRun, newest: int, best: int, log: Callable[[str], None]) -> None:
        self._run, self._store, self._keep, self._log = run, store, (newest, best), log
        self._sent: set[tuple[int, str]] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="upload")
        self._thread.start()

    def close(self) -> None:
        """Wait until all is there, :data:`PATIENCE` seconds at most; what is not by then is told."""
        self._ending.set()
        self._thread.join(_PERIOD)
        if self._thread.is_alive():
            self._log(f"waiting for what is left to be sent to {self._store.name}, {PATIENCE:.0f} s at most")
            self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._log(
                f"warning: {self._store.name} does not have all of {self._run.name} yet: the same command with "
                "--resume auto sends what is missing"
            )

    def _work(self) -> None:
        done: list[int] | None = None
        wait = _FIRST_WAIT
        while True:
            last = self._ending.is_set()
            steps = self._run.steps()
            if last or steps != done:
                try:
                    self._sync()
                    done, wait = steps, _FIRST_WAIT
                except (UserError, OSError, pa.ArrowException) as error:
                    self._log(f"warning: --upload: {one_line(error)}; again in {wait:.0f} s, training goes on")
                    self._pause(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)
                    continue
            if last:
                return
            self._ending.wait(_PERIOD)

    def _pause(self, seconds: float) -> None:
        """Wait; where the run ends, no longer than at first."""
        if not self._ending.wait(seconds):
            return
        time.sleep(min(seconds, _FIRST_WAIT))

    def _sync(self) -> None:
        """Send what is missing, a checkpoint at a time, then the run's numbers; remove what is not to be kept."""
        while True:
            here, there = self._run.losses(), self._store.losses()
            missing = (kept({**there, **here}, *self._keep) & here.keys()) - there.keys()
            if not missing:
                break
            self._send(max(missing))
        self._store.keep()
        self._store.point_again()
        self._store.prune(*self._keep)

    def _send(self, step: int) -> None:
        tag = checkpoint_tag(step)
        source, place = self._run.view(tag), self._store.storage.below(tag)
        if not any(sent == step for sent, _ in self._sent):
            self._store.start(tag)
        try:
            names = [file.relative_to(source).as_posix() for file in sorted(source.rglob("*")) if file.is_file()]
            for name in names:
                if name != SUMS and (step, name) not in self._sent:
                    send(source / name, place, name)
                    self._sent.add((step, name))
            place.write(SUMS, (source / SUMS).read_bytes())
        except FileNotFoundError:
            if source.is_dir():
                raise
            self._store.remove(tag)  # it has gone here, while it was sent: others are to be kept
        self._sent = {(sent, name) for sent, name in self._sent if sent != step}
