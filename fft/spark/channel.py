"""What nodes tell the driver while a run is under way, line by line, and how the driver has them end.

Each node opens one connection. Up go JSON objects, one a line; down go ``stop SECONDS``: end the ranks, and kill what
is left of them after that time. A connection that closes says that the other side is gone.
"""

import contextlib
import json
import secrets
import socket
import threading
from collections.abc import Mapping
from queue import Queue
from typing import Any

#: Seconds of silence, between questions, and how many of these without an answer, until a machine counts as gone.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
#: Seconds in which a node has to reach the driver.
_REACHED_WITHIN = 10.0


class Listener:
    """The driver's side: puts ``(node, message)`` into :attr:`told`, and ``(node, None)`` when a node has hung up.

    It takes nobody in who does not know its secret.
    """

    def __init__(self, bind: str, address: str) -> None:
        self._server = socket.create_server((bind, 0))
        self._secret = secrets.token_hex(16)
        self._nodes: dict[int, socket.socket] = {}
        self.told: Queue[tuple[int, dict[str, Any] | None]] = Queue()
        self.reached_at = (address, self._server.getsockname()[1], self._secret)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connected(self) -> bool:
        """Whether any node is."""
        return bool(self._nodes)

    def stop(self, seconds: float, but: int | None = None) -> None:
        """Have the ranks of all nodes end, ``but`` those of one."""
        for node, line in tuple(self._nodes.items()):
            with contextlib.suppress(OSError):  # it has gone, which is told
                if node != but:
                    line.sendall(f"stop {seconds}\n".encode())

    def close(self) -> None:
        """Hang up."""
        for line in (self._server, *self._nodes.values()):
            with contextlib.suppress(OSError):  # not connected any more
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                line, _ = self._server.accept()
                threading.Thread(target=self._listen, args=(line,), daemon=True).start()

    def _listen(self, line: socket.socket) -> None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        node = None
        # ValueError: the last line of a machine that is gone is cut.
        reading = line.makefile(encoding="utf-8", errors="replace")
        with contextlib.suppress(OSError, ValueError), line, reading as stream:
            line.settimeout(_REACHED_WITHIN)
            greeting = stream.readline(200).split()
            if len(greeting) == 2 and secrets.compare_digest(greeting[0].encode(), self._secret.encode()):
                line.settimeout(None)
                node = int(greeting[1])
                self._nodes[node] = line
                for text in stream:
                    self.told.put((node, json.loads(text)))
        if node is not None:
            self.told.put((node, None))
            del self._nodes[node]


class DriverLine:
    """A node's side. Where the driver cannot be reached, or is gone, what is told is lost and the run goes on."""

    def __init__(self, reached_at: tuple[str, int, str] | None, node: int) -> None:
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        #: Seconds that the ranks have to end in, once the driver wants them to, or is gone.
        self.stop_within: float | None = None
        if reached_at is None:
            return
        address, port, secret = reached_at
        with contextlib.suppress(OSError):
            self._socket = socket.create_connection((address, port), timeout=_REACHED_WITHIN)
            self._socket.settimeout(None)
            self._socket.sendall(f"{secret} {node}\n".encode())

    @property
    def is_open(self) -> bool:
        """Whether the driver was reached."""
        return self._socket is not None

    def tell(self, message: Mapping[str, object]) -> None:
        """Send a message."""
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.sendall((json.dumps(message) + "\n").encode())

    def watch(self, patience: float) -> None:
        """Listen from now on; a driver that hangs up gives the ranks ``patience`` seconds."""
        if self._socket is not None:
            threading.Thread(target=self._watch, args=(self._socket, patience), daemon=True).start()

    def _watch(self, line: socket.socket, patience: float) -> None:
        with contextlib.suppress(OSError), line.makefile(encoding="utf-8") as stream:
            for text in stream:
                self.stop_within = float(text.split()[1])
        self.stop_within = patience if self.stop_within is None else self.stop_within

    def close(self) -> None:
        """Hang up, once all has been sent."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            self._socket.close()
