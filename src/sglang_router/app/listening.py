"""The listening sockets of a router: bind, open, hand over to the next router, close.

bind(...)      bind an address without accepting clients; a second router with the same options fails here
open_all(...)  accept clients from now on
offer(...)     let the next router take the sockets over (--reuse-port, `restart.handover`)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, cast

from sglang_router.access.tls import TLSFiles, listening_context
from sglang_router.app.parts import GivenPort
from sglang_router.errors import ConfigError
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.frontend import Frontend
from sglang_router.relay.keepalive import probe_clients
from sglang_router.restart.handover import InheritedSockets, SocketOffer, take_over

_BACKLOG = 4096
"""Connections that the kernel queues before the router accepts them."""
_HANDSHAKE = 10.0
"""Seconds that a client has for the TLS handshake."""
_SHUTDOWN = 2.0
"""Seconds that a client has to end TLS; a silent client delays a shutdown by as much."""


class Listening:
    """All listening sockets of one router, including those taken over from the previous router.

    port  the number of the port that was bound first
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.port = 0
        self._servers: list[asyncio.Server] = []
        self._by_address: dict[tuple[str, int], list[socket.socket]] = {}
        self._given: Sequence[socket.socket] = ()
        self._inherited: InheritedSockets | None = None
        self._offered: SocketOffer | None = None

    def __repr__(self) -> str:
        return f"<Listening on {', '.join(f'{host}:{port}' for host, port in self._by_address)}>"

    @property
    def succeeded(self) -> bool:
        """Whether another router has taken the sockets over and is running."""
        return self._offered is not None and self._offered.succeeded

    async def take_over(self, host: str, port: int) -> bool:
        """Ask a router that listens at this address for its sockets; return whether one gave them.

        Raises: OSError, when that router does not answer.
        """
        self._inherited = await take_over(self._loop, host, port)
        return self._inherited is not None

    def adopt(self, host: str, port: int, given: GivenPort) -> bool:
        """Take note of an address that other processes serve; return whether another router gave its sockets."""
        self._inherited, self._given = given.inherited, given.sockets
        self._by_address[host, port] = list(given.sockets)
        self.port = int(given.sockets[0].getsockname()[1])
        return given.inherited is not None

    def leave_rest(self) -> None:
        """Close the sockets that were taken over and are not used."""
        if self._inherited is not None:
            self._inherited.close_rest()

    async def bind(
        self,
        frontend: Frontend,
        host: str,
        port: int,
        tls: TLSFiles | None = None,
        passed: Sequence[socket.socket] = (),
    ) -> list[asyncio.Server]:
        """Bind an address; return its servers, which do not accept clients yet: one, or one per socket taken over.

        frontend  what the clients of this port share
        tls       key and certificate; None for plain HTTP
        passed    sockets of this address from systemd; what another router hands over counts more: they are the same

        Raises: OSError, when the address cannot be bound.
        """
        taken = self._inherited.take(host, port) if self._inherited is not None else []
        if taken:
            for sock in passed:
                sock.close()
        taken = taken or list(passed)
        if not taken and host.strip("[]") == "::":
            taken = every_address(port)
        places: list[dict[str, Any]] = [{"sock": sock} for sock in taken]
        alone = {"host": host.strip("[]"), "port": port, "reuse_address": True}
        servers = await servers_on(self._loop, frontend, tls, places or [alone])
        self._servers += servers
        self._by_address[host, port] = [sock for server in servers for sock in server.sockets]
        self.port = self.port or port_of(servers)
        return servers

    def offer(self, ready: Callable[[], Awaitable[object]]) -> None:
        """Let the next router take over all addresses with a fixed port. ready: awaited before that."""
        fds = {place: [sock.fileno() for sock in sockets] for place, sockets in self._by_address.items() if place[1]}
        self._offered = SocketOffer(self._loop, fds, ready)
        self._offered.offer()

    async def stop(self) -> bool:
        """Stop accepting clients; return whether another router accepts them."""
        succeeded = self._offered is not None and await self._offered.settle()
        self.stop_accepting()
        return succeeded

    def stop_accepting(self) -> None:
        """Stop accepting clients; may be called again."""
        for server in self._servers:
            server.close()
        for sock in self._given:
            sock.close()

    async def close(self) -> None:
        """Close all sockets."""
        self.stop_accepting()
        if self._offered is not None:
            await self._offered.close()
        if self._inherited is not None:
            self._inherited.close()


async def servers_on(
    loop: asyncio.AbstractEventLoop, frontend: Frontend, tls: TLSFiles | None, places: Sequence[dict[str, Any]]
) -> list[asyncio.Server]:
    """Return servers that do not accept clients yet, one for each place: arguments of `create_server` that say where.

    Raises: OSError, when an address cannot be bound.
    """
    times: dict[str, Any] = {"ssl_handshake_timeout": _HANDSHAKE, "ssl_shutdown_timeout": _SHUTDOWN}
    servers: list[asyncio.Server] = [
        await loop.create_server(
            lambda: cast("asyncio.Protocol", ClientConnection(frontend)),
            backlog=_BACKLOG,
            start_serving=False,
            ssl=listening_context(tls) if tls is not None else None,
            **(times if tls is not None else {}),  # uvloop supports them on all versions of Python
            **place,
        )
        for place in places
    ]
    for server in servers:
        for sock in server.sockets:
            probe_clients(sock)
    return servers


def every_address(port: int) -> list[socket.socket]:
    """Bind a port on all addresses, those of IPv4 included: one socket for each family that this machine has.

    One socket for both would show clients of IPv4 as ::ffff:10.0.0.9.

    Raises: OSError, when the port is in use in one of the families, or when there is none.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):  # noqa: S104
            try:
                sockets.append(socket.create_server((host, port), family=family))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                missing = error
            else:
                port = sockets[0].getsockname()[1]  # the same for both, if it was 0
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    if not sockets and missing is not None:
        raise missing
    return sockets


def port_of(servers: Sequence[asyncio.Server]) -> int:
    """Return the port that these servers have bound."""
    return int(servers[0].sockets[0].getsockname()[1])


async def open_all(servers: list[asyncio.Server]) -> None:
    """Accept clients from now on.

    Raises: OSError, when another process listens at an address.
    """
    for server in servers:
        await server.start_serving()
    # uvloop raises nothing when another process began to listen there after the bind; its socket is closed then.
    if not all(sock is not None and sock.fileno() >= 0 for server in servers for sock in server.sockets):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


@contextlib.contextmanager
def address_errors(host: str, port: int, option: str) -> Iterator[None]:
    """Turn an OSError about an address into a ConfigError that names the option."""
    try:
        yield
    except OSError as exc:
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(f"{place} is in use; choose another {option}") from None
        why = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror or exc
        raise ConfigError(
            f"cannot listen on {place}: {why}; see {option.replace('port', 'host')} and {option}"
        ) from None
