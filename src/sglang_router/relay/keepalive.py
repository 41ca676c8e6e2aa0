"""Notice a peer that vanished without a word: its machine lost power, its address was taken away, a firewall forgot it.

    to a worker      probed after 15 s of silence; given up after 30 s without an acknowledgement
    from a client    probed after 30 s of silence; given up after 120 s without an acknowledgement

Without this the system waits for a quarter of an hour with data in flight, and for ever without. TCP does the probing
(RFC 9293 3.8.4, RFC 5482), so neither engines nor clients see anything of it. The options are set once per connection;
accepted sockets inherit those of the socket that listens.

A peer that is there but does not read counts as one that acknowledges nothing, hence the longer time of clients: they
may pause. Clients that vanish between two requests are closed by --keepalive-timeout-secs anyway.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final, Protocol

_WORKER: Final = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
_CLIENT: Final = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 120_000}
"""Seconds; TCP_USER_TIMEOUT in milliseconds. Not every system has all of them."""


class HasOptions(Protocol):
    """A socket, or what an event loop shows in its place."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option."""


def probe_worker(sock: HasOptions) -> None:
    """Have the system notice when the worker at the other end vanishes."""
    _set(sock, _WORKER)


def probe_clients(sock: HasOptions) -> None:
    """Have the system notice when a client vanishes. sock: the socket that listens."""
    _set(sock, _CLIENT)


def _set(sock: HasOptions, options: dict[str, int]) -> None:
    with contextlib.suppress(OSError, ValueError):  # no TCP socket, or closed: uvloop has no descriptor then
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            number = getattr(socket, name, None)
            if number is not None:
                sock.setsockopt(socket.IPPROTO_TCP, number, value)
