"""A WebSocket through the router: an exchange like any other up to the worker's 101, then bytes both ways.

    request --> decided, sent, retried as ever --> 101 --> ClientEnd: client --> worker
                        |                                  WorkerEnd: worker --> client, over the leg, as an answer
                        '-- any other answer: passed on, and the connection closes

The router reads no frames, so nothing is retried and nothing is added once the 101 is passed on. The worker's side is
the body of an answer that ends with its connection: it is counted, paused and broken off as such. The client's side is
taken from `ClientConnection` by another protocol of its transport. What a client sent before the 101 comes first.

A side that takes nothing pauses the other one's socket. When a side ends its sending, the other one is told; the
tunnel is over when both have, or when one connection is closed. It is closed by the router

    when nothing has come from either side for --tunnel-idle-timeout-secs; once a side has ended its sending, from the
         other one for 30 s: `TunnelRules.half`
    when it was open for --tunnel-max-secs
    when the client takes nothing for --send-timeout-secs
    when the router stops, after the grace that streams get

The lease of the worker is held as long as the tunnel is open.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final, cast

from sglang_router.errors import (
    BadHTTP,
    NoWebSocketKey,
    OriginRefused,
    RouterError,
    TunnelIdle,
    TunnelOverdue,
    UpgradeRequired,
)
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.deadlines import DUE_FIRST_BYTE, DUE_PROGRESS
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.full_read import FULL
from sglang_router.relay.leg import LOOKS, Leg
from sglang_router.relay.relay import Relay
from sglang_router.relay.states import ANSWERING, DONE, ROUTED
from sglang_router.relay.upstream import UpstreamConnection
from sglang_router.routing.endpoints import Endpoint
from sglang_router.routing.events import FirstByte
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan
from sglang_router.wire.headers import UpgradeRequest
from sglang_router.wire.request import Request
from sglang_router.wire.response import ResponseHead
from sglang_router.wire.upgrade import foreign_origin, is_13, keyed, refusal_of, switching_head

_TOO_EARLY: Final = "Before the WebSocket is open, its client may neither end its sending nor send more than 64 kB."
_FLUSHED_WITHIN: Final = 5.0
"""Seconds that a worker has to take the last bytes of a client that has left."""


class TunnelExchange(Exchange):
    """See the module.

    taken  bytes that the client sent through the tunnel
    """

    __slots__ = ("_idle", "_idle_since", "_moved", "_until", "_worker", "taken")

    def __init__(self, relay: Relay, endpoint: Endpoint, client: ClientConnection, request: Request) -> None:
        super().__init__(relay, endpoint, client, request)
        self.taken = 0
        self._worker: WorkerEnd | None = None
        self._moved = 0  # bytes of both sides at the last look
        self._idle = self._idle_since = 0.0
        self._until = math.inf

    @property
    def open(self) -> bool:
        """Whether the client has the 101, and the end has not come."""
        return self.state is ANSWERING and self._worker is not None

    # -- before the 101 ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Refuse what cannot become a tunnel; else read the facts and ask the decider."""
        request = self.request
        if request.refusal is None:
            try:
                self._check(request)
            except RouterError as error:
                request.refusal = error.with_traceback(None)  # its frames refer to this object: avoid a cycle
        super().start()

    def _check(self, request: Request) -> None:
        """Check a request that may become a tunnel, and count it.

        Raises: UpgradeRequired, NoWebSocketKey, OriginRefused, TooManyTunnels.
        """
        if not isinstance(request, UpgradeRequest) or not is_13(request.headers):
            raise UpgradeRequired
        if not keyed(request.headers):
            raise NoWebSocketKey
        cors = self.relay.answers.cors
        if foreign_origin(request.headers) and not (cors is not None and cors.allows(request.headers)):
            raise OriginRefused
        self.relay.tunnels.enter(self)

    def follow(self, plan: Plan, fresh: bool = False) -> None:
        """Send the leg of a plan, on a connection of its own."""
        super().follow(plan, True)
        for leg in self.legs:
            leg.fresh = True
        if self.state is ROUTED:
            self.deadline = (DUE_FIRST_BYTE, self.relay.clock() + self.relay.timeouts.first_byte)

    def answered(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Open the tunnel after a 101; take any other answer as ever."""
        if head.status != 101:
            super().answered(leg, head, data, done)
            return
        detail = refusal_of(head)
        if detail:
            leg.abort()
            self.leg_broken(leg, Outcome.INVALID, detail)
        else:
            self._open(leg, head, data)

    # -- the tunnel ----------------------------------------------------------------------------------------------------

    def _open(self, leg: Leg, head: ResponseHead, data: bytes) -> None:
        """Pass the 101 on, with the first bytes of the worker; from now on bytes go both ways."""
        relay, tag, client = self.relay, self.tag, self.client
        connection = leg.connection
        assert isinstance(connection, UpstreamConnection)
        self._worker = worker = WorkerEnd(self, connection)
        end = ClientEnd(self, worker)
        if not client.gives_up_http():
            self._worker = None
            leg.abort()
            self.refuse(BadHTTP(_TOO_EARLY), Outcome.GONE)
            return
        self._move(ANSWERING)
        self.shown = leg
        self.status = head.status
        now = relay.clock()
        self.first_byte = now - tag.start
        if relay.listener.hears_first_byte:
            relay.listener.first_byte(FirstByte(tag, leg.planned, self.first_byte))
        decision = relay.answers.decision(tag, leg.planned, self.retries)
        leg.show(switching_head(head, tag.raw_id, decision), data, False)
        if client.stalled:
            leg.pause()
        longest = relay.tunnels.rules.longest
        self._until = now + longest if longest else math.inf
        self._idle = relay.tunnels.rules.idle
        relay.decider.began(leg.planned, now)
        self._idle_since = now
        self._watch(now)
        worker.client = end
        connection.transport.set_protocol(cast("asyncio.Protocol", worker))
        client.hand_over(end)

    def _watch(self, now: float) -> None:
        self.deadline = (DUE_PROGRESS, min(now + self._idle / LOOKS, self._until))

    def halved(self) -> None:
        """Take note that a side has ended its sending: the other one may be silent for a short time only."""
        now = self.relay.clock()
        self._idle = min(self._idle, self.relay.tunnels.rules.half)
        self._idle_since = now
        self._watch(now)

    def overdue(self, now: float) -> None:
        """Close the tunnel when it is idle or has been open for too long; before it is open, as any exchange."""
        if self.shown is None or not self.open:
            super().overdue(now)
            return
        moved = self.taken + self.shown.sent
        if moved != self._moved:
            self._moved, self._idle_since = moved, now
        if now >= self._until:
            self.fail(Outcome.SERVED, TunnelOverdue())
        elif now - self._idle_since >= self._idle:
            self.fail(Outcome.SERVED, TunnelIdle())
        else:
            self._watch(now)

    # -- the end -------------------------------------------------------------------------------------------------------

    def leg_done(self, leg: Leg) -> None:
        """End: the worker has closed its connection."""
        if self.state is not DONE:
            super().leg_done(leg)

    def leg_broken(self, leg: Leg, outcome: Outcome, detail: str) -> None:
        """End, or retry before the 101: the worker's connection broke."""
        if self.state is not DONE:
            super().leg_broken(leg, outcome, detail)

    def gone(self) -> None:
        """End: the client closed its connection, which is how a WebSocket may end."""
        if self.open:
            self.finish(Outcome.SERVED)
        else:
            self._settle()
            super().gone()

    def finish(self, outcome: Outcome) -> None:
        """End: one side is closed."""
        self._settle()
        super().finish(outcome)

    def fail(self, outcome: Outcome, error: RouterError, event: bytes = b"") -> None:
        """End with an error."""
        self._settle()
        super().fail(outcome, error, event)

    def refuse(self, error: RouterError, outcome: Outcome | None = None) -> None:
        """Answer with an error of the router."""
        self._settle()
        super().refuse(error, outcome)

    def _settle(self) -> None:
        """Let the worker have what the client sent last, and tell the counters how much that was."""
        self.relay.tunnels.leave(self)
        worker, self._worker = self._worker, None
        if worker is None:
            return
        self.tag.received = self.taken
        for leg in self.legs:
            leg.first = leg.last = b""  # frames, in which no usage is looked for
            if leg.connection is not None:
                leg.connection = None
                leg.handled = Ignored()
                worker.close(self.relay)


class Ignored:
    """Takes what a worker still sends after the end."""

    __slots__ = ()

    def data(self, leg: Leg, data: bytes, done: bool) -> None:
        """Drop bytes."""


class WorkerEnd:
    """The protocol of the worker's connection: that of `UpstreamConnection`, but the client is paused and ended by it.

    client  the other end
    ended   the worker has ended its sending
    """

    __slots__ = ("_connection", "_tunnel", "client", "ended", "transport")

    client: ClientEnd

    def __init__(self, tunnel: TunnelExchange, connection: UpstreamConnection) -> None:
        self._tunnel = tunnel
        self._connection = connection
        self.transport = connection.transport
        self.ended = False

    def close(self, relay: Relay) -> None:
        """Close the connection once the worker has taken what was written, or after a while."""
        self.transport.close()
        relay.call_later(_FLUSHED_WITHIN, self.transport.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Do nothing: the connection was made before the tunnel."""

    def data_received(self, data: bytes) -> None:
        """Pass bytes to the client."""
        self._connection.data_received(data)

    def eof_received(self) -> bool:
        """End the sending to the client; return whether the connection stays open for what the client sends."""
        self.ended = True
        client = self.client
        if client.ended or not client.transport.can_write_eof() or not self.transport.can_write_eof():
            return False
        self._tunnel.relay.batch.flush()
        client.transport.write_eof()
        self._tunnel.halved()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """End the tunnel."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop reading from the client: the worker takes no more bytes now."""
        self.client.block()

    def resume_writing(self) -> None:
        """Read from the client again."""
        self.client.unblock()


class ClientEnd:
    """The protocol of the client's connection while the tunnel is open.

    ended  the client has ended its sending
    """

    __slots__ = ("_blocked", "_connection", "_tunnel", "_worker", "ended", "transport")

    def __init__(self, tunnel: TunnelExchange, worker: WorkerEnd) -> None:
        self._tunnel = tunnel
        self._worker = worker
        self._connection = tunnel.client
        self.transport = tunnel.client.transport
        self.ended = False
        self._blocked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Do nothing: the connection was made before the tunnel."""

    def data_received(self, data: bytes) -> None:
        """Pass bytes to the worker. A read that may have left more in the socket gives way to other work."""
        tunnel = self._tunnel
        if not tunnel.open:
            return
        tunnel.taken += len(data)
        self._worker.transport.write(data)
        if len(data) >= FULL and not self._blocked:
            self.transport.pause_reading()
            tunnel.relay.batch.bulk.add(self._read_on)

    def _read_on(self) -> bool:
        if not self._blocked and not self.transport.is_closing():
            self.transport.resume_reading()
        return False

    def block(self) -> None:
        """Read nothing more: the worker's socket is full."""
        self._blocked = True
        self.transport.pause_reading()

    def unblock(self) -> None:
        """Read on: the worker takes bytes again."""
        self._blocked = False
        self._read_on()

    def eof_received(self) -> bool:
        """End the sending to the worker; return whether the connection stays open for what the worker sends."""
        self.ended = True
        worker = self._worker
        if worker.ended or not worker.transport.can_write_eof() or not self.transport.can_write_eof():
            return False
        worker.transport.write_eof()
        self._tunnel.halved()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """End the tunnel."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop reading from the worker: the client takes no more bytes now."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """Read from the worker again."""
        self._connection.resume_writing()
