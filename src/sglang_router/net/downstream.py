"""One client connection: bytes in, requests in their order, one answer each, bytes out.

    data_received -> wire.RequestParser -> queue -> Exchange (relay or control plane) -> answer -> next in the queue
                                                        |
                          the client leaves: exchange.gone()     it reads slowly: exchange.pause(), .resume()

Only one exchange is under way at a time; pipelined requests wait parsed, and once more than `_AHEAD` bytes came early
the socket is not read until the answer is out. `deadline` is the one timer of a connection; what it means follows
from what the connection is doing: waiting for a request, for the rest of one, for the answer, or for the client to
take its leave.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Protocol, cast

from sglang_router.core.events import Finished
from sglang_router.errors import BufferFull, RequestTimeout, RouterError, TooManyConnections
from sglang_router.net.asgi import AppExchange
from sglang_router.net.relay import Relay
from sglang_router.net.resuming import ResumingRelay
from sglang_router.wire.headers import error_answer
from sglang_router.wire.request import Request, RequestParser

if TYPE_CHECKING:
    from sglang_router.net.service import Service

_AHEAD = 65536
_LINGER = 2.0
"""Seconds the client gets to read a last answer while its own bytes are thrown away."""
_HELD_UP = 5.0
"""Seconds that a client is not read because there is no room for its body; then it is refused."""


class Exchange(Protocol):
    """A request under way, as its connection sees it. Exactly one of `Downstream.done` or `gone` ends it."""

    def start(self) -> None: ...
    def gone(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def overdue(self, now: float) -> None: ...
    def unanswered(self) -> tuple[float, int, bool] | None: ...


class Downstream(asyncio.Protocol):
    """See the module. `deadline` is in seconds of the service's clock."""

    __slots__ = (
        "_bytes",
        "_early",
        "_exchange",
        "_in_head",
        "_lingering",
        "_parser",
        "_paused",
        "_queue",
        "_service",
        "_stalled",
        "_unread",
        "deadline",
        "peer",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        # of the connection
        self._service = service
        self._parser = RequestParser(service.limits, service.admit if service.guarded else None)
        self._queue: deque[Request | RouterError] = deque()
        self._lingering = False
        self._stalled = False  # it does not read what it gets
        self._unread = 0  # bytes it had still to read when it was last looked at
        self._bytes = 0  # that came and are not done with
        self.deadline = math.inf
        self.peer = ""
        # of the exchange
        self._exchange: Exchange | None = None
        self._early = 0  # bytes that came while others were to be answered first
        self._paused = False
        # of the request that is coming in
        self._in_head = False

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._service.connections.add(self)
        self.deadline = self._service.clock() + self._service.timeouts.head
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        if len(self._service.connections) + self._service.upstream.open > self._service.most_connections:
            self.refuse(TooManyConnections(retry_after=1.0))

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        service = self._service
        self._bytes += len(data)
        service.buffered += len(data)
        ready = self._parser.feed(data)
        if self._exchange is None and not self._queue and not self._stalled:
            if ready:
                self._queue.extend(ready)
                self._service.turn.request(self)
            else:
                self._next()
                if service.buffered > service.most_buffered and self._parser.mid_body:
                    self._hold_up()
        else:
            self._queue.extend(ready)
            self._early += len(data)
            if self._early > _AHEAD and not self._paused:
                self._paused = True
                self.transport.pause_reading()

    def _hold_up(self) -> None:
        """There is no room for more of its body now."""
        self._paused = True
        self.transport.pause_reading()
        self._service.held_up[self] = None
        self.deadline = self._service.clock() + _HELD_UP

    def read_on(self) -> None:
        """There is room again."""
        self._paused = False
        self.deadline = self._service.clock() + self._service.timeouts.body
        self.transport.resume_reading()

    def _let_go(self) -> None:
        """Its bytes are done with."""
        self._service.buffered -= self._bytes
        self._bytes = 0
        if self._service.held_up:
            self._service.read_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._service.left(self)
        self._service.held_up.pop(self, None)
        self._let_go()
        self._parser.close()
        self._queue.clear()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._service.active -= 1
            exchange.gone()

    def pause_writing(self) -> None:
        self._stalled = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._stalled = False
        if self._exchange is not None:
            self._exchange.resume()
        elif self._queue:
            self._service.turn.request(self)

    def write(self, data: bytes) -> None:
        """Sends bytes of an answer."""
        self._service.turn.write(self.transport, data)

    # -- one request after the other -----------------------------------------------------------------------------------

    def _next(self) -> None:
        """Starts the next request that is here, or waits for it within the time that fits."""
        if self._queue:
            item = self._queue.popleft()
            if isinstance(item, RouterError):
                self.refuse(item)
                return
            self._in_head = False
            self.deadline = math.inf
            self._service.active += 1
            endpoint = self._service.endpoints.get(item.path) if item.method == b"POST" else None
            exchange: Exchange
            if endpoint is not None:
                relay = Relay if self._service.resuming is None else ResumingRelay
                exchange = relay(self._service, self, item, endpoint)
            else:
                exchange = AppExchange(self._service, self, item)
            self._exchange = exchange
            exchange.start()
            return
        parser, timeouts = self._parser, self._service.timeouts
        if parser.wants_continue:
            parser.wants_continue = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if parser.mid_body:
            self.deadline = self._service.clock() + timeouts.body
        elif parser.mid_head and not self._in_head:
            # Counted from the first byte: one byte now and then buys no time.
            self._in_head = True
            self.deadline = self._service.clock() + timeouts.head

    def done(self, keep_alive: bool) -> None:
        """The answer to the request under way is written."""
        self._exchange = None
        self._service.active -= 1
        if not self._queue:
            self._let_go()
        if self.transport.is_closing():
            return
        service = self._service
        if not keep_alive or (service.draining and not service.farewell):
            self._leave()
            return
        self.deadline = service.clock() + (service.farewell or service.timeouts.idle)
        if not self._queue:  # else each answer of a pipeline would let in many requests
            self._early = 0
            if self._paused:
                self._paused = False
                self.transport.resume_reading()
        if self._queue or self._parser.mid_head or self._parser.mid_body:
            # Not called directly: a pipeline of many refusals must not recurse.
            self._service.turn.request(self)

    def proceed(self) -> None:
        """Goes on with what is here; the service calls it, in turn with other connections."""
        if self._exchange is None and not self._lingering and not self._stalled and not self.transport.is_closing():
            self._next()

    def refuse(self, error: RouterError) -> None:
        """Answers what is not a request, or came too slowly, and leaves."""
        request_id = self._service.request_id(b"req-")
        cors = self._service.cors.fields([]) if self._service.cors is not None else b""
        self.write(error_answer(error, request_id, b"connection: close\r\n" + cors))
        self._service.listener.finished(
            Finished(
                method="",
                path="",
                endpoint="",
                request_id=request_id.decode(),
                peer=self.peer,
                streaming=False,
                model="",
                worker=None,
                branch="",
                matched=0,
                total=0,
                status=error.status,
                code=error.code,
                outcome=None,
                duration=0.0,
                first_byte=0.0,
                received=0,
                sent=0,
                retries=0,
            )
        )
        self._linger()

    def _leave(self) -> None:
        """Closes after the last answer, so that it arrives: closing at once while the client still sends would reset
        the connection and destroy the answer in its buffer (RFC 9112 9.6)."""
        if self._parser.mid_body or self._parser.mid_head or self._early:
            self._linger()
        else:
            self._close()

    def _close(self) -> None:
        """Closes behind what was written; a client that reads nothing of it for the time of an idle one is cut."""
        self._service.turn.flush()
        self.transport.close()
        self._unread = self.transport.get_write_buffer_size()
        self.deadline = self._service.clock() + self._service.timeouts.idle

    def _linger(self) -> None:
        self._lingering = True
        self._queue.clear()
        self._service.held_up.pop(self, None)
        self._let_go()
        self._service.turn.flush()
        self.deadline = self._service.clock() + _LINGER
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def abort(self) -> None:
        """Closes without a clean end, behind what was written: the answer could not be finished."""
        self._exchange = None
        self._service.active -= 1
        self._close()

    def overdue(self, now: float) -> None:
        """The deadline has passed."""
        self.deadline = math.inf
        if self._exchange is not None:
            self._exchange.overdue(now)
        elif self._lingering:
            self.transport.abort()
        elif self.transport.is_closing():
            unread, self._unread = self._unread, self.transport.get_write_buffer_size()
            if self._unread < unread:
                self.deadline = now + self._service.timeouts.idle
            else:
                self.transport.abort()
        elif self in self._service.held_up:
            self.refuse(BufferFull(retry_after=1.0))
        elif (self._parser.mid_head or self._parser.mid_body) and not self._stalled:
            self.refuse(RequestTimeout())
        else:
            self._close()

    def unanswered(self) -> tuple[float, int, bool] | None:
        """Of an inference request that waits for its first byte; see `Relay.unanswered`."""
        return None if self._exchange is None else self._exchange.unanswered()

    def close_if_idle(self) -> None:
        """For the shutdown: ends a connection that has nothing under way, at once or after its farewell. A request that
        is here already counts, and one that takes its leave has its own time."""
        if self._exchange is None and not self._queue and not self._lingering:
            if self._service.farewell:
                self.deadline = min(self.deadline, self._service.clock() + self._service.farewell)
            else:
                self.transport.close()
