"""The ranks of a run meet before anything is built: who they are, on which machines, by which addresses.

What a machine says of its own name may be true for itself alone (Debian has it at 127.0.1.1), so every rank announces
the address from which it reaches the first one, and the others try it. Those of one machine stay on loopback.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fft.errors import UserError, one_line
from fft.parallel import interfaces

#: Seconds in which all ranks have to start, in which those that have have to answer, and one that is called.
_START, _ANSWER, _CALL = 600.0, 60, 5
#: Seconds after which rank 0 says who has not come yet, twice as many each time; where others find what follows.
_TOLD, _FAULT = 5.0, "meeting/fault"
#: Seconds between two looks.
_AGAIN = 0.05
#: Longest line with which a connection begins, and connections that may wait to be taken, of all ranks at once.
_LINE, _BACKLOG = 200, 2048
_INTERFACE = interfaces.CHOSEN


@dataclass(frozen=True)
class Peer:
    """A rank: its machine's name, and where it listens."""

    rank: int
    host: str
    address: str
    port: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} (on {self.host})"


@dataclass(frozen=True)
class Meeting:
    """All ranks in their order, this one's number, and connections: rank 0's to all others, theirs to it, and those
    of the first rank of each machine to one another.
    """

    peers: Sequence[Peer]
    rank: int
    links: dict[int, socket.socket] = field(default_factory=dict)
    store: dist.Store | None = None  # which ends with rank 0's reference to it

    @property
    def own(self) -> Peer:
        """This rank."""
        return self.peers[self.rank]

    @property
    def here(self) -> list[Peer]:
        """The ranks of this machine."""
        return [peer for peer in self.peers if peer.host == self.own.host]


def meet(world: int, patience: float = _START) -> Meeting:
    """Meet the ``world - 1`` others, and have gloo listen on the interface by which they reach this one.

    Collective. Raises :class:`UserError` on all ranks where one does not reach another, and for ranks that do not come
    for so many seconds of ``patience``.
    """
    if world == 1:
        return Meeting([Peer(0, socket.gethostname(), "127.0.0.1")], 0)
    rank = int(os.environ["RANK"])
    store = _store(rank, world, patience)
    table = _Table(store, rank, world)
    table.gather(patience)
    address, token, lacks = "", "", ""
    try:
        address = _own_address()
    except UserError as error:
        lacks = str(error)
    told = table.share("address", [socket.gethostname(), address, uuid.uuid4().hex, lacks])
    table.refuse(entry[3] for entry in told)
    token = told[0][2]
    far = next((entry[1] for entry in told if not interfaces.is_loopback(entry[1])), None)
    if far is not None and _INTERFACE not in os.environ and interfaces.is_loopback(address):
        address = interfaces.address_towards(far)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=world) as listener:
        announced = table.share("port", [socket.gethostname(), address, listener.getsockname()[1]])
        peers = [Peer(number, *entry) for number, entry in enumerate(announced)]
        links: dict[int, socket.socket] = {}
        with _answering(listener, token, peers, rank, links):
            table.refuse(table.share("reached", _call_all(peers, rank, token, links)))
    interfaces.listen_on(address)
    return Meeting(peers, rank, links, store)


class _Table:
    """What every rank tells all others, one thing after another."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world

    def gather(self, patience: float) -> None:
        """Wait until all ranks have come; rank 0 says for whom. Collective.

        Raises :class:`UserError`, which names those that did not come in time, on all that did.
        """
        keys = [f"meeting/host/{rank}" for rank in range(self._world)]
        self._store.set(keys[self._rank], socket.gethostname())
        came = self._world
        if self._rank == 0:
            came -= self._await(keys, patience)
        try:
            self._store.wait(keys, timedelta(seconds=patience + _ANSWER))
            fault = self._store.get(_FAULT).decode() if self._store.check([_FAULT]) else ""
        except (dist.DistError, RuntimeError) as error:
            raise UserError(f"rank {self._rank} waited for the others, and rank 0 is gone: see its log.") from error
        self.refuse([fault], came)

    def _await(self, keys: Sequence[str], patience: float) -> int:
        """Wait for all ``keys``, a rank's each; returns how many did not come, which the others then learn, too."""
        begun, told = time.monotonic(), _TOLD
        while not self._store.check(list(keys)):
            if (waited := time.monotonic() - begun) >= min(told, patience):
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {self._world}"
                if waited >= patience:
                    return self._give_up(keys, missing, f"{ranks} did not come within {patience:.0f} s")
                told = 2 * waited
                print(f"waiting for {ranks}", file=sys.stderr, flush=True)
            time.sleep(_AGAIN)
        return 0

    def _give_up(self, keys: Sequence[str], missing: Sequence[int], what: str) -> int:
        """Have all that came know ``what`` is wrong; returns how many are missing."""
        place = f"{os.environ['MASTER_ADDR']} (MASTER_ADDR), port {os.environ['MASTER_PORT']}"
        self._store.set(
            _FAULT,
            f"{what}: see the logs of the machines that are to start them, and whether they reach {place}.",
        )
        for rank in missing:
            self._store.set(keys[rank], "")
        return len(missing)

    def share(self, name: str, value: Any) -> list[Any]:
        """Tell ``value``; returns what all have told, by rank. Collective."""
        keys = [f"meeting/{name}/{rank}" for rank in range(self._world)]
        self._store.set(keys[self._rank], json.dumps(value))
        try:
            self._store.wait(keys, timedelta(seconds=_ANSWER))
        except (dist.DistError, RuntimeError) as error:
            silent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise UserError(
                f"ranks {', '.join(map(str, silent))} have come and then said nothing for {_ANSWER} s: see their logs."
            ) from error
        return [json.loads(told) for told in self._store.multi_get(keys)]

    def refuse(self, faults: Iterable[str], readers: int | None = None) -> None:
        """Raise :class:`UserError` with the first of ``faults`` that is one, which all ranks have. Collective.

        ``readers`` are those that have come, if these are not all.
        """
        fault = next(filter(None, faults), None)
        if fault is None:
            return
        # The store may be rank 0's: it stays until the others have read what is in it.
        deadline, read = time.monotonic() + _CALL, self._store.add("meeting/read", 1)
        while self._rank == 0 and read < (readers or self._world) and time.monotonic() < deadline:
            time.sleep(_AGAIN)
            read = self._store.add("meeting/read", 0)
        raise UserError(fault)


def _store(rank: int, world: int, patience: float) -> dist.Store:
    """The launcher's, which all ranks know, or rank 0's. Raises :class:`UserError` where it is not found."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    leads = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not leads:
        _find(place, rank, patience)
    options: dict[str, Any] = {"timeout": timedelta(seconds=patience), "wait_for_workers": False}
    try:
        if leads:
            options["multi_tenant"] = True  # torch will make one of its own at this place, and find this one
            if (listener := _listener(place, world)) is not None:
                options["master_listen_fd"] = listener.detach()  # which the store closes
        return dist.TCPStore(*place, world, leads, **options)
    except (OSError, dist.DistError, RuntimeError) as error:
        raise UserError(f"rank {rank} cannot use {place[0]}, port {place[1]}: {one_line(error)}") from error


def _listener(place: tuple[str, int], world: int) -> socket.socket | None:
    """A socket that listens where the others look for rank 0, at the address of MASTER_ADDR, and nowhere else.

    None where that cannot be known here: the address is not this machine's own (it is translated on the way), or the
    name has several, or is at loopback here alone. Raises :class:`OSError` for a port that is taken.
    """
    host, port = place
    alone = os.environ.get("LOCAL_WORLD_SIZE") == str(world) or host == "localhost"
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = {str(address): family for family, _, _, _, (address, *_) in found}
    if any(interfaces.is_loopback(address) and not (alone or address == host) for address in places):
        return None
    if len(places) > 1 and host != "localhost":  # by which of them others come is theirs to choose
        return None
    for address, family in places.items():
        try:
            return socket.create_server((address, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return None


def _find(place: tuple[str, int], rank: int, patience: float) -> None:
    """Wait until somebody listens at the first rank's place. Raises :class:`UserError` where nobody can."""
    who = f"rank {rank} (on {socket.gethostname()})"
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(place, timeout=_CALL).close()
            return
        except socket.gaierror as error:
            raise UserError(
                f"{who} does not know the name {place[0]} (MASTER_ADDR): give torchrun --master_addr, or --local_addr "
                "on the first machine, an address that all machines reach, or add the name to /etc/hosts."
            ) from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{who} has found nobody at {place[0]} (MASTER_ADDR), port {place[1]}, for {patience:.0f} s "
                    f"({error.strerror or error}): is it the first machine's address, and is its port open?"
                ) from error
        time.sleep(0.2)


def _own_address() -> str:
    """This rank's: that of GLOO_SOCKET_IFNAME, or the one that the route to the first rank begins at."""
    if names := os.environ.get(_INTERFACE):
        return interfaces.interface_address(names)
    master = os.environ["MASTER_ADDR"]
    try:
        return interfaces.address_towards(master)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} knows no way to {master} (MASTER_ADDR; {error.strerror or error}): set "
            f"{_INTERFACE} there to the interface that the other machines reach, or add the name to /etc/hosts."
        ) from error


def _first_ranks(peers: Sequence[Peer]) -> list[int]:
    """The first rank of every machine, each of which has a connection to the others."""
    return [*{(peer.host, peer.address): peer.rank for peer in reversed(peers)}.values()]


def _stays(peers: Sequence[Peer], caller: int, called: int) -> bool:
    """Whether a connection is one that stays: to rank 0, and one between two machines."""
    return called == 0 or (called < caller and {caller, called} <= set(_first_ranks(peers)))


def _call_all(peers: Sequence[Peer], rank: int, token: str, links: dict[int, socket.socket]) -> str:
    """Call one rank of every machine, and rank 0; connections that stay are kept. Returns what is wrong, or nothing."""
    for peer in (peers[number] for number in _first_ranks(peers)):
        if peer.rank == rank:
            continue
        try:
            link = _call(peer, rank, token)
        except OSError as error:
            return (
                f"{peers[rank]} does not reach {peer} at {peer.address}, port {peer.port} "
                f"({error.strerror or error}): {_remedy(peer)}"
            )
        if _stays(peers, rank, peer.rank):
            links[peer.rank] = link
        else:
            link.close()
    return ""


def _remedy(peer: Peer) -> str:
    if interfaces.is_loopback(peer.address):
        return (
            f"that address is {peer.host}'s alone; set {_INTERFACE} there to the interface that other machines reach, "
            "or give torchrun --local_addr its address."
        )
    return f"set {_INTERFACE} on {peer.host} to the interface that other machines reach, and let them use its ports."


def _call(peer: Peer, rank: int, token: str) -> socket.socket:
    """A connection to a rank that knows the token. Raises :class:`OSError` where there is none."""
    link = socket.create_connection((peer.address, peer.port), timeout=_CALL)
    try:
        link.sendall(f"{token} {rank}\n".encode())
        if _line(link) != token:
            raise OSError("somebody else listens there")
    except BaseException:
        link.close()
        raise
    return link


@contextmanager
def _answering(
    listener: socket.socket, token: str, peers: Sequence[Peer], rank: int, links: dict[int, socket.socket]
) -> Iterator[None]:
    """Answer who calls and knows the token; connections that stay go to ``links``."""
    listener.settimeout(0.05)
    over = threading.Event()

    def welcome(link: socket.socket) -> None:
        with suppress(OSError, ValueError):  # a stranger's is nothing to us, and a rank says itself what it lacks
            said, number = _line(link).split()
            if said == token:
                if _stays(peers, int(number), rank):  # before the answer, after which the caller goes on
                    links[int(number)] = link
                return link.sendall(f"{token}\n".encode())
        return link.close()

    def answer() -> None:
        while not over.is_set():
            with suppress(OSError):  # each by itself: one that says nothing keeps no other waiting
                threading.Thread(target=welcome, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _line(link: socket.socket) -> str:
    """The line that a connection begins with, which may take so long in all."""
    said, until = b"", time.monotonic() + _CALL
    while not said.endswith(b"\n") and len(said) < _LINE:
        link.settimeout(max(_AGAIN, until - time.monotonic()))
        if not (more := link.recv(1)):
            break
        said += more
    link.settimeout(_CALL)
    return said.decode("ascii", "replace").strip()
