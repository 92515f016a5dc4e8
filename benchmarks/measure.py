"""Run a command and say what it cost: seconds, cores, and the largest memory of all its processes together."""

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

#: Seconds between two looks at the processes: short against any of the runs measured.
_INTERVAL = 0.2


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds, mean number of busy cores, and peak resident bytes of the whole process tree."""

    seconds: float
    cores: float
    peak_bytes: int


def run_measured(command: Sequence[object], cwd: Path, environment: Mapping[str, str], log: Path) -> Cost:
    """Run a command to its end; what it prints goes to ``log``. Raises RuntimeError with the log's end if it fails."""
    begin = time.perf_counter()
    with open(log, "wb") as stream:
        process = subprocess.Popen([str(c) for c in command], cwd=cwd, env=environment, stdout=stream, stderr=stream)
        watch = _Watch(process.pid)
        watch.start()
        code = process.wait()
    seconds = time.perf_counter() - begin
    watch.stop()
    if code:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))} ended with exit code {code}; the end of {log}:\n{tail}")
    return Cost(seconds, watch.cpu_seconds / seconds, watch.peak_bytes)


class _Watch(threading.Thread):
    """Sums memory over a process and its descendants, and keeps each one's last known CPU time."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._done = psutil.Process(pid), threading.Event()
        self._cpu: dict[int, float] = {}
        self.peak_bytes = 0

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all processes seen."""
        return sum(self._cpu.values())

    def run(self) -> None:
        """Look until told to stop."""
        while not self._done.wait(_INTERVAL):
            memory = 0
            for process in self._tree():
                try:
                    # Unique memory, not resident: forked workers share pages, which would count once for each.
                    memory += process.memory_full_info().uss
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue  # it ended between being listed and being asked
            self.peak_bytes = max(self.peak_bytes, memory)

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self.join()

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
