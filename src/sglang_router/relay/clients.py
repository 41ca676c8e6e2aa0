"""The client connections of one port and the exchanges in flight on them: registry, drain and deadlines.

add / left          a connection opened; a connection is closed
exchanges           the exchanges in flight; their client connections add and remove them
drain               each connection closes after the answer in flight; `drained` is set when the last one is closed
sweep               every quarter of a second: call `overdue` of connections and exchanges whose deadline has passed
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, Protocol

from sglang_router.relay.budget import ByteBudget
from sglang_router.relay.deadlines import Deadline

_STOPPED: Final = 1.25
"""Seconds between two sweeps from which the process was stopped, or busy with something else, meanwhile."""
_MOST_HURRIED: Final = 100
"""Most slow clients that one sweep refuses: each takes a moment."""


class Unanswered(NamedTuple):
    """Requests that are queued, and streams without a first byte.

    requests  how many
    held      how many of them are queued in the router
    size      bytes of their routing text that no worker is believed to have cached
    oldest    seconds since the oldest of them arrived
    """

    requests: int
    held: int
    size: int
    oldest: float

    def with_others(self, others: Unanswered) -> Unanswered:
        """Return these and others together."""
        return Unanswered(
            self.requests + others.requests,
            self.held + others.held,
            self.size + others.size,
            max(self.oldest, others.oldest),
        )


class Watched(Protocol):
    """What has a deadline."""

    deadline: Deadline

    def overdue(self, now: float) -> None:
        """React to `deadline`, which has passed."""


class AnyExchange(Watched, Protocol):
    """A request in flight, as its client connection sees it.

    It ends when it calls `ClientConnection.done` or `abort`, or when its `gone` is called.
    """

    def start(self) -> None:
        """Start: the requests before it on its connection are answered."""

    def gone(self) -> None:
        """End: the client closed its connection."""

    def unanswered_since(self) -> float | None:
        """Return when the request was complete; None once the client was sent a part of the answer."""

    def pause(self) -> None:
        """Stop sending: the client does not read."""

    def resume(self) -> None:
        """Send again: the client reads again."""

    def unanswered(self) -> tuple[float, int, bool] | None:
        """Describe an inference request without a first byte; None for any other request.

        Returns: when it arrived (seconds of the router's clock), how many bytes of its routing text no worker is
        believed to have cached, and whether it is queued in the router.
        """


class Follower(Protocol):
    """A protocol that takes a client's bytes after the last request of its connection."""

    def data_received(self, data: bytes) -> None:
        """Take bytes."""


class Connected(Watched, Protocol):
    """A client connection, as the registry sees it."""

    def lateness(self, now: float) -> float:
        """Return by how many seconds the body that is being read is later than allowed while others wait."""

    def forgive(self, pause: float) -> None:
        """Give the client the time back in which the router did not read."""

    def close_if_idle(self) -> None:
        """Close for a shutdown, unless a request is here."""

    def cut(self) -> None:
        """Close now."""


_TOLD: Final = 16
"""Connections over the limit that are told so and may still be open; further ones are closed without a word."""


class Clients:
    """See the module.

    clock                 seconds; never goes back
    budget                the request-body budget of these clients
    limit                 most connections, of clients and to workers together; further clients are refused
    upstream              returns the number of connections to workers
    numbers               numbers for the tags of requests
    draining              no connection is kept open for further requests
    last_request_timeout  while draining: seconds that an idle connection has for one more request; 0.0 for none
    drained               set when the last connection is closed while draining
    """

    def __init__(
        self,
        clock: Callable[[], float],
        budget: ByteBudget,
        limit: int,
        upstream: Callable[[], int],
        numbers: Iterator[int],
    ) -> None:
        self.clock = clock
        self.budget = budget
        self.numbers = numbers
        self.draining = False
        self.last_request_timeout = 0.0
        self.drained = asyncio.Event()
        self.connections: set[Connected] = set()
        self.exchanges: set[AnyExchange] = set()
        self.limit = limit
        self._upstream = upstream
        self._swept = math.inf

    def __repr__(self) -> str:
        state = " draining" if self.draining else ""
        return f"<Clients {len(self.connections)} connections, {len(self.exchanges)} in flight{state}>"

    # -- registry ------------------------------------------------------------------------------------------------------

    def add(self, connection: Connected) -> bool:
        """Register a connection; return False when that makes more than `limit`."""
        self.connections.add(connection)
        return len(self.connections) + self._upstream() <= self.limit

    def left(self, connection: Connected) -> None:
        """Remove a connection, which is closed."""
        self.connections.discard(connection)
        self._look_drained()

    @property
    def crowded(self) -> bool:
        """Whether so many connections are being refused that a further one cannot even be told."""
        return len(self.connections) + self._upstream() > self.limit + _TOLD

    @property
    def active(self) -> int:
        """Exchanges in flight."""
        return len(self.exchanges)

    # -- drain ---------------------------------------------------------------------------------------------------------

    def drain(self, last_request_timeout: float = 0.0) -> None:
        """Close each connection after the answer in flight, and idle ones at once. May be called again.

        last_request_timeout  seconds for which idle connections stay open instead, so that a client that just sends a
                              request still gets an answer, which then closes the connection
        """
        self.draining = True
        self.last_request_timeout = last_request_timeout
        self.drained.clear()  # connections may have come since an earlier call
        for connection in list(self.connections):
            connection.close_if_idle()
        self._look_drained()

    def cut(self) -> None:
        """Close all connections now."""
        self.drain()
        for connection in list(self.connections):
            connection.cut()

    def _look_drained(self) -> None:
        if self.draining and not self.connections:
            self.drained.set()

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Call `overdue` where a deadline has passed, and refuse slow clients while others wait.

        A timer per request would cost more than this loop four times a second. Each deadline is looked at again when
        its turn comes: what one client loses may have given another one more time.
        """
        now = self.clock()
        pause, self._swept = now - self._swept, now
        if pause > _STOPPED:
            self._forgive(pause)
        watched: list[Watched] = [*self.connections, *self.exchanges]
        for each in [each for each in watched if each.deadline[1] <= now]:
            if each.deadline[1] <= now:
                each.overdue(now)
        if self.budget.short or self._crowded:
            self._hurry(now)

    def _forgive(self, pause: float) -> None:
        """Shift all deadlines: the router did not read, so what would have kept them may wait in the sockets."""
        for connection in self.connections:
            connection.forgive(pause)
        for exchange in self.exchanges:
            kind, at = exchange.deadline
            exchange.deadline = (kind, at + pause)

    @property
    def _crowded(self) -> bool:
        """Whether less than an eighth of all connections is left for new clients."""
        return len(self.connections) + self._upstream() > self.limit - self.limit // 8

    def _hurry(self, now: float) -> None:
        """Refuse the slowest bodies, while others wait for the budget or could soon find no connection."""
        for hold in self.budget.late(now)[:_MOST_HURRIED]:
            if self.budget.short:
                hold.reader.overdue(now)
        if self._crowded:
            late = [each for each in self.connections if each.lateness(now) > 0.0]
            for connection in sorted(late, key=lambda each: -each.lateness(now))[:_MOST_HURRIED]:
                connection.overdue(now)

    def unanswered(self) -> Unanswered:
        """Sum up the requests without a first byte. It reads all exchanges: call it from a timer, not per request."""
        now = self.clock()
        requests = held = size = 0
        oldest = 0.0
        for exchange in self.exchanges:
            waits = exchange.unanswered()
            if waits is not None:
                since, missing, here = waits
                requests += 1
                held += here
                size += missing
                oldest = max(oldest, now - since)
        return Unanswered(requests, held, size, oldest)
