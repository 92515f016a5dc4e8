"""At which addresses the processes of a session listen, as the system tells it."""

import contextlib
import os
from pathlib import Path

#: 127.0.0.1, and the same as an address of IPv6.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def processes_of(group: int) -> list[int]:
    """All processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == group and state not in "ZX":
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def listens_at(group: int) -> set[str]:
    """Addresses, as the system writes them, at which processes of a session listen; and whether they are loopback."""
    sockets = set()
    for process in processes_of(group):
        try:
            links = os.listdir(f"/proc/{process}/fd")
        except OSError:  # it ends, and then is root's
            if process in processes_of(group):
                raise
            continue
        for link in links:
            with contextlib.suppress(OSError):  # closed meanwhile
                sockets.add(os.readlink(f"/proc/{process}/fd/{link}"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.add(local.partition(":")[0])
    return found
