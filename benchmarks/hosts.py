"""Machines made of Linux namespaces on this one, for what happens between machines: links, names, disks that differ.

Each has an address of its own (10.77.0.1, 10.77.0.2, ...), a name (host1, host2, ...), ``/etc/hosts``, ``/dev/shm`` and
a disk, mounted at :attr:`Hosts.disk`, that no other one sees; all else is shared. They hang on a switch, which is a
namespace, too, so that nothing of this machine's own network is touched. Needs root, ``ip``, ``unshare``, ``nsenter``.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_WIRE = Path(__file__).with_name("wire.py")
#: What a machine has of its own, by nsenter's flags and by the names in /proc.
_FLAGS, _KINDS = ("--net", "--mount", "--uts", "--ipc"), ("net", "uts", "ipc", "mnt")


def why_not() -> str | None:
    """Why no machines can be made here; None where they can."""
    made = ["unshare", *_FLAGS, "sh", "-c", "ip link add v1 type veth peer name v2 && mount -t tmpfs tmpfs /dev/shm"]
    try:
        done = subprocess.run(made, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return done.stderr.strip() or None if done.returncode else None


class Hosts:
    """``count`` machines, numbered from 0, which are there until the end of a ``with`` block.

    ``folder`` takes their disks' mount point and what they have for ``/etc/hosts``: all names (``"good"``), as Debian's
    installer writes it, the own name at 127.0.1.1 beside all others (``"debian"``), or nobody's (``"none"``).
    """

    def __init__(self, count: int, folder: Path, names: str = "good") -> None:
        self.count, self.folder, self._names = count, folder, names
        #: Where each machine has a disk of its own.
        self.disk = folder / "disk"
        self.addresses = [f"10.77.0.{host + 1}" for host in range(count)]
        self._held = contextlib.ExitStack()
        #: A process of each machine, which lives as long as it.
        self.pids: list[int] = []
        self._switch = 0
        self._wire: subprocess.Popen | None = None

    def __enter__(self) -> "Hosts":
        try:
            self._make()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _make(self) -> None:
        self.disk.mkdir(parents=True, exist_ok=True)
        self._switch = self._held.enter_context(_namespaces("--net"))
        self._at_switch("ip link add br0 type bridge && ip link set br0 up")
        for host, address in enumerate(self.addresses):
            pid = self._held.enter_context(_namespaces(*_FLAGS))
            self.pids.append(pid)
            port = f"h{host + 1}"
            self._at_switch(f"ip link add {port} type veth peer name eth0 netns {pid} && ip link set {port} up")
            known = self.folder / f"etc-hosts-{host + 1}"
            self.name(host, self._names)
            self.shell(
                host,
                f"hostname host{host + 1} && ip link set lo up && ip addr add {address}/24 dev eth0 && "
                f"ip link set eth0 up && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs {self.disk} && "
                f"mount --bind {known} /etc/hosts",
            )
            self.mend(host)

    def name(self, host: int, names: str) -> None:
        """Have a machine know these ``names``, see :class:`Hosts`."""
        lines = ["127.0.0.1 localhost"]
        for other, address in enumerate(self.addresses if names != "none" else ()):
            own = names == "debian" and other == host
            lines.append(f"{'127.0.1.1' if own else address} host{other + 1}")
        with open(self.folder / f"etc-hosts-{host + 1}", "w", encoding="utf-8") as stream:  # in place: it is mounted
            stream.write("\n".join(lines) + "\n")

    def on(self, host: int, *command: object) -> list[str]:
        """The command that runs ``command`` on a machine, in this process's directory."""
        return ["nsenter", "-t", str(self.pids[host]), *_FLAGS, f"--wd={os.getcwd()}", "--", *map(str, command)]

    def start(
        self, host: int, *command: object, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen:
        """Start a command on a machine, in a session of its own; ``env`` is added to this process's environment."""
        variables = {**os.environ, **(env or {})}
        return subprocess.Popen(self.on(host, *command), start_new_session=True, env=variables, **options)

    def rank(self, host: int, threads: str = "1") -> dict[str, str]:
        """What a launcher tells the only rank of a machine, for the ``env`` of :meth:`start`."""
        return {
            **{"RANK": str(host), "WORLD_SIZE": str(self.count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            **{"MASTER_ADDR": self.addresses[0], "MASTER_PORT": "29500", "OMP_NUM_THREADS": threads},
        }

    def shell(self, host: int, script: str) -> str:
        """What a script prints on a machine. Raises RuntimeError where it fails."""
        return _output(self.on(host, "sh", "-c", script))

    def cut(self, host: int) -> None:
        """Let the link of a machine go dead: nothing arrives any more, and nobody is told."""
        self._at_switch(f"ip link set h{host + 1} nomaster")

    def mend(self, host: int) -> None:
        """Plug the machine in again."""
        self._at_switch(f"ip link set h{host + 1} master br0")

    def part(self, first: int, second: int) -> None:
        """Let nothing arrive between two machines any more, for good; nobody is told."""
        for host, other in ((first, second), (second, first)):
            nowhere = f"{self.addresses[other]} lladdr 02:00:00:00:00:ff"
            self.shell(host, f"ip neigh replace {nowhere} dev eth0 nud permanent")

    def shape(self, bits_per_second: float | None, burst: int = 128_000) -> None:
        """Let no machine receive more than that; None: as much as comes. What rested carries a ``burst`` of bytes."""
        for host in range(self.count):
            port = f"h{host + 1}"
            self._at_switch(f"tc qdisc del dev {port} root 2>/dev/null || true")
            if bits_per_second:
                rate = f"rate {bits_per_second:.0f}bit burst {burst} latency 200ms"
                self._at_switch(f"tc qdisc add dev {port} root tbf {rate}")

    def sent(self) -> list[int]:
        """Bytes that each machine has sent, headers included."""
        return [
            int(self.shell(host, "ip -s -o link show eth0").rpartition("TX:")[2].split("\\")[1].split()[0])
            for host in range(self.count)
        ]

    def disturb(self, delay: float, loss: float) -> None:
        """Put a wire between two machines, for good: each frame takes ``delay`` seconds, a share of them is lost."""
        ports = [f"h{host + 1}" for host in range(2)]
        for host in range(2):
            self.cut(host)
            self._held.enter_context(self._running(self.on(host, sys.executable, _WIRE, "plain", "eth0"), wait=True))
        wire = ["nsenter", "-t", str(self._switch), "--net", "--", sys.executable, str(_WIRE), *ports]
        self._held.enter_context(self._running([*wire, str(delay), str(loss)]))

    @contextlib.contextmanager
    def _running(self, command: list[str], wait: bool = False) -> Iterator[None]:
        """A command, in the background, that says a line when it is ready."""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                if not process.stdout or not process.stdout.readline():
                    raise RuntimeError(f"{' '.join(command)} did not start")
                if wait:
                    process.wait()
                yield
            finally:
                process.kill()

    def _at_switch(self, script: str) -> None:
        _output(["nsenter", "-t", str(self._switch), "--net", "--", "sh", "-c", script])


def enter(pid: int) -> None:
    """Move this process, which has a single thread, to the machine of ``pid``; for ranks that are forked."""
    libc, directory = ctypes.CDLL(None, use_errno=True), os.getcwd()
    for kind in _KINDS:
        with open(f"/proc/{pid}/ns/{kind}", "rb") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
    os.chdir(directory)


@contextlib.contextmanager
def _namespaces(*flags: str) -> Iterator[int]:
    """New namespaces: the id of a process that holds them, and which goes when this one does."""
    with subprocess.Popen(["unshare", *flags, "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as holder:
        try:
            deadline = time.monotonic() + 10
            while Path(f"/proc/{holder.pid}/comm").read_text(encoding="utf-8").strip() != "cat":
                if time.monotonic() > deadline or holder.poll() is not None:
                    raise RuntimeError(f"unshare {' '.join(flags)} made no namespaces")
                time.sleep(0.01)
            yield holder.pid
        finally:
            holder.kill()


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
