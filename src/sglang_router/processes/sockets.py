"""The sockets of the main port when several processes serve it: bound once, by the supervisor.

Each relay has a socket of its own on the port (SO_REUSEPORT), so that the kernel divides new clients. The supervisor
keeps all of them open: a client that waits in the queue of a relay that died is served by the next one.

A router without this option has one socket, bound without SO_REUSEPORT. Taken over from such a router, it is shared:
all relays accept from its queue.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import cast

Place = tuple[str | int, ...]
"""An address as a socket takes it."""


def bind(host: str, port: int, relays: int) -> list[socket.socket]:
    """Bind one socket for each relay on each address that a host name stands for; `::` stands for all of both families.

    Raises: OSError, when an address cannot be bound, or another process listens there.
    """
    bound: list[socket.socket] = []
    missing: OSError | None = None
    every = host.strip("[]") == "::"
    try:
        for family, address in _addresses("::" if every else host.strip("[]"), port, every):
            place = (address[0], bound[0].getsockname()[1] if bound else port, *address[2:])
            try:
                _refuse_listened(family, place)
                for _ in range(relays):
                    bound.append(_bind(family, place, reuse=True))
                    place = (place[0], bound[-1].getsockname()[1], *place[2:])
            except OSError as error:
                if not every or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                missing = error
    except OSError:
        close(bound)
        raise
    if not bound:
        raise missing or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return bound


def _addresses(host: str, port: int, every: bool) -> list[tuple[socket.AddressFamily, Place]]:
    if every:
        return [(socket.AF_INET6, ("::", port, 0, 0)), (socket.AF_INET, ("0.0.0.0", port))]  # noqa: S104
    with contextlib.suppress(ValueError):  # an address needs no look-up
        number = ipaddress.ip_address(host)
        if number.version == 4:
            return [(socket.AF_INET, (host, port))]
        if "%" not in host:
            return [(socket.AF_INET6, (host, port, 0, 0))]
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, cast("Place", address)) for family, _, _, _, address in dict.fromkeys(found)]


def _refuse_listened(family: socket.AddressFamily, address: Place) -> None:
    """Raise OSError when another router listens there: SO_REUSEPORT alone would let two of them share the port."""
    if address[1]:
        _bind(family, address, reuse=False).close()


def _bind(family: socket.AddressFamily, address: Place, reuse: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def divide(sockets: Sequence[socket.socket], relays: int) -> list[list[socket.socket]]:
    """Return for each relay the sockets that it serves: each socket has a relay, each relay one of every address."""
    groups: dict[object, list[socket.socket]] = {}
    for sock in sockets:
        groups.setdefault(sock.getsockname(), []).append(sock)
    shares: list[list[socket.socket]] = [[] for _ in range(relays)]
    for group in groups.values():
        for number in range(max(len(group), relays)):
            shares[number % relays].append(group[number % len(group)])
    return [list(dict.fromkeys(share)) for share in shares]


def close(sockets: Sequence[socket.socket]) -> None:
    """Close sockets; may be called again."""
    for sock in sockets:
        sock.close()
