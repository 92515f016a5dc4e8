"""The ranks of a run meet before anything is built: who they are, on which machines, by which addresses.

What a machine says of its own name may be true for itself alone (Debian has it at 127.0.1.1), so every rank announces
the address from which it reaches the first one, and the others try it. Those of one machine stay on loopback.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fft.errors import UserError
from fft.parallel import interfaces

#: Seconds in which all ranks have to start, in which those that have have to answer, and one that is called.
_START, _ANSWER, _CALL = 600, 60, 5
#: Longest line with which a connection begins.
_LINE = 200
_INTERFACE = "GLOO_SOCKET_IFNAME"


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
    """All ranks in their order, this one's number, and connections: rank 0's to all others, theirs to it."""

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


def meet(world: int) -> Meeting:
    """Meet the ``world - 1`` others, and have gloo listen on the interface by which they reach this one.

    Collective. Raises :class:`UserError` on all ranks where one does not reach another, and for ranks that do not come.
    """
    if world == 1:
        return Meeting([Peer(0, socket.gethostname(), "127.0.0.1")], 0)
    rank = int(os.environ["RANK"])
    store = _store(rank, world)
    table = _Table(store, rank, world)
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
        with _answering(listener, token, links if rank == 0 else None):
            table.refuse(table.share("reached", _call_all(peers, rank, token, links)))
    if _INTERFACE not in os.environ and (name := interfaces.interface_of(address)):
        os.environ[_INTERFACE] = name
    return Meeting(peers, rank, links, store)


class _Table:
    """What every rank tells all others, one thing after another."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world

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

    def refuse(self, faults: Iterable[str]) -> None:
        """Raise :class:`UserError` with the first of ``faults`` that is one, which all ranks have. Collective."""
        fault = next(filter(None, faults), None)
        if fault is None:
            return
        # The store may be rank 0's: it stays until the others have read what is in it.
        deadline, read = time.monotonic() + _CALL, self._store.add("meeting/read", 1)
        while self._rank == 0 and read < self._world and time.monotonic() < deadline:
            time.sleep(0.05)
            read = self._store.add("meeting/read", 0)
        raise UserError(fault)


def _store(rank: int, world: int) -> dist.Store:
    """The launcher's, which all ranks know. Raises :class:`UserError` where it is not found, or ranks do not come."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    begun = time.monotonic()
    if rank:
        _find(place, rank)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_START)))
    except (dist.DistError, RuntimeError) as error:
        if time.monotonic() - begun < _START:
            raise UserError(f"rank {rank} cannot use {place[0]}, port {place[1]}: {error}") from error
        raise UserError(
            f"not all {world} ranks came within {_START} s: see the logs of the machines that are missing, and whether "
            f"they reach {place[0]} (MASTER_ADDR), port {place[1]}."
        ) from error
    return store


def _find(place: tuple[str, int], rank: int) -> None:
    """Wait until somebody listens at the first rank's place. Raises :class:`UserError` where nobody can."""
    who = f"rank {rank} (on {socket.gethostname()})"
    deadline = time.monotonic() + _START
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
                    f"{who} has found nobody at {place[0]} (MASTER_ADDR), port {place[1]}, for {_START} s "
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


def _call_all(peers: Sequence[Peer], rank: int, token: str, links: dict[int, socket.socket]) -> str:
    """Call one rank of every machine, and rank 0, whose connection stays; returns what is wrong, or nothing."""
    chosen = {(peer.host, peer.address): peer for peer in reversed(peers)}.values()
    for peer in chosen:
        if peer.rank == rank:
            continue
        try:
            link = _call(peer, rank, token)
        except OSError as error:
            return (
                f"{peers[rank]} does not reach {peer} at {peer.address}, port {peer.port} "
                f"({error.strerror or error}): {_remedy(peer)}"
            )
        if peer.rank == 0:
            links[0] = link
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
def _answering(listener: socket.socket, token: str, links: dict[int, socket.socket] | None) -> Iterator[None]:
    """Answer who calls and knows the token; where there are ``links``, the connections stay there."""
    listener.settimeout(0.05)
    over = threading.Event()

    def answer() -> None:
        while not over.is_set():
            with suppress(OSError, ValueError):  # a stranger's is nothing to us, and a rank says itself what it lacks
                link, _ = listener.accept()
                link.settimeout(_CALL)
                said, number = _line(link).split()
                if said != token:
                    link.close()
                    continue
                if links is not None:  # before the answer, after which the caller goes on
                    links[int(number)] = link
                link.sendall(f"{token}\n".encode())

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _line(link: socket.socket) -> str:
    """The line that a connection begins with."""
    said = b""
    while not said.endswith(b"\n") and len(said) < _LINE:
        if not (more := link.recv(1)):
            break
        said += more
    return said.decode("ascii", "replace").strip()
