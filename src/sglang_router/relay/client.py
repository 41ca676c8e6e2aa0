"""One client connection: read bytes, answer the requests in their order, write bytes.

    data_received -> wire.RequestParser -> queue -> Routes -> Exchange -> answer -> next request of the queue
                                                       |
           the client closes: exchange.gone()     the client does not read: exchange.pause(), resume()

A table (`relay.routes`) says what handles a request: this class depends neither on the relay nor on the control plane.
Only one exchange is in flight at a time. Pipelined requests are parsed and queued; when `limits.ahead_bytes` of them
have arrived, the socket is not read until the answer is written.

A large body is read only when the request-body budget admits it (`relay.budget`); until then nothing is read.

    state       deadline                                     when the deadline passes
    IDLE        IDLE (HEAD before the first request)         the connection closes
    READING     HEAD, BODY or BUDGET                         408 or 429, then LINGERING
    BUSY        none: the exchange has one                   (PROBE, PRESENT: see `relay.half_closed`)
                SEND, while the client does not read         aborted, unless it read more of what was written
    LINGERING   LINGER                                       the connection is aborted
    CLOSING     CLOSE                                        aborted, unless the client still reads what was written

    from / to    IDLE   READING  BUSY   LINGERING  CLOSING     (- the state stays)
    IDLE           -       x       x        x         x
    READING        x       -       x        x         x
    BUSY           x       x       -        x         x
    LINGERING                               -
    CLOSING                                           -
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

from sglang_router.errors import RouterError, TooManyConnections
from sglang_router.relay import answers
from sglang_router.relay.budget import GRACE, SMALL
from sglang_router.relay.clients import AnyExchange, Follower
from sglang_router.relay.deadlines import DUE_BODY, DUE_IDLE, ERRORS, NEVER, Deadline, Due
from sglang_router.relay.frontend import Frontend
from sglang_router.relay.full_read import FEW, FullRead, comes_in_parts
from sglang_router.relay.half_closed import PROBE_AFTER, is_half, is_reset
from sglang_router.relay.moves import CLIENT_MOVES, IllegalMove
from sglang_router.relay.states import ADMITTED, BUSY, CLOSING, HELD, IDLE, LINGERING, READING, ClientState
from sglang_router.wire.request import Request, RequestParser


class ClientConnection:
    """See the module. It has the methods of an asyncio protocol, but not the base class.

    deadline  kind and moment; `Clients.sweep` calls `overdue` when it has passed
    exchange  the exchange in flight
    peer      address of the client
    stalled   the client does not read what it is sent
    state     see the table of the module
    """

    __slots__ = (
        *("_early", "_ended", "_frontend", "_full", "_hold", "_parser", "_queue", "_read_paused", "_unread"),
        *("clients", "deadline", "exchange", "peer", "stalled", "state", "transport"),
    )

    transport: asyncio.Transport

    def __init__(self, frontend: Frontend) -> None:
        # per connection
        self._frontend = frontend
        self.clients = frontend.clients
        self._hold = frontend.clients.budget.hold(self)
        self._parser = RequestParser(frontend.limits, frontend.admit, frontend.upgrades)
        self._queue: deque[Request | RouterError] = deque()
        self.state: ClientState = IDLE
        self.deadline: Deadline = NEVER
        self.stalled = False  # the client does not read what it is sent
        self.peer = ""
        self._unread = 0  # bytes that the client had not read at the last check
        self._read_paused = False
        self._full: FullRead | None = None  # a read that is being parsed
        self._ended = False  # the client has ended its sending side
        # per exchange
        self.exchange: AnyExchange | None = None
        self._early = 0  # bytes that arrived while an earlier request was not answered yet

    def __repr__(self) -> str:
        kind, at = self.deadline
        due = "" if kind is Due.NEVER else f", {kind.value} due at {at:.3f}"
        flags = ", stalled" * self.stalled + ", not read" * self._read_paused + ", half-closed" * self._ended
        return f"<ClientConnection {self.peer} {self.state.name}{due}, {self._hold!r}{flags}>"

    def _move(self, state: ClientState, deadline: Deadline) -> None:
        if not CLIENT_MOVES[self.state] >> state & 1:
            raise IllegalMove(f"{state.name} in {self!r}")
        self.state = state
        self.deadline = deadline

    # -- called by the event loop --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Register the connection; refuse it when there are too many."""
        self.transport = transport
        self.deadline = (Due.HEAD, self.clients.clock() + self._frontend.timeouts.head)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        if self.clients.add(self):
            return
        if self.clients.crowded:
            transport.abort()
        else:
            self.refuse(TooManyConnections(retry_after=1.0))

    def data_received(self, data: bytes) -> None:
        """Parse bytes; queue complete requests, and pause reading when too many bytes are read ahead."""
        if len(data) > FEW and comes_in_parts(data) and not self.transport.is_closing():
            self.transport.pause_reading()
            self._full = FullRead(self, data)
            self._frontend.batch.bulk.add(self._full.step)
            return
        if self.state >= LINGERING:  # discard it; TLS still delivers what arrives while the last answer is flushed
            return
        hold = self._hold
        if hold.state < ADMITTED:  # otherwise its bytes are counted already
            hold.grow(len(data))
        ready = self._parser.feed(data)
        if ready and hold.state:
            self._end_body(ready[0])
        if self.exchange is None and not self._queue and not self.stalled:
            if ready:
                self._queue.extend(ready)
                self._frontend.batch.request(self)
            else:
                self._await_rest()
        else:
            self._queue.extend(ready)
            self._early += len(data)
            if self._early > self._frontend.limits.ahead_bytes:
                self._pause_reading()

    def parsed(self) -> None:
        """Read again after a full read, all parts of which are parsed."""
        self._full = None
        if not self._read_paused:
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        """React to the client's end of sending; return whether the connection stays open, for the answer."""
        self._ended = True
        now = self.clients.clock()
        if not is_half(self.transport, now if self._queue else self._asked(), now):
            return False
        self.deadline = (Due.PROBE, now + PROBE_AFTER)
        return True

    def _asked(self) -> float | None:
        """Return when the request was complete that has no answer yet."""
        return None if self.exchange is None else self.exchange.unanswered_since()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection; end the exchange in flight."""
        self.clients.left(self)
        self._drop()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            self.clients.exchanges.discard(exchange)
            exchange.gone()

    def pause_writing(self) -> None:
        """Pause the answer: the client does not read."""
        self.stalled = True
        if self.exchange is not None:
            self.exchange.pause()
            self._unread = self.transport.get_write_buffer_size()
            self.deadline = (Due.SEND, self.clients.clock() + self._frontend.timeouts.send)

    def resume_writing(self) -> None:
        """Continue: the client reads again."""
        self.stalled = False
        if self.deadline[0] is Due.SEND:
            self.deadline = NEVER
        if self.exchange is not None:
            self.exchange.resume()
        elif self._queue:
            self._frontend.batch.request(self)

    # -- reading -------------------------------------------------------------------------------------------------------

    def gives_up_http(self) -> bool:
        """Return whether another protocol can take over: the last request is here, and what follows it fits."""
        return self._full is None and not self._ended and self._parser.early is not None

    def hand_over(self, protocol: Follower) -> None:
        """Let another protocol take what the client sends, and what it has sent after its last request."""
        early, self._parser.early, self._early = self._parser.early or [], None, 0
        self._hold.release()
        self.transport.set_protocol(cast("asyncio.Protocol", protocol))
        self._resume_reading()
        for data in early:
            protocol.data_received(data)

    def _pause_reading(self) -> None:
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._read_paused and not self._ended:
            self._read_paused = False
            if self._full is None:
                self.transport.resume_reading()

    def _await_rest(self) -> None:
        """Set the deadline for the rest of a request, a part of which has arrived."""
        parser = self._parser
        if parser.mid_body:
            hold, now, silence = self._hold, self.clients.clock(), self._frontend.timeouts.body
            end = now + silence
            if not hold.state and 0 < parser.length <= SMALL:  # the usual case, which is quick: the head came alone
                hold.begin(now)
            elif hold.admits(parser.length, parser.received, now):
                end = min(end, hold.due(silence))
            else:
                self._wait(now)
                return
            if parser.wants_continue:
                parser.wants_continue = False
                self.write(answers.CONTINUE)
            self._move(READING, (DUE_BODY, end))
        elif parser.mid_head and self.state is not READING:
            # The deadline counts from the first byte: further bytes do not extend it.
            self._move(READING, (Due.HEAD, self.clients.clock() + self._frontend.timeouts.head))

    def _wait(self, now: float) -> None:
        """Pause reading: the request-body budget has no room for this body yet."""
        self._pause_reading()
        if self.deadline[0] is not Due.BUDGET:
            self._move(READING, (Due.BUDGET, now + self._frontend.timeouts.room))

    def read_on(self) -> None:
        """Go on with the body: the request-body budget has room."""
        self._move(READING, (Due.BODY, self.clients.clock() + self._frontend.timeouts.body))
        self._resume_reading()
        self._frontend.batch.request(self)

    def _end_body(self, item: Request | RouterError) -> None:
        """Tell the budget that a body is complete."""
        self._hold.complete(0 if isinstance(item, RouterError) else len(item.body))

    def _admits(self, request: Request) -> bool:
        """Return whether a complete request with a large body may start; if not, wait."""
        if self._hold.state is not HELD:
            now, size = self.clients.clock(), len(request.body)
            if not self._hold.admits(size, size, now):
                self._wait(now)
                return False
            self._end_body(request)
        return True

    def _drop(self) -> None:
        """Give back all that was read and not started."""
        bulk = self._frontend.batch.bulk
        bulk.free(self._parser.close())
        for item in self._queue:
            bulk.free(b"" if isinstance(item, RouterError) else item.body)
        self._queue.clear()
        self._hold.release()

    # -- one request after the other -----------------------------------------------------------------------------------

    def proceed(self) -> None:
        """Start the next request of the queue, or wait for the rest of one. The batch calls it."""
        if self.exchange is not None or self.state >= LINGERING or self.stalled or self.transport.is_closing():
            return
        if not self._queue:
            self._await_rest()
            return
        item = self._queue[0]
        if isinstance(item, RouterError):
            self.refuse(item)
            return
        if len(item.body) > SMALL and not self._admits(item):
            return
        self._queue.popleft()
        self._move(BUSY, NEVER)
        if self._ended:
            self.deadline = (Due.PROBE, self.clients.clock() + PROBE_AFTER)
        exchange = self.exchange = self._frontend.routes.find(item.method, item.path)(self, item)
        self.clients.exchanges.add(exchange)
        exchange.start()

    def write(self, data: bytes) -> None:
        """Send bytes of an answer."""
        self._frontend.batch.write(self.transport, data)

    def done(self, keep_alive: bool, now: float) -> None:
        """End the exchange in flight, whose answer is written: close the connection, or wait for the next request."""
        clients, queue, parser = self.clients, self._queue, self._parser
        if self.exchange is not None:
            clients.exchanges.discard(self.exchange)
            self.exchange = None
        if not queue:
            self._hold.release()
        if self.transport.is_closing():
            return
        if not keep_alive or (clients.draining and not clients.last_request_timeout) or (self._ended and not queue):
            self._leave()
            return
        self._move(IDLE, (DUE_IDLE, now + (clients.last_request_timeout or self._frontend.timeouts.idle)))
        if not queue:  # otherwise each answer of a pipeline would let in many more requests
            self._early = 0
            if self._read_paused:
                self._resume_reading()
        if queue or parser.mid_head or parser.mid_body:
            # Do not call `proceed` here: a pipeline of many refusals would recurse.
            self._frontend.batch.request(self)

    def abort(self) -> None:
        """End the exchange in flight, whose answer broke: close after what was written, without a clean end."""
        if self.exchange is not None:
            self.clients.exchanges.discard(self.exchange)
            self.exchange = None
        self._close()

    def refuse(self, error: RouterError) -> None:
        """Answer an invalid request, or one that came too slowly, with an error; then close the connection."""
        self.write(self._frontend.refusal(error, self.peer, self._parser.path))
        self._linger()

    # -- the end -------------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Close after the last answer. While the client still sends, closing would destroy it (RFC 9112 9.6)."""
        if self._parser.mid_body or self._parser.mid_head or self._early:
            self._linger()
        else:
            self._close()

    def _close(self) -> None:
        """Close after what was written; abort when the client reads nothing of it for the idle timeout."""
        self._drop()
        self._frontend.batch.flush()
        self.transport.close()
        self._unread = self.transport.get_write_buffer_size()
        self._move(CLOSING, (Due.CLOSE, self.clients.clock() + self._frontend.timeouts.idle))

    def _linger(self) -> None:
        """Close the sending side, and discard what the client still sends."""
        self._drop()
        self._frontend.batch.flush()
        self._move(LINGERING, (Due.LINGER, self.clients.clock() + self._frontend.timeouts.linger))
        self._resume_reading()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def cut(self) -> None:
        """Close the connection now."""
        self.transport.abort()

    def lateness(self, now: float) -> float:
        """Return by how many seconds the body that is being read is later than allowed while others wait."""
        return now - self._hold.due(GRACE)

    def forgive(self, pause: float) -> None:
        """Give the client the time back in which the router did not read."""
        kind, at = self.deadline
        self.deadline = (kind, at + pause)
        self._hold.since += pause

    def overdue(self, now: float) -> None:
        """React to the deadline, which has passed; see the table of the module."""
        kind, self.deadline = self.deadline[0], NEVER
        if kind is Due.LINGER or (kind is Due.PRESENT and is_reset(self.transport)):
            self.transport.abort()
        elif kind is Due.CLOSE or kind is Due.SEND:
            self._look_at_reader(kind, now)
        elif kind is Due.PROBE or kind is Due.PRESENT:
            if kind is Due.PROBE and not self._parser.http10 and self._asked() is not None:
                self.write(answers.CONTINUE)
            self.deadline = (Due.PRESENT, now)  # look at each sweep
        elif self.state is READING and not self.stalled:
            self.refuse(ERRORS[kind](retry_after=1.0 if kind is Due.BUDGET else None))
        else:
            self._close()

    def _look_at_reader(self, kind: Due, now: float) -> None:
        """Give a client that still reads more time, abort otherwise."""
        timeouts = self._frontend.timeouts
        unread, self._unread = self._unread, self.transport.get_write_buffer_size()
        if self._unread < unread:
            self.deadline = (kind, now + (timeouts.send if kind is Due.SEND else timeouts.idle))
        else:
            self.transport.abort()

    def close_if_idle(self) -> None:
        """Close a connection without a request for the shutdown: at once, or after `last_request_timeout`."""
        if self.exchange is None and not self._queue and self.state < LINGERING:
            timeout = self.clients.last_request_timeout
            if timeout:
                kind, at = self.deadline
                self.deadline = (kind, min(at, self.clients.clock() + timeout))
            else:
                self._close()
