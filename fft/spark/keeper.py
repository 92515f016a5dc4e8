"""The keeper of a node: ``python -m fft.spark.keeper`` looks at its machine, starts the ranks there, and ends them.

It is a process and a session of its own, since Spark ends Python workers without a word where a job is cancelled or an
executor is gone, and ranks have to be told, and given the time to save. Of stdin it reads two lines of JSON, the order
and then the address at which ranks meet; to stdout it writes two, what it found and how the ranks ended.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fft.errors import EXIT_AGAIN, UserError
from fft.files import remove_path
from fft.spark.channel import DriverLine
from fft.spark.places import check_read, check_tokens, remove_tokens

#: What ranks import that the package itself does not bring.
_NEEDED = ("torch", "deepspeed", "transformers", "safetensors", "pyarrow", "yaml")
#: Seconds between two looks at the ranks.
_LOOKED_EVERY = 0.1
#: Seconds that ranks have to save, where nobody says how many; and to end in, once one of them has failed.
_SAVED_WITHIN, _ENDED_WITHIN = 600.0, 10.0
#: Lines of a rank that are shown when it fails without a sentence.
_TAIL = 30


class KeptRanks:
    """The ranks of this machine. Of rank 0 every line is told at once, of the others the last when one has failed."""

    def __init__(self, order: Mapping[str, Any], meet: Mapping[str, Any], line: DriverLine) -> None:
        self._line, self._folder = line, Path(order["folder"])
        self._first = order["node"] * order["processes"]
        self._tails: list[deque[str]] = []
        self._readers: list[threading.Thread] = []
        self._kill_at: float | None = None
        self.processes: list[subprocess.Popen] = []
        for local in range(order["processes"]):
            self._start(local, order, meet)

    def _start(self, local: int, order: Mapping[str, Any], meet: Mapping[str, Any]) -> None:
        rank = self._first + local
        environment = {
            **os.environ,
            **{"RANK": str(rank), "WORLD_SIZE": str(order["nodes"] * order["processes"])},
            **{"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(order["processes"])},
            **{"MASTER_ADDR": meet["address"], "MASTER_PORT": str(meet["port"])},
            **{"TORCHELASTIC_ERROR_FILE": str(self._error_file(local)), "PYTHONUNBUFFERED": "1"},
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fft.train", *order["arguments"]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        tail: deque[str] = deque(maxlen=_TAIL)
        reader = threading.Thread(target=self._read, args=(rank, process.stdout, tail), daemon=True)
        reader.start()
        self.processes.append(process)
        self._tails.append(tail)
        self._readers.append(reader)

    def _read(self, rank: int, stream: IO[bytes], tail: deque[str]) -> None:
        for raw in stream:
            text = raw.decode(errors="replace").rstrip("\n")
            tail.append(text)
            if rank == 0:
                self._line.tell({"line": text})

    def _error_file(self, local: int) -> Path:
        return self._folder / f"error-{local}.json"

    def stop(self, seconds: float) -> None:
        """Have all end, and kill what is left after so long; a shorter time than one said before counts."""
        if self._kill_at is None:
            self._signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at or float("inf"), time.monotonic() + seconds)

    def look(self) -> int | None:
        """The local number of a rank that ended badly, when there is one; kills those whose time is over."""
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._signal(signal.SIGKILL)
        return next((local for local, process in enumerate(self.processes) if process.poll()), None)

    @property
    def tail(self) -> list[str]:
        """The last lines of the first rank."""
        return list(self._tails[0])

    @property
    def running(self) -> bool:
        """Whether any is."""
        return any(process.poll() is None for process in self.processes)

    def why(self, local: int) -> str:
        """A sentence of why a rank ended; where it had none of its own, its last lines are told before."""
        self._readers[local].join(timeout=_ENDED_WITHIN)
        rank, code = self._first + local, self.processes[local].returncode
        if self._error_file(local).exists():
            return str(json.loads(self._error_file(local).read_text(encoding="utf-8"))["message"]["message"])
        for text in self._tails[local] if rank else ():
            self._line.tell({"line": f"[rank {rank}] {text}"})
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = " (the system kills what takes the machine's last memory)" if code == -signal.SIGKILL else ""
        return f"rank {rank} on {socket.gethostname()} was ended {how}{hint}: its last lines are above."

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def main() -> None:
    """Keep the ranks of a node."""
    # Whoever is asked to end asks them; the keeper stays until they have.
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    order = json.loads(sys.stdin.readline())
    line = DriverLine(order["listener"] and tuple(order["listener"]), order["node"])
    line.tell({"host": socket.gethostname()})
    try:
        found = {"problem": _problem(order), "heard": line.is_open, "port": _free_port()}
        _say(found)
        told = sys.stdin.readline()
        if not told:  # another node cannot run
            line.tell({"ended": None})
        else:
            ended = _keep(order, json.loads(told), line, asked)
            with contextlib.suppress(OSError):  # nobody reads any more where Spark has ended the task
                _say(ended)
    finally:
        line.close()
        with contextlib.suppress(OSError):  # the machine's folder of temporary files, which the system clears
            remove_path(order["folder"])


def _say(facts: Mapping[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def _problem(order: Mapping[str, Any]) -> str | None:
    """Why no rank can run on this machine, as a sentence."""
    host = f"on {socket.gethostname()}"
    if os.path.isdir(order["cwd"]):
        os.chdir(order["cwd"])
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        return (
            f"{sys.executable} {host} cannot import {', '.join(lacking)}: install the wheel of `make dist` and "
            "what it needs on all machines of the cluster (on Databricks by %pip install, in the notebook's first "
            "cell, or as a library)."
        )
    try:
        check_read([tuple(pair) for pair in order["read"]], host)
        check_tokens(order["beside"], order["token"], host)
    except (UserError, OSError) as error:
        return str(error)
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _keep(
    order: Mapping[str, Any], meet: Mapping[str, Any], line: DriverLine, asked: threading.Event
) -> dict[str, Any]:
    """Start ranks, wait for their end; returns exit codes, and a sentence if a rank failed by itself."""
    parent = os.getppid()
    if order["node"] == 0:  # all have seen them; and where Spark begins this job again, none is found
        remove_tokens(order["beside"], order["token"])
    line.watch(_SAVED_WITHIN)
    ranks, failed, orphan = KeptRanks(order, meet, line), None, False
    while ranks.running:
        time.sleep(_LOOKED_EVERY)
        if not orphan and os.getppid() != parent:  # Spark has ended this job's task, or its machine
            orphan = True
            line.tell({"orphan": True})
        if line.stop_within is not None:
            ranks.stop(line.stop_within)
            line.stop_within = None
        elif orphan or asked.is_set():
            ranks.stop(_SAVED_WITHIN)
            asked.clear()
        if failed is None and (failed := ranks.look()) is not None:
            saved = ranks.processes[failed].returncode == EXIT_AGAIN
            if not saved:
                line.tell({"failed": ranks.why(failed)})
            ranks.stop(_SAVED_WITHIN if saved else _ENDED_WITHIN)
        elif failed is not None:
            ranks.look()
    ended: dict[str, Any] = {"codes": [process.returncode for process in ranks.processes]}
    failed = ranks.look() if failed is None else failed
    if failed is not None and ranks.processes[failed].returncode != EXIT_AGAIN:
        ended["failed"] = ranks.why(failed)
    line.tell({"ended": None})
    return ended | {"tail": ranks.tail}


if __name__ == "__main__":
    main()
