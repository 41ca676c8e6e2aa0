"""The pool of connections to workers, by target: it opens them, keeps idle ones, and closes those that idle too long.

    pool.send(target, sink, head, body)
         |  an idle connection?  -> UpstreamConnection.send            (no await, no task)
         |  none                  -> Opening: a task that connects, then sink.connected(connection), then send

    pool.know(target)        keep idle connections to this target from now on
    pool.forget(target)      close idle ones now, busy ones after their answer

Requests may also be sent to a target that is not known (a worker that was just removed, a webhook): such a connection
closes after its answer.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import deque
from typing import cast

from sglang_router.access.tls import TLSFiles, worker_files
from sglang_router.relay.batch import Batch
from sglang_router.relay.origin import Origin, origin_of
from sglang_router.relay.upstream import Opening, Sink, UpstreamConnection, unreachable
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class TargetConnections:
    """The connections to one target. It implements `relay.upstream.ConnectionHome` for them.

    idle    connections that can be used at once; the one used last is at the right
    known   idle connections are kept
    origin  where the target listens, and the start of each request head to it
    """

    __slots__ = ("_pool", "idle", "known", "origin", "target")

    def __init__(self, pool: ConnectionPool, target: Target, known: bool) -> None:
        self._pool = pool
        self.target = target
        self.origin = origin_of(target.url, target.rank)
        self.known = known
        self.idle: deque[UpstreamConnection] = deque()

    def send(self, sink: Sink, head: bytes, body: bytes, fresh: bool = False) -> UpstreamConnection | Opening:
        """Send a request on an idle connection, or on a new one (`fresh`: on a new one in any case)."""
        idle = self.idle
        while idle and not fresh:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.send(sink, head, body)
                return connection
        return self._pool.open_for(self, Opening(sink, head, body))

    def opened(self) -> None:
        """Count a new connection."""
        self._pool.open += 1

    def release(self, connection: UpstreamConnection) -> None:
        """Keep a connection as idle, or close it when the target is not known or has enough of them."""
        if not self.known or len(self.idle) >= self._pool.max_idle:
            connection.transport.close()
            return
        connection.idle_since = self._pool.now()
        self.idle.append(connection)

    def discard(self, connection: UpstreamConnection) -> None:
        """Remove a connection from the idle ones; do nothing when it is busy."""
        if connection.idle_since and connection in self.idle:
            self.idle.remove(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        """Stop counting a connection that is closed, and forget it."""
        self._pool.open -= 1
        self.discard(connection)

    def trim(self, before: float) -> None:
        """Close the connections that became idle before that moment. The oldest are at the left."""
        while self.idle and self.idle[0].idle_since < before:
            self.idle.popleft().transport.close()

    def forget(self) -> None:
        """Close the idle connections and keep no more."""
        self.known = False
        while self.idle:
            self.idle.pop().transport.close()

    def __repr__(self) -> str:
        return f"<TargetConnections {self.target.name or self.target.url} {len(self.idle)} idle>"


class ConnectionPool:
    """All connections to all targets.

    batch            gathers writes; see `relay.batch`
    connect_timeout  seconds to open one connection: the look-up of the name, TCP and TLS together
    idle_timeout     seconds after which `trim` closes an idle connection
    max_idle         most idle connections kept per target
    tls              how https targets are verified, and the certificate shown to them; None: the system's
                     authorities, and no certificate
    open             connections that exist now, idle or busy
    known            the connections to each known target
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: Batch,
        *,
        connect_timeout: float,
        idle_timeout: float,
        max_idle: int,
        tls: TLSFiles | None,
    ) -> None:
        self.batch = batch
        self.max_idle = max_idle
        self.now = loop.time
        self.open = 0
        self._loop = loop
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._tls = tls
        self.known: dict[Target, TargetConnections] = {}
        self._opening: set[asyncio.Task[None]] = set()

    # -- targets -------------------------------------------------------------------------------------------------------

    def know(self, target: Target) -> None:
        """Keep idle connections to a target from now on."""
        if target not in self.known:
            self.known[target] = TargetConnections(self, target, known=True)

    def move(self, old: Target, new: Target) -> None:
        """Rename a target, as when a worker's key changes; URL and rank are the same.

        Its connections stay: a key belongs to a request, not to a connection.
        """
        connections = self.known.pop(old, None)
        if connections is not None:
            connections.target = new
            self.known[new] = connections

    def forget(self, target: Target) -> None:
        """Close the idle connections to a target; busy ones close after their answer."""
        connections = self.known.pop(target, None)
        if connections is not None:
            connections.forget()

    def at(self, target: Target) -> TargetConnections:
        """Return the connections to a target; those to a target that is not known are not kept after use."""
        return self.known.get(target) or TargetConnections(self, target, known=False)

    def origin(self, target: Target) -> Origin:
        """Return where a target listens."""
        return self.at(target).origin

    # -- requests ------------------------------------------------------------------------------------------------------

    def send(
        self, target: Target, sink: Sink, head: bytes, body: bytes, *, fresh: bool = False
    ) -> UpstreamConnection | Opening:
        """Send a request on an idle connection, or on a new one (`fresh`: on a new one in any case)."""
        return self.at(target).send(sink, head, body, fresh)

    def open_for(self, connections: TargetConnections, opening: Opening) -> Opening:
        """Start to open a connection for a request."""
        opening.task = task = self._loop.create_task(self._open(connections, opening))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return opening

    async def _open(self, connections: TargetConnections, opening: Opening) -> None:
        """Open a connection and send the request on it; tell the sink if that fails."""
        try:
            connection = await asyncio.wait_for(self._connect(connections), self._connect_timeout)
        except (TimeoutError, asyncio.TimeoutError):
            opening.failed(Outcome.UNCONNECTED, f"No connection to the worker within {self._connect_timeout:g} s.")
        except ConnectionRefusedError:
            opening.failed(Outcome.REFUSED, "The worker refuses connections.")
        except (OSError, UnicodeError) as exc:
            if isinstance(exc, OSError) and exc.errno in _NO_DESCRIPTORS:
                opening.failed(Outcome.STARVED, "The router has no descriptor left; raise its limit (ulimit -n).")
            else:
                opening.failed(Outcome.UNREACHABLE, unreachable(exc, connections.origin.secure))
        else:
            _begin(connection, opening)

    async def _connect(self, connections: TargetConnections) -> UpstreamConnection:
        """Try the addresses of a target in turn.

        A name is looked up here and not by `create_connection`: uvloop's own look-up continues after the timeout, and
        then logs its failure as unhandled.

        Raises: OSError, that of the last address.
        """
        origin = connections.origin
        addresses = [origin.host]
        if origin.is_name:
            found = await self._loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        for address in addresses[:-1]:
            try:
                return await self._connect_to(address, connections)
            except OSError:
                continue
        return await self._connect_to(addresses[-1], connections)

    async def _connect_to(self, address: str, connections: TargetConnections) -> UpstreamConnection:
        origin = connections.origin
        _, protocol = await self._loop.create_connection(
            lambda: cast("asyncio.Protocol", UpstreamConnection(connections, self.batch)),
            address,
            origin.port,
            ssl=self._context() if origin.secure else None,
            server_hostname=origin.host if origin.secure else None,
        )
        return cast("UpstreamConnection", protocol)

    def _context(self) -> ssl.SSLContext:
        """Return the TLS context for a new connection.

        The system's authorities take 33 ms to load, so they are loaded for the first https target.
        """
        if self._tls is None:
            self._tls = worker_files()
        return self._tls.context

    # -- upkeep --------------------------------------------------------------------------------------------------------

    def trim(self) -> None:
        """Close connections that were idle for `idle_timeout`."""
        before = self._loop.time() - self._idle_timeout
        for connections in self.known.values():
            connections.trim(before)

    async def close(self) -> None:
        """Close all idle connections, cancel those that are being opened, keep no more."""
        for target in list(self.known):
            self.forget(target)
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    def __repr__(self) -> str:
        idle = sum(len(connections.idle) for connections in self.known.values())
        return (
            f"<ConnectionPool {self.open} open, {idle} idle, {len(self._opening)} opening, {len(self.known)} targets>"
        )


def _begin(connection: UpstreamConnection, opening: Opening) -> None:
    """Send the request on its new connection."""
    sink = opening.sink
    if opening.given_up:  # the connection was complete before its task was cancelled
        connection.transport.abort()
    elif connection.transport.is_closing():  # the worker closed it, or sent bytes, before this task ran again
        sink.broken(*connection.ended_unused("The worker closed the connection, or spoke, before it was asked."))
    else:
        sink.connected(connection)
        connection.send(sink, opening.head, opening.body)
