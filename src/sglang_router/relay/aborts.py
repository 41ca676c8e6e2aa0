"""Ask engines to end legs that were given up: `POST /abort_request {"rid": "..."}`.

SGLang frees a leg that waits for its partner neither when its connection closes nor soon by itself (300 s), so the
router sets the request's id and says it when the leg is over. Nobody waits for the answer:

    abort(leg, headers) --> at most MOST at once, each for at most SECONDS --> settled: told, failed or dropped
                            ^ the others wait, at most MOST_WAITING            |
                            '--------- again, after AGAIN seconds -------------'

An engine that is asked to end a request which it has not read yet forgets that it was asked: both came at almost the
same time, on two connections. So it is asked again, which costs nothing if the request is gone.

What goes wrong is logged at the level debug and counted; the engine's own timeout is the net below. Several ids,
separated by spaces, are those of a batch: each is aborted.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.upstream import Opening, UpstreamConnection
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, Target
from sglang_router.wire.framing import Framing
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.request import Headers
from sglang_router.wire.response import ResponseHead

MOST: Final = 256
"""Aborts in flight; further ones wait: one list of prompts that is given up has as many."""
MOST_WAITING: Final = 8192
"""Aborts that wait; further ones are not sent."""
SECONDS: Final = 5.0
"""How long one may take."""
AGAIN: Final = (1.0, 4.0)
"""Seconds after which an engine is asked again, and once more."""
AT_THE_END: Final = 1.0
"""How long all of them may take when the router ends."""

log: Final = logging.getLogger("sglang_router.relay")


class Abort:
    """One abort: the sink of its answer, which is dropped.

    again     seconds after which it is sent again, and once more
    repeated  it has been sent before
    """

    __slots__ = (
        "_aborts",
        "_body",
        "_connection",
        "_head",
        "_timer",
        "again",
        "bodyless",
        "decoding",
        "repeated",
        "target",
    )

    def __init__(self, aborts: Aborts, target: Target, head: bytes, body: bytes) -> None:
        self.bodyless = self.decoding = False
        self.target = target
        self.again = aborts.again
        self.repeated = False
        self._aborts = aborts
        self._head = head
        self._body = body
        self._connection: UpstreamConnection | Opening | None = None
        self._timer: asyncio.TimerHandle | None = None

    def send(self, timer: asyncio.TimerHandle, fresh: bool = False) -> None:
        """Send it; `timer` ends it."""
        self._timer = timer
        self._connection = self._aborts.pool.send(self.target, self, self._head, self._body, fresh=fresh)

    def repeat(self) -> None:
        """Send it again, if the router does not end."""
        self._aborts.repeat(self)

    def late(self) -> None:
        """Give it up: time is over."""
        if self._connection is not None:
            self._connection.abort()
        self._settle(f"No answer within {SECONDS:g} s.")

    def _settle(self, failure: str) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            self._connection = None
            self._aborts.settled(self, failure)

    # -- called by the connection (Sink) -------------------------------------------------------------------------------

    def connected(self, connection: UpstreamConnection) -> None:
        """Keep the new connection, to end it when time is over."""
        self._connection = connection

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        """Take the answer: any status counts as told, because an engine need not know the id any more."""
        if done:
            self._settle("")

    def data(self, data: bytes, done: bool) -> None:
        """Drop bytes."""
        if done:
            self._settle("")

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Send it again on a new connection, if a kept one was stale; else it failed."""
        if outcome is Outcome.STALE and self._timer is not None:
            self.send(self._timer, True)
        else:
            self._settle(detail)


class Aborts:
    """See the module.

    told     aborts that an engine has answered
    failed   those that it has not
    dropped  those that were not sent, because too many waited
    again    seconds after which one is sent again, and once more; these are not counted
    """

    __slots__ = (
        "_call_later",
        "_forward",
        "_most",
        "_most_waiting",
        "_open",
        "_rest",
        "_unsent",
        "_waiting",
        "again",
        "dropped",
        "failed",
        "pool",
        "told",
    )

    def __init__(
        self,
        pool: ConnectionPool,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle],
        forward: ForwardRules,
        most: int = MOST,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self.pool = pool
        self.told = self.failed = self.dropped = 0
        self.again: tuple[float, ...] = AGAIN
        self._call_later = call_later
        self._forward = forward
        self._most = most
        self._most_waiting = most_waiting
        self._open: set[Abort] = set()
        self._unsent: deque[Abort] = deque()
        self._waiting: set[Abort] = set()  # to be sent again; as many at most as may be in flight
        self._rest: asyncio.Event | None = None  # set when none is in flight, if somebody waits for that

    def __repr__(self) -> str:
        return f"<Aborts {len(self._open)} in flight, {self.told} told, {self.failed} failed, {self.dropped} dropped>"

    @property
    def in_flight(self) -> int:
        """How many are not settled."""
        return len(self._open)

    def abort(self, leg: PlannedLeg, headers: Headers) -> None:
        """Ask the engine of a leg to end it. headers: the client's; their key is sent as with the leg itself."""
        for rid in leg.rid.split():
            body = json.dumps({"rid": rid.decode("latin-1")}).encode()
            abort = Abort(self, leg.target, self._head(leg.target, headers, len(body)), body)
            if len(self._open) < self._most:
                self._send(abort)
            elif len(self._unsent) < self._most_waiting:
                self._unsent.append(abort)
            else:
                self.dropped += 1
                log.debug("%s is not asked to end a request: too many such questions wait", leg.target.name)

    def _send(self, abort: Abort) -> None:
        self._open.add(abort)
        abort.send(self._call_later(SECONDS, abort.late))

    def repeat(self, abort: Abort) -> None:
        """Send one again whose time has come."""
        if abort in self._waiting:
            self._waiting.discard(abort)
            if len(self._open) < self._most:
                self._send(abort)

    def _head(self, target: Target, headers: Headers, length: int) -> bytes:
        start = self.pool.origin(target).start(b"POST", b"/abort_request")
        fields = b"content-type: application/json\r\ncontent-length: %d\r\n" % length
        clients = self._forward.authorization(headers)
        key = clients if target.key is None or clients is not None else b"Bearer " + target.key
        if key is not None:
            fields += b"authorization: %b\r\n" % key
        return start + fields + self._forward.tail

    def settled(self, abort: Abort, failure: str) -> None:
        """Take note that an abort is over. failure: why it was not answered; "" for one that was."""
        self._open.discard(abort)
        if self._unsent:
            self._send(self._unsent.popleft())
        if not abort.repeated:
            self._count(abort, failure)
        if abort.again and len(self._waiting) < self._most:
            delay, abort.again = abort.again[0], abort.again[1:]
            abort.repeated = True
            self._waiting.add(abort)
            self._call_later(delay, abort.repeat)
        if self._rest is not None and not self._open:
            self._rest.set()

    def _count(self, abort: Abort, failure: str) -> None:
        if failure:
            self.failed += 1
            log.debug("%s could not be asked to end a request: %s", abort.target.name, failure)
        else:
            self.told += 1

    async def settle(self, seconds: float = AT_THE_END) -> None:
        """Wait until none is in flight, for at most so many seconds: the router ends."""
        self._waiting.clear()
        if self._open:
            self._rest = asyncio.Event()
            try:
                await asyncio.wait_for(self._rest.wait(), seconds)
            except (TimeoutError, asyncio.TimeoutError):
                log.debug("%d engines did not answer that they end a request", len(self._open))
