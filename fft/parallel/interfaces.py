"""Addresses of this machine: by which of them others reach it, and which interface has one. Without torch."""

import ipaddress
import os
import socket

import psutil

from fft.errors import UserError

#: The variable that says on which interface gloo listens.
CHOSEN = "GLOO_SOCKET_IFNAME"


def address_towards(host: str) -> str:
    """The own address from which this machine would reach ``host``, a name or an address, by its routes.

    Nothing is sent. Raises :class:`OSError` where the name or a way to it is not known.
    """
    found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)  # of several, the first that there is a way to
    for index, (family, kind, protocol, _, place) in enumerate(found):
        with socket.socket(family, kind, protocol) as way:
            try:
                way.connect(place)
            except OSError:
                if index + 1 == len(found):
                    raise
                continue
            return way.getsockname()[0]
    raise OSError(f"{host} has no address")


def is_loopback(address: str) -> bool:
    """Whether an address is one that this machine alone reaches."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address; loopback has all of 127.0.0.0/8. None for another machine's."""
    names = psutil.net_if_addrs()
    for name, addresses in names.items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return name
    if is_loopback(address):
        return next((name for name, known in names.items() if any(is_own_loopback(x.address) for x in known)), None)
    return None


def listen_on(address: str) -> None:
    """Have gloo listen on the interface of an own address, unless :data:`CHOSEN` says on which."""
    if CHOSEN not in os.environ and (name := interface_of(address)) is not None:
        os.environ[CHOSEN] = name


def is_own_loopback(address: str) -> bool:
    """Whether it is the one that loopback interfaces have."""
    return address in ("127.0.0.1", "::1")


def interface_address(names: str) -> str:
    """The address of an interface, the first of ``names``, a list with commas, as GLOO_SOCKET_IFNAME has it.

    Raises :class:`UserError` where it has none.
    """
    every, name = psutil.net_if_addrs(), names.split(",")[0]
    for family in (socket.AF_INET, socket.AF_INET6):
        for known in every.get(name, ()):
            if known.family == family:
                return known.address
    raise UserError(
        f"GLOO_SOCKET_IFNAME is {names}, and {socket.gethostname()} has no such interface with an address: it has "
        f"{described()}."
    )


def described() -> str:
    """This machine's interfaces, for messages."""
    return ", ".join(
        f"{name} ({known.address})"
        for name, addresses in psutil.net_if_addrs().items()
        for known in addresses
        if known.family == socket.AF_INET
    )
