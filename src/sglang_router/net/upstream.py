"""Connections to workers: opening, pooling, sending a leg, and walking along its answer.

    Upstream.send(worker, sink, head, body)
         |  idle connection?  -> Connection.send            (no await, no task)
         |  none              -> Opening: a task that connects, then Connection.send
         v
    Connection.data_received -> wire.response: head, framing -> sink.begin(...), sink.data(..., done)
                                                                 sink.broken(outcome, detail)

A Sink is whoever reads the answer: `net.relay.Relay` hands the bytes on, `net.fetch` gathers them for the control plane
and the health checks. Nothing is awaited and nothing is created per chunk.

A connection goes back to the pool only after a whole, well-framed answer to a wholly sent request, with no byte
behind it. One that dies unused before any byte of an answer was merely stale (engines close idle connections after 5
s, or after a streamed reply without saying so): the leg is sent again on a fresh one, and nobody is blamed.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

import msgspec

from sglang_router.core.worker import Outcome
from sglang_router.errors import WorkerInvalid
from sglang_router.net.tls import MAY_WANT_CERTIFICATE, TLSFiles, explain, worker_files
from sglang_router.net.turn import Turn
from sglang_router.wire.response import Framing, ResponseHead, framing_of, parse_head

if TYPE_CHECKING:
    from sglang_router.core.worker import Worker

_ADDRESS = re.compile(r"[0-9.]+|[0-9a-f.]*:[0-9a-f:.]*")
_STARVED = (errno.EMFILE, errno.ENFILE)
_COPY_BELOW = 65536
"""Bytes of a body that are cheaper to join with the head than to send in a second write."""
_MOST_INTERIM = 8
"""Interim responses (1xx) a worker may send before its answer."""


class Sink(Protocol):
    """Whoever reads an answer. `decoding`: it wants the content without the chunked coding."""

    decoding: bool

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        """The head came, with the part of the body that came along; `done` when that was all."""

    def data(self, data: bytes, done: bool) -> None:
        """More of the body."""

    def broken(self, outcome: Outcome, detail: str) -> None:
        """There will be no more."""

    def sent_on(self, connection: Connection) -> None:
        """The connection that was being opened is there and carries the leg."""


class Origin(msgspec.Struct, frozen=True):
    """Where a worker listens, and the start of each request to it. `fields` stand in the head of all of them."""

    host: str
    named: bool  # the host is a name, not an address
    port: int
    secure: bool
    prefix: bytes
    fields: bytes
    starts: dict[bytes, bytes]

    def start(self, method: bytes, target: bytes) -> bytes:
        """Request line and `fields`; kept for targets without a query, of which there are few."""
        key = method + target
        start = self.starts.get(key)
        if start is None:
            start = b"%s %s%s HTTP/1.1\r\n%s" % (method, self.prefix, target, self.fields)
            if b"?" not in target and len(self.starts) < 256:
                self.starts[key] = start
        return start


def origin_of(url: str, rank: int | None = None) -> Origin:
    """Splits a worker's base URL, which `config.parse_worker_url` has checked.

    vLLM is told the data-parallel rank in a header, SGLang there or in the body (`core.request.with_rank`).
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    prefix = parts.path.rstrip("/").encode()
    fields = b"host: %s\r\n" % parts.netloc.encode()
    if rank is not None:
        fields += b"x-data-parallel-rank: %d\r\n" % rank
    host = parts.hostname or ""
    named = _ADDRESS.fullmatch(host) is None
    return Origin(host, named, port, secure, prefix, fields, {})


class Connection(asyncio.Protocol):
    """One connection to one worker; idle, or busy with one leg."""

    __slots__ = (
        "_buffer",
        "_framing",
        "_interim",
        "_reusable",
        "_sink",
        "_upstream",
        "idle_since",
        "loss",
        "transport",
        "used",
        "worker",
    )

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream, worker: Worker) -> None:
        # of the connection
        self._upstream = upstream
        self.worker = worker
        self.used = False  # it has carried a whole exchange before
        self.idle_since = 0.0
        self.loss: Exception | None = None  # why it was lost, if not in order
        # of the leg
        self._sink: Sink | None = None
        self._framing: Framing | None = None
        self._buffer = b""
        self._interim = 0
        self._reusable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._upstream.open += 1

    def send(self, sink: Sink, head: bytes, body: bytes) -> None:
        """Sends a leg; its answer goes to `sink`."""
        self._sink = sink
        self._framing = None
        self._interim = 0
        self.idle_since = 0.0
        if len(body) < _COPY_BELOW:
            self._upstream.turn.write(self.transport, head + body)
        else:
            self._upstream.turn.write(self.transport, head)
            self._upstream.turn.write(self.transport, body)

    def abort(self) -> None:
        """Gives the leg up: the worker sees the connection close, the sink hears nothing more."""
        self._sink = None
        self.transport.abort()

    def pause(self) -> None:
        self.transport.pause_reading()

    def resume(self) -> None:
        self.transport.resume_reading()

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        sink, framing = self._sink, self._framing
        if sink is None:
            self._upstream.discard(self)  # bytes nobody asked for: out of step
            self.transport.abort()
            return
        try:
            if framing is None:
                self._begin(data)
                return
            if sink.decoding:
                payload: list[bytes] = []
                end = framing.feed(data, payload)
                sent = b"".join(payload)
            else:
                end = framing.feed(data)
                sent = data if end < 0 else data[:end]
        except WorkerInvalid as exc:
            self._fail(Outcome.INVALID if framing is None else Outcome.CUT, str(exc))
            return
        if end < 0:
            sink.data(sent, False)
        else:
            self._finish(end == len(data))
            sink.data(sent, True)

    def _begin(self, data: bytes) -> None:
        seen = len(self._buffer)
        if seen:
            data = self._buffer + data
            self._buffer = b""
        head = parse_head(data, seen)
        while head is not None and head.status < 200:
            self._interim += 1
            if self._interim > _MOST_INTERIM:
                raise WorkerInvalid("The worker sends interim responses without end.")
            data = data[head.end :]
            head = parse_head(data)
        if head is None:
            self._buffer = data
            return
        sink = self._sink
        assert sink is not None
        framing = framing_of(head)
        rest = data[head.end :]
        if sink.decoding:
            payload: list[bytes] = []
            end = framing.feed(rest, payload)
            sent = b"".join(payload)
        else:
            end = framing.feed(rest)
            sent = rest if end < 0 else rest[:end]
        self._framing = framing
        self._reusable = head.keep_alive
        if end >= 0:
            self._finish(end == len(rest))
        sink.begin(head, framing, sent, end >= 0)

    def _finish(self, exact: bool) -> None:
        """The answer is whole: back into the pool before the sink goes on, which may need a connection at once."""
        self._sink = None
        self._framing = None
        self.used = True
        if exact and self._reusable and not self.transport.get_write_buffer_size():
            self._upstream.release(self)
        else:
            self.transport.close()

    def _fail(self, outcome: Outcome, detail: str) -> None:
        sink = self._sink
        self.abort()
        if sink is not None:
            sink.broken(outcome, detail)

    def connection_lost(self, exc: Exception | None) -> None:
        sink, framing = self._sink, self._framing
        self._sink = self._framing = None
        self.loss = exc
        self._upstream.open -= 1
        if sink is None:
            self._upstream.discard(self)
        elif framing is not None:
            if framing.ends_at_close and exc is None:
                sink.data(b"", True)
            else:
                sink.broken(Outcome.CUT, "The worker broke off in the middle of its answer.")
        elif self._buffer or self._interim:
            sink.broken(Outcome.BROKEN, "The worker closed the connection without an answer.")
        elif not self.used:
            sink.broken(*self.ended_unused("The worker closed the connection without an answer."))
        else:
            sink.broken(Outcome.STALE, "A kept connection had been closed by the worker.")

    def ended_unused(self, said: str) -> tuple[Outcome, str]:
        """Why a new connection is gone already. As of TLS 1.3, certificates are refused as late as that."""
        if isinstance(self.loss, ssl.SSLError):
            return Outcome.UNREACHABLE, _unreachable(self.loss, True)
        secure = self.transport.get_extra_info("ssl_object") is not None
        return Outcome.BROKEN, said + (f" It {MAY_WANT_CERTIFICATE}." if secure else "")


def _unreachable(error: Exception, secure: bool) -> str:
    """What went wrong on the way to a worker, for people."""
    why = explain(error) if secure and isinstance(error, OSError) else ""
    if not why and isinstance(error, OSError) and error.strerror:
        why = error.strerror
    return f"The worker could not be reached: {why or error.__class__.__name__}."


class Opening:
    """A connection that is being made for a leg; can be given up like one that is there."""

    __slots__ = ("given_up", "task")

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.given_up = False

    def abort(self) -> None:
        self.given_up = True
        self.task.cancel()

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Upstream:
    """All connections to all workers.

    Times in seconds; `max_idle` connections are kept per worker. `tls`: what https workers are verified by and shown,
    by default the system's authorities and nothing.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        connect_timeout: float = 10.0,
        idle_timeout: float = 50.0,
        max_idle: int = 512,
        tls: TLSFiles | None = None,
    ) -> None:
        self.turn = Turn(loop)
        self.open = 0  # connections there are, idle or busy
        self._loop = loop
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._max_idle = max_idle
        self._tls = tls
        self._idle: dict[Worker, deque[Connection]] = {}
        self._origins: dict[Worker, Origin] = {}
        self._opening: set[asyncio.Task[None]] = set()

    def origin(self, worker: Worker) -> Origin:
        origin = self._origins.get(worker)
        if origin is None:
            origin = self._origins[worker] = origin_of(worker.spec.url, worker.dp_rank)
        return origin

    def _context(self) -> ssl.SSLContext:
        """Of new connections. The system's authorities take 33 ms to load, so only the first https worker does it."""
        if self._tls is None:
            self._tls = worker_files()
        return self._tls.context

    def send(
        self, worker: Worker, sink: Sink, head: bytes, body: bytes, *, fresh: bool = False
    ) -> Connection | Opening:
        """Sends a leg on an idle connection, or on a new one (`fresh`: on a new one in any case)."""
        idle = self._idle.get(worker)
        while idle and not fresh:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.send(sink, head, body)
                return connection
        opening = Opening()
        opening.task = self._loop.create_task(self._open(worker, sink, head, body, opening))
        self._opening.add(opening.task)
        opening.task.add_done_callback(self._opening.discard)
        return opening

    async def _connect(self, worker: Worker, origin: Origin) -> Connection:
        """Tries the addresses of a worker in turn. A name is looked up here, because uvloop's own look-up goes on when
        its time is up, and then complains that nobody heard of its failure.

        Raises: OSError, that of the last address.
        """
        addresses = [origin.host]
        if origin.named:
            found = await self._loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        for address in addresses:
            try:
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self, worker),
                    address,
                    origin.port,
                    ssl=self._context() if origin.secure else None,
                    server_hostname=origin.host if origin.secure else None,
                )
                break
            except OSError:
                if address == addresses[-1]:
                    raise
        return connection

    async def _open(self, worker: Worker, sink: Sink, head: bytes, body: bytes, opening: Opening) -> None:
        origin = self.origin(worker)
        try:
            connection = await asyncio.wait_for(self._connect(worker, origin), self._connect_timeout)
        except (TimeoutError, asyncio.TimeoutError):
            sink.broken(Outcome.UNCONNECTED, f"No connection to the worker within {self._connect_timeout:g} s.")
            return
        except ConnectionRefusedError:
            sink.broken(Outcome.REFUSED, "The worker refuses connections.")
            return
        except (OSError, UnicodeError) as exc:
            if isinstance(exc, OSError) and exc.errno in _STARVED:
                sink.broken(Outcome.STARVED, "The router has no descriptor left; raise its limit (ulimit -n).")
                return
            sink.broken(Outcome.UNREACHABLE, _unreachable(exc, origin.secure))
            return
        if opening.given_up:  # the cancellation came too late to stop the connection
            connection.transport.abort()
            return
        if connection.transport.is_closing():  # closed, or out of step, while this task waited for its turn
            sink.broken(*connection.ended_unused("The worker closed the connection, or spoke, before it was asked."))
            return
        sink.sent_on(connection)
        connection.send(sink, head, body)

    def release(self, connection: Connection) -> None:
        """Takes a connection back that is ready for another leg."""
        idle = self._idle.get(connection.worker)
        if idle is None:
            if connection.worker.removed:
                connection.transport.close()
                return
            idle = self._idle[connection.worker] = deque()
        if len(idle) >= self._max_idle:
            connection.transport.close()
            return
        connection.idle_since = self._loop.time()
        idle.append(connection)

    def discard(self, connection: Connection) -> None:
        """Forgets an idle connection that is gone."""
        idle = self._idle.get(connection.worker)
        if connection.idle_since and idle and connection in idle:
            idle.remove(connection)

    def forget(self, worker: Worker) -> None:
        """Closes the idle connections to a worker that was removed."""
        for connection in self._idle.pop(worker, ()):
            connection.transport.close()
        self._origins.pop(worker, None)

    def trim(self) -> None:
        """Closes connections that were idle for too long; the oldest stand at the left."""
        before = self._loop.time() - self._idle_timeout
        for idle in self._idle.values():
            while idle and idle[0].idle_since < before:
                idle.popleft().transport.close()

    async def close(self) -> None:
        """Closes everything; legs under way are cut."""
        for worker in list(self._idle):
            self.forget(worker)
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
