"""What all client connections share: the decision room, the way to the workers, the clock, the rules.

One object, built once in `server.py` and handed down; nothing in `net` looks anything up elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_router.wire.request import Headers, Limits

if TYPE_CHECKING:
    import random

    from sglang_router.core.events import Listener
    from sglang_router.core.request import Endpoint
    from sglang_router.core.router import Router
    from sglang_router.core.worker import Worker
    from sglang_router.net.downstream import Downstream
    from sglang_router.net.relay import Relay
    from sglang_router.net.upstream import Upstream

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]

ROUTING_KEY = -1
CONTENT_ENCODING = -2
REQUEST_ID_HEADERS = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")


class Timeouts(msgspec.Struct, frozen=True):
    """Seconds. head: to finish a request head; body: the longest silence inside a body; idle: between requests of a
    kept connection; request: a whole exchange with the workers; starting: how long a request waits while every worker
    still starts."""

    head: float = 30.0
    body: float = 60.0
    idle: float = 75.0
    request: float = 1800.0
    starting: float = 10.0


class Unanswered(msgspec.Struct, frozen=True):
    """The requests that wait here for a worker, and the streams that have no byte yet.

    requests  how many, `held` of them still here because no worker is ready
    size      bytes of their routing text that no worker is believed to hold
    oldest    seconds since the first of them came
    """

    requests: int
    held: int
    size: int
    oldest: float


class Service:
    """See the module. `prod(worker)` asks for a health check at once; `most_waiting` requests may wait for workers."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        router: Router,
        upstream: Upstream,
        listener: Listener,
        app: ASGIApp,
        rng: random.Random,
        *,
        endpoints: dict[bytes, Endpoint],
        prod: Callable[[Worker], None],
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        request_id_headers: tuple[str, ...] = REQUEST_ID_HEADERS,
        forward_everything: bool = False,
        most_waiting: int = 4096,
    ) -> None:
        self.loop = loop
        self.router = router
        self.upstream = upstream
        self.turn = upstream.turn
        self.listener = listener
        self.app = app
        self.endpoints = endpoints  # what is relayed; everything else is the app's
        self.prod = prod
        self.limits = limits or Limits()
        self.timeouts = timeouts or Timeouts()
        self.forward_everything = forward_everything
        self.most_waiting = most_waiting
        self.clock = time.monotonic
        self.rng = rng
        self.draining = False
        self.connections: set[Downstream] = set()
        self.active = 0  # requests under way
        self.drained = asyncio.Event()  # no new connections come, and the last one is closed
        self.waiting: dict[Relay, None] = {}  # requests that came while every worker was starting, in order
        # What a request's headers may tell: an id (the place in the order of preference), or one of the two below.
        self.watched = {name.lower().encode(): place for place, name in enumerate(request_id_headers)}
        self.watched[b"x-smg-routing-key"] = ROUTING_KEY
        self.watched[b"content-encoding"] = CONTENT_ENCODING

    def request_id(self, prefix: bytes) -> bytes:
        """A new id: the endpoint's prefix and 24 hexadecimal digits."""
        return prefix + b"%024x" % self.rng.getrandbits(96)

    def usable_id(self, value: bytes) -> bool:
        """Whether a client's id may serve as ours: not empty, and short enough for logs and headers."""
        return 0 < len(value) <= 256

    def id_of(self, headers: Headers, prefix: bytes) -> bytes:
        """The client's own id, from the best of the headers it may come in, else a new one."""
        named = [(self.watched.get(name, -1), value) for name, value in headers if self.usable_id(value)]
        return min((found for found in named if found[0] >= 0), default=(0, b""))[1] or self.request_id(prefix)

    def drain(self) -> None:
        """Lets connections end with the answer that is under way; those that wait for a request end at once."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_if_idle()
        self._look_drained()

    def left(self, connection: Downstream) -> None:
        """A connection is closed, its last bytes are out."""
        self.connections.discard(connection)
        self._look_drained()

    def _look_drained(self) -> None:
        if self.draining and not self.connections:
            self.drained.set()

    def wake(self) -> None:
        """Lets the waiting requests look again; called when a worker changed."""
        waiting, self.waiting = self.waiting, {}
        for relay in waiting:
            relay.woken()

    def unanswered(self) -> Unanswered:
        """What is waiting for its first byte now. Walks over all connections: for a timer, not for each request."""
        now = self.clock()
        requests = held = size = 0
        oldest = 0.0
        for connection in self.connections:
            waits = connection.unanswered()
            if waits is not None:
                since, missing, here = waits
                requests += 1
                held += here
                size += missing
                oldest = max(oldest, now - since)
        return Unanswered(requests, held, size, oldest)

    def sweep(self) -> None:
        """Ends what is over its time. Called four times a second: a timer per request would cost more than it tells."""
        now = self.clock()
        for connection in [c for c in self.connections if c.deadline <= now]:
            connection.overdue(now)
        self.upstream.trim()
