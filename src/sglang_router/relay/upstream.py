"""One connection to a worker: send a request, and parse its answer to find where it ends.

    UpstreamConnection.send(sink, head, body)
    UpstreamConnection.data_received -> wire.response: head, framing -> sink.begin(...)      once
                                     -> framing.feed                 -> sink.data(...)       for each read
                                                                        sink.broken(...)     in place of the rest

A large body is written slice by slice, each when the socket has taken the one before. The answer may begin meanwhile.
If it ends before the body is sent, the rest is not sent and the connection closes. A sink receives the answer: a leg,
or `workers.fetch`. Nothing is awaited and no object is created per read.

After a complete, well-framed answer to a completely sent request, with no byte after it, the connection is released to
the pool (`relay.connection_pool`). A kept connection that closes just after a request, and before the first byte of an
answer, was stale: engines close idle connections after 5 s, or after a stream without a word; some send a 408 first.
The sink hears STALE and sends the request again on a new connection. One that closes later broke.

The classes have the methods that uvloop calls, but not the base class `asyncio.Protocol`, which is not compiled.
"""

from __future__ import annotations

import asyncio
import errno
import math
import ssl
from typing import Final, Protocol, cast

from sglang_router.access.tls import MAY_WANT_CERTIFICATE, explain
from sglang_router.errors import WorkerInvalid
from sglang_router.relay.batch import Batch
from sglang_router.relay.full_read import FULL
from sglang_router.relay.outgoing import SLICE, Outgoing
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.wire.framing import Framing, Sized
from sglang_router.wire.gathering import Body
from sglang_router.wire.response import ResponseHead, framing_of, parse_head
from sglang_router.wire.splice import Spliced

_JOIN_BELOW: Final = 65536
"""Bytes of a body below which joining it with the head is cheaper than a second write."""
_VANISHED: Final = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
"""Errors of a connection whose other end is gone without a word (`relay.keepalive`); it was not closed for idling."""
STALE_WITHIN: Final = 1.0
"""Seconds after a request within which the end of an idle connection, which crossed it, arrives."""
_MAX_INTERIM: Final = 8
"""Interim responses (1xx) that a worker may send before its answer."""


class Sink(Protocol):
    """Receives an answer. decoding: it takes the content without the chunked coding; bodyless: it answers HEAD."""

    decoding: bool

    @property
    def bodyless(self) -> bool: ...

    def connected(self, connection: UpstreamConnection) -> None:
        """Take the new connection that was opened for this request, and is about to send it."""

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        """Take the head, with the first bytes of the body; `done`: these are all."""

    def data(self, data: bytes, done: bool) -> None:
        """Take more bytes of the body; `done`: they are the last."""

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Take the end without a complete answer; `detail` says why, for people."""


class ConnectionHome(Protocol):
    """Keeps the connections to one target; see `relay.connection_pool`."""

    target: Target

    def now(self) -> float:
        """Return the time, in seconds of the loop's clock."""

    def opened(self, connection: UpstreamConnection) -> None:
        """Count a new connection."""

    def release(self, connection: UpstreamConnection) -> None:
        """Take back a connection that can carry another request."""

    def discard(self, connection: UpstreamConnection) -> None:
        """Forget an idle connection that cannot carry another request."""

    def lost(self, connection: UpstreamConnection) -> None:
        """Stop counting a connection that is closed, and forget it."""


class UpstreamConnection:
    """One connection to one target: idle, or busy with one request.

    address     of the worker's machine, as it was looked up
    used        it has carried a complete request and answer
    idle_since  seconds of the loop's clock; 0.0 while it is busy
    sent_at     when it was used again for a request; seconds of the same clock
    retire_at   from when on it is not used again; seconds of the same clock
    switches    its one request asks for another protocol
    """

    __slots__ = (
        *("_batch", "_buffer", "_framing", "_full", "_home", "_interim", "_life", "_loss", "_paused", "_rest"),
        *("_reusable", "_sink", "address", "idle_since", "retire_at", "sent_at", "switches", "transport", "used"),
    )

    transport: asyncio.Transport

    def __init__(self, home: ConnectionHome, batch: Batch, address: str = "", retire_at: float = math.inf) -> None:
        # per connection
        self.address = address
        self.retire_at = retire_at
        self._home = home
        self._batch = batch
        self._life = "connecting"
        self._loss: Exception | None = None  # the error that closed it
        self.used = self.switches = False
        self.idle_since = 0.0
        self.sent_at = 0.0
        self._full = False  # the socket takes no more bytes now
        self._paused = False  # the sink takes no more bytes now
        # per request
        self._sink: Sink | None = None
        self._rest: Outgoing | None = None  # of a large body, what is not written yet
        self._framing: Framing | None = None
        self._buffer = b""  # an answer's head that is not complete yet
        self._interim = 0
        self._reusable = False

    @property
    def state(self) -> str:
        """One of connecting, open, idle, sent, answering, closed."""
        if self._life != "open":
            return self._life
        if self._sink is None:
            return "idle" if self.idle_since else "open"
        return "sent" if self._framing is None else "answering"

    def __repr__(self) -> str:
        return f"<UpstreamConnection {self._home.target.name or self._home.target.url} {self.state}>"

    def send(self, sink: Sink, head: bytes, body: Body | Spliced) -> None:
        """Send a request. Its answer goes to `sink`."""
        self._sink = sink
        self._framing = None
        self._interim = 0
        self.idle_since = 0.0
        if type(body) is bytes and len(body) < _JOIN_BELOW:  # the usual case
            self._batch.write(self.transport, head + body)
        elif isinstance(body, Spliced) or len(body) > SLICE:
            self._batch.write(self.transport, head)
            self._rest = Outgoing(body)
            self._batch.bulk.add(self._write_on)
        else:
            self._batch.write(self.transport, head)
            self._batch.write(self.transport, body)

    def _write_on(self) -> bool:
        """Write the next slice of a large body; return whether another one can follow."""
        rest = self._rest
        if rest is None or self._full or self.transport.is_closing():
            return False
        self._batch.write(self.transport, rest.next())
        if rest.done:
            self._rest = None
        return self._rest is not None and not self._full

    def abort(self) -> None:
        """Give the request up: the worker sees the connection close, the sink hears nothing more."""
        self._sink = self._rest = None
        self.transport.abort()

    def pause(self) -> None:
        """Stop reading the answer."""
        self._paused = True
        self.transport.pause_reading()

    def resume(self) -> None:
        """Go on reading the answer."""
        self._paused = False
        self.transport.resume_reading()

    def _read_on(self) -> bool:
        """Read again after a full read, unless the sink takes no more bytes; return False."""
        if not self._paused:
            self.transport.resume_reading()
        return False

    # -- called by the event loop --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection."""
        self.transport = cast("asyncio.Transport", transport)
        self._life = "open"
        self._home.opened(self)

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the answer and pass them to the sink."""
        if len(data) >= FULL:
            self.transport.pause_reading()
            self._batch.bulk.add(self._read_on)
        sink, framing = self._sink, self._framing
        if sink is None:
            self._home.discard(self)  # the worker sent bytes without a request: do not use the connection again
            self.transport.abort()
            return
        try:
            if framing is None:
                self._begin(sink, data)
                return
            if sink.decoding:
                payload: list[bytes] = []
                end = framing.feed(data, payload)
                content = b"".join(payload)
            else:
                end = framing.feed(data)
                content = data if end < 0 else data[:end]
        except WorkerInvalid as exc:
            self._fail(Outcome.INVALID, str(exc))
            return
        if end < 0:
            sink.data(content, False)
        else:
            self._finish(end == len(data))
            sink.data(content, True)

    def eof_received(self) -> None:
        """Close when the worker closes its side: returning None does that."""

    def pause_writing(self) -> None:
        """Write no further slice of a large body: the worker reads slowly."""
        self._full = True

    def resume_writing(self) -> None:
        """Write the next slice: the worker reads again."""
        self._full = False
        if self._rest is not None:
            self._batch.bulk.add(self._write_on)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the sink that the connection is closed, and why."""
        sink, framing = self._sink, self._framing
        self._sink = self._framing = self._rest = None
        self._life = "closed"
        self._loss = exc
        self._home.lost(self)
        if sink is None:
            return
        if framing is not None and framing.ends_at_close and exc is None:
            sink.data(b"", True)
        else:
            sink.broken(*self._why_closed(framing is not None))

    # -- the answer ----------------------------------------------------------------------------------------------------

    def _begin(self, sink: Sink, data: bytes) -> None:
        """Parse the head of the answer, once it is complete, and the part of the body that came with it."""
        seen = len(self._buffer)
        if seen:
            data = self._buffer + data
            self._buffer = b""
        head = parse_head(data, seen, self.switches)
        if head is not None and head.status < 200:
            head, data = self._skip_interim(head, data)
        if head is None:
            self._buffer = data
            return
        if head.status == 408 and self._stale() and not head.keep_alive and not self._interim:
            self._fail(Outcome.STALE, "A kept connection was closed by the worker, with status 408.")
            return
        framing = Sized(0) if sink.bodyless else framing_of(head)
        rest = data[head.end :]
        if sink.decoding:
            payload: list[bytes] = []
            end = framing.feed(rest, payload)
            content = b"".join(payload)
        else:
            end = framing.feed(rest)
            content = rest if end < 0 else rest[:end]
        self._framing = framing
        self._reusable = head.keep_alive
        if end >= 0:
            self._finish(end == len(rest))
        sink.begin(head, framing, content, end >= 0)

    def _skip_interim(self, head: ResponseHead | None, data: bytes) -> tuple[ResponseHead | None, bytes]:
        """Return the first head that is not interim, if it is complete, and the data from there on."""
        while head is not None and head.status < 200 and head.status != 101:
            self._interim += 1
            if self._interim > _MAX_INTERIM:
                raise WorkerInvalid("The worker sends interim responses without end.")
            data = data[head.end :]
            head = parse_head(data, 0, self.switches)
        return head, data

    def _finish(self, exact: bool) -> None:
        """End the request; `exact`: no byte came after the answer.

        The connection is released before the sink hears of the end, because the sink may need one at once.
        """
        self._sink = None
        self._framing = None
        self.used = True
        if exact and self._reusable and self._rest is None and not self.transport.get_write_buffer_size():
            self._home.release(self)
        else:
            self._rest = None
            self.transport.close()

    def _fail(self, outcome: Outcome, detail: str) -> None:
        sink = self._sink
        self.abort()
        if sink is not None:
            sink.broken(outcome, detail)

    # -- what went wrong -----------------------------------------------------------------------------------------------

    def _stale(self) -> bool:
        """Return whether what ends the request now is likely the end of an idle connection."""
        return self.used and self._home.now() - self.sent_at <= STALE_WITHIN

    def _why_closed(self, answering: bool) -> tuple[Outcome, str]:
        """Return why the connection closed during a request; `answering`: inside the answer."""
        if answering:
            return Outcome.CUT, "The worker broke off in the middle of its answer."
        if isinstance(self._loss, OSError) and self._loss.errno in _VANISHED:
            return Outcome.BROKEN, "The worker's machine does not answer any more."
        if self._buffer or self._interim:
            return Outcome.BROKEN, "The worker closed the connection without an answer."
        if self._stale():
            return Outcome.STALE, "A kept connection had been closed by the worker."
        return self.ended_unused("The worker closed the connection without an answer.")

    def ended_unused(self, detail: str) -> tuple[Outcome, str]:
        """Return why a new connection closed. Since TLS 1.3 a worker refuses a certificate only after the handshake."""
        if isinstance(self._loss, ssl.SSLError):
            return Outcome.UNREACHABLE, unreachable(self._loss, True)
        secure = self.transport.get_extra_info("ssl_object") is not None
        return Outcome.BROKEN, detail + (f" It {MAY_WANT_CERTIFICATE}." if secure else "")


class Opening:
    """A connection that is being opened for one request. It can be aborted like one that is open."""

    __slots__ = ("body", "given_up", "head", "sink", "task")

    def __init__(self, sink: Sink, head: bytes, body: Body | Spliced) -> None:
        self.sink = sink
        self.head = head
        self.body = body
        self.given_up = False
        self.task: asyncio.Task[None] | None = None

    def abort(self) -> None:
        """Give the request up: the sink hears nothing more."""
        self.given_up = True
        if self.task is not None:
            self.task.cancel()

    def failed(self, outcome: Outcome, detail: str) -> None:
        """Tell the sink why there is no connection.

        A cancelled `asyncio.wait_for` (before Python 3.12) raises the failure that it has seen already, so this can be
        called after `abort`.
        """
        if not self.given_up:
            self.sink.broken(outcome, detail)

    def pause(self) -> None:
        """Do nothing: nothing is read yet; the sink pauses the connection once the answer begins."""

    def resume(self) -> None:
        """Do nothing: nothing is read yet."""

    def __repr__(self) -> str:
        return f"<Opening{' given up' if self.given_up else ''}>"


def unreachable(error: Exception, secure: bool) -> str:
    """Return in words why no connection could be opened. secure: the target is an https URL."""
    why = explain(error) if secure and isinstance(error, OSError) else ""
    if not why and isinstance(error, OSError) and error.strerror:
        why = error.strerror
    return f"The worker could not be reached: {why or error.__class__.__name__}."
