"""A real MLflow server on loopback, with SQLite and a folder of artifacts, for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

#: Runs a command in a group of its own until that ends, or whoever started it, whose end closes the standard input.
_WATCHED = '("$@"; kill -s KILL -- -$$) & read _; kill -s KILL -- -$$'


class Server:
    """A server that can be stopped and started again at its address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns when it answers."""
        where = [
            f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db",
            f"--artifacts-destination={self.folder}/kept",
        ]
        command = [sys.executable, "-m", "mlflow", "server", *where, f"--port={self.port}", "--workers=1"]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(self.folder / "log", "a") as log:
            options = {"env": {**os.environ, **quiet}, "stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(["sh", "-c", _WATCHED, "sh", *command], stdin=subprocess.PIPE, **options)
        until = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < until, (self.folder / "log").read_text()
            time.sleep(0.1)

    def answers(self) -> bool:
        """Whether it does."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        """Kill it, with the workers that it has started."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[Server]:
    """One that has started, until the end of the block."""
    server = Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"
