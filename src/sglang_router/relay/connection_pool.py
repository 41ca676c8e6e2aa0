"""The pool of connections to workers, by target: it opens them, keeps idle ones, and closes those that idle too long.

    pool.send(target, sink, head, body)
         |  an idle connection?  -> UpstreamConnection.send            (no await, no task)
         |  none                  -> Opening: a task that connects, then sink.connected(connection), then send

    pool.know(target)        keep idle connections to this target from now on
    pool.forget(target)      close idle ones now, busy ones after their answer

    a name       `relay.addresses` knows its addresses; they are tried in turn
    it moved     connections to addresses that are gone: idle ones close now, busy ones after their answer
    age          the same for connections that reached `max_age`, so that none outlives what a name or a load balancer
                 in between says by more

Requests may also be sent to a target that is not known (a worker that was just removed, a webhook): such a connection
closes after its answer.
"""

from __future__ import annotations

import asyncio
import errno
import math
import ssl
from collections import deque
from typing import Final, cast

from sglang_router.access.tls import TLSFiles, worker_files
from sglang_router.relay.addresses import Addresses
from sglang_router.relay.batch import Batch
from sglang_router.relay.keepalive import probe_worker
from sglang_router.relay.origin import Origin, origin_of
from sglang_router.relay.upstream import Opening, Sink, UpstreamConnection, unreachable
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.wire.gathering import Body
from sglang_router.wire.splice import Spliced

_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
_ADDRESS_TIMEOUT: Final = 2.0
"""Most seconds for one address of a name while there are others to try."""


class TargetConnections:
    """The connections to one target. It implements `relay.upstream.ConnectionHome` for them.

    idle    connections that can be used at once; the one used last is at the right
    known   idle connections are kept
    live    all connections, idle or busy
    origin  where the target listens, and the start of each request head to it
    """

    __slots__ = ("_pool", "_retire_next", "idle", "known", "live", "origin", "target")

    def __init__(self, pool: ConnectionPool, target: Target, known: bool) -> None:
        self._pool = pool
        self.target = target
        self.origin = origin_of(target.url, target.rank)
        self.known = known
        self.idle: deque[UpstreamConnection] = deque()
        self.live: set[UpstreamConnection] = set()
        self._retire_next = math.inf  # the first moment at which one of them reaches its age

    def send(self, sink: Sink, head: bytes, body: Body | Spliced, fresh: bool = False) -> UpstreamConnection | Opening:
        """Send a request on an idle connection, or on a new one (`fresh`: on a new one in any case)."""
        idle = self.idle
        if fresh and len(idle) > 1:
            # It takes the place of the one used longest ago: the checks of a worker that starts would only add some.
            idle.popleft().transport.close()
        while idle and not fresh:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.sent_at = self._pool.now()
                connection.send(sink, head, body)
                return connection
        return self._pool.open_for(self, Opening(sink, head, body))

    def now(self) -> float:
        """Return the time, in seconds of the loop's clock."""
        return self._pool.now()

    def opened(self, connection: UpstreamConnection) -> None:
        """Count a new connection."""
        self._pool.open += 1
        self.live.add(connection)
        self._retire_next = min(self._retire_next, connection.retire_at)

    def release(self, connection: UpstreamConnection) -> None:
        """Keep a connection as idle; close it when it is old, or the target is not known or has enough of them."""
        now = self._pool.now()
        if not self.known or len(self.idle) >= self._pool.max_idle or now >= connection.retire_at:
            connection.transport.close()
            return
        connection.idle_since = now
        self.idle.append(connection)

    def discard(self, connection: UpstreamConnection) -> None:
        """Remove a connection from the idle ones; do nothing when it is busy."""
        if connection.idle_since and connection in self.idle:
            self.idle.remove(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        """Stop counting a connection that is closed, and forget it."""
        self._pool.open -= 1
        self.live.discard(connection)
        self.discard(connection)

    def trim(self, before: float, now: float) -> None:
        """Close the connections that became idle before that moment, and idle ones that are old."""
        while self.idle and self.idle[0].idle_since < before:  # the oldest are at the left
            self.idle.popleft().transport.close()
        if now >= self._retire_next:
            self._close_old(now)

    def leave(self, gone: frozenset[str]) -> None:
        """Use connections to these addresses no more: idle ones close now, busy ones after their answer."""
        for connection in self.live:
            if connection.address in gone:
                connection.retire_at = 0.0
        self._close_old(0.0)

    def _close_old(self, now: float) -> None:
        old = [connection for connection in self.idle if now >= connection.retire_at]
        for connection in old:
            self.idle.remove(connection)
            connection.transport.close()
        ahead = (connection.retire_at for connection in self.live if connection.retire_at > now)
        self._retire_next = min(ahead, default=math.inf)

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
    max_age          seconds after which a connection is not used again
    addresses        knows the addresses of names
    tls              how https targets are verified, and the certificate shown to them; None: the system's
                     authorities, and no certificate
    open             connections that exist now, idle or busy
    known            the connections to each known target
    mark             what requests to targets carry in Via; b"" for targets that cannot send requests back
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
        max_age: float = math.inf,
        addresses: Addresses | None = None,
    ) -> None:
        self.addresses = addresses or Addresses(loop)
        self.addresses.on_moved = self._moved
        self.batch = batch
        self.max_idle = max_idle
        self.now = loop.time
        self.open = 0
        self._closed = False
        self.mark = b""
        self._loop = loop
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._max_age = max_age
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

    def refresh(self, target: Target) -> None:
        """Look the name of a target up again, beside everything else, if its addresses are old."""
        origin = self.origin(target)
        if origin.is_name:
            self.addresses.refresh(origin.host)

    # -- requests ------------------------------------------------------------------------------------------------------

    def send(
        self, target: Target, sink: Sink, head: bytes, body: Body, *, fresh: bool = False
    ) -> UpstreamConnection | Opening:
        """Send a request on an idle connection, or on a new one (`fresh`: on a new one in any case)."""
        return self.at(target).send(sink, head, body, fresh)

    def open_for(self, connections: TargetConnections, opening: Opening) -> Opening:
        """Start to open a connection for a request; once the pool is closed, none is opened any more."""
        if self._closed:
            self._loop.call_soon(opening.failed, Outcome.UNREACHABLE, "The router ends.")
            return opening
        opening.task = task = self._loop.create_task(self._open(connections, opening))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return opening

    async def _open(self, connections: TargetConnections, opening: Opening) -> None:
        """Open a connection and send the request on it; tell the sink if that fails."""
        origin = connections.origin
        try:
            connection = await asyncio.wait_for(self._connect(connections), self._connect_timeout)
        except (TimeoutError, asyncio.TimeoutError):
            failure = Outcome.UNCONNECTED, self.late(connections.target, self._connect_timeout)
        except ConnectionRefusedError:
            failure = Outcome.REFUSED, "The worker refuses connections."
        except (OSError, UnicodeError) as exc:
            if isinstance(exc, OSError) and exc.errno in _NO_DESCRIPTORS:
                failure = Outcome.STARVED, "The router has no descriptor left; raise its limit (ulimit -n)."
            else:
                failure = Outcome.UNREACHABLE, unreachable(exc, origin.secure)
        else:
            _begin(connection, opening)
            return
        if origin.is_name and failure[0] is not Outcome.STARVED:
            self.addresses.doubted(origin.host)
        opening.failed(*failure)

    def late(self, target: Target, seconds: float) -> str:
        """Return in words why there is no connection to a target after so many seconds."""
        origin = self.origin(target)
        if origin.is_name and not self.addresses.known(origin.host):
            return f"The look-up of the worker's name takes longer than {seconds:g} s."
        return f"No connection to the worker within {seconds:g} s."

    async def _connect(self, connections: TargetConnections) -> UpstreamConnection:
        """Connect to an address of a target: the one that worked last, else the next ones.

        Raises: OSError: that of the last address, unless another one refused the connection.
        """
        origin = connections.origin
        if not origin.is_name:
            return await self._connect_to(origin.host, connections)
        until = self._loop.time() + self._connect_timeout
        addresses = await self.addresses.of(origin.host)
        refused: ConnectionRefusedError | None = None
        for number, address in enumerate(addresses, 1):
            others = len(addresses) - number
            limit = min(_ADDRESS_TIMEOUT, (until - self._loop.time()) / (others + 1)) if others else None
            try:
                connection = await asyncio.wait_for(self._connect_to(address, connections), limit)
            except ConnectionRefusedError as exc:
                refused = exc
            except (OSError, asyncio.TimeoutError):
                if not others and refused is None:
                    raise
            else:
                if not self.addresses.worked(origin.host, address):
                    connection.retire_at = 0.0  # the name moved meanwhile: for one request only
                return connection
        assert refused is not None
        raise refused

    async def _connect_to(self, address: str, connections: TargetConnections) -> UpstreamConnection:
        origin = connections.origin
        # A part of them comes earlier, so that those that were opened together are not closed together.
        retire_at = self._loop.time() + self._max_age * self.addresses.rng.uniform(0.8, 1.0)
        _, protocol = await self._loop.create_connection(
            lambda: cast("asyncio.Protocol", UpstreamConnection(connections, self.batch, address, retire_at)),
            address,
            origin.port,
            ssl=self._context() if origin.secure else None,
            server_hostname=origin.host if origin.secure else None,
        )
        connection = cast("UpstreamConnection", protocol)
        probe_worker(connection.transport.get_extra_info("socket"))
        return connection

    def _context(self) -> ssl.SSLContext:
        """Return the TLS context for a new connection.

        The system's authorities take 33 ms to load, so they are loaded for the first https target.
        """
        if self._tls is None:
            self._tls = worker_files()
        return self._tls.context

    # -- upkeep --------------------------------------------------------------------------------------------------------

    def trim(self) -> None:
        """Close connections that were idle for `idle_timeout`, and idle ones that are `max_age` old."""
        now = self._loop.time()
        for connections in self.known.values():
            connections.trim(now - self._idle_timeout, now)
        self.addresses.tidy()

    def _moved(self, host: str, gone: frozenset[str]) -> None:
        """Leave the addresses that a name no longer has."""
        for connections in self.known.values():
            if connections.origin.host == host:
                connections.leave(gone)

    async def close(self) -> None:
        """Close all idle connections, cancel those that are being opened, keep and open no more."""
        self._closed = True
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
