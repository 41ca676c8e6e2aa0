"""What all client connections share: the decision room, the way to the workers, the clock, the rules.

One object, built once in `server.py` and handed down; nothing in `net` looks anything up elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_router.core.access import Access, Kind, credentials_of
from sglang_router.errors import AccessRefused
from sglang_router.wire.request import Headers, Limits

if TYPE_CHECKING:
    import random

    from sglang_router.core.admission import Admission
    from sglang_router.core.events import Listener
    from sglang_router.core.request import Endpoint
    from sglang_router.core.resume import ResumeRules
    from sglang_router.core.router import Router
    from sglang_router.core.worker import Worker
    from sglang_router.net.downstream import Downstream
    from sglang_router.net.relay import Relay
    from sglang_router.net.upstream import Upstream
    from sglang_router.wire.cors import Cors
    from sglang_router.wire.request import Request

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
    still starts; queue: for a place, or for a worker with room; first_byte: of a stream; chunk: the longest silence of
    a worker inside its answer."""

    head: float = 30.0
    body: float = 60.0
    idle: float = 75.0
    request: float = 1800.0
    starting: float = 10.0
    queue: float = 60.0
    first_byte: float = 300.0
    chunk: float = 300.0


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
    """See the module.

    prod           asks for a health check of a worker at once
    admission      limits on places and rate; None: there are none
    resuming       which streams another worker continues when theirs dies; None: none
    access         who may ask what; the app looks after its own paths
    cors           the web pages that may read answers; None: nothing is said of that
    most_waiting   requests that may wait for a worker to start
    most_queued    requests that may wait for a worker to have room
    most_buffered  bytes of requests held at once; beyond that reading pauses
    most_connections  of clients and to workers, together; further clients are refused
    """

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
        admission: Admission[Relay] | None = None,
        resuming: ResumeRules | None = None,
        access: Access | None = None,
        cors: Cors | None = None,
        most_waiting: int = 4096,
        most_queued: int = 100,
        most_buffered: int = 1 << 62,
        most_connections: int = 1 << 62,
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
        self.admission = admission
        self.resuming = resuming
        self.access = access or Access()
        self.guarded = self.access.consumes_key  # clients need a key
        self.cors = cors
        self.most_waiting = most_waiting
        self.most_queued = most_queued
        self.most_buffered = most_buffered
        self.most_connections = most_connections
        self.buffered = 0  # bytes that clients have sent and that are not done with
        self.held_up: OrderedDict[Downstream, None] = OrderedDict()  # connections that are not read for that
        self.clock = time.monotonic
        self.rng = rng
        self.draining = False
        self.farewell = 0.0  # while draining: seconds that a kept connection has for a last request
        self.connections: set[Downstream] = set()
        self.active = 0  # requests under way
        self.drained = asyncio.Event()  # no new connections come, and the last one is closed
        self.waiting: OrderedDict[Relay, None] = OrderedDict()  # requests that no worker can take yet, in order
        self._letting_in = False
        # What a request's headers may tell: an id (the place in the order of preference), or one of the two below.
        self.watched = {name.lower().encode(): place for place, name in enumerate(request_id_headers)}
        self.watched[b"x-smg-routing-key"] = ROUTING_KEY
        self.watched[b"content-encoding"] = CONTENT_ENCODING

    def admit(self, request: Request, has_body: bool) -> None:
        """Refuses a request before its body comes: a stranger must not fill the memory.

        On paths of the app, which are checked there, only whoever may change things needs to send a body.
        """
        inference = request.method == b"POST" and request.path in self.endpoints
        if inference or has_body:
            kind = Kind.INFERENCE if inference else Kind.CONTROL_CHANGE
            try:
                request.client = self.access.check(kind, credentials_of(request.headers), local=True).id
            except AccessRefused as error:
                request.refusal = error.with_traceback(None)  # its frames would hold the request: a cycle

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

    def drain(self, farewell: float = 0.0) -> None:
        """Lets connections end with the answer that is under way; those that wait for a request end at once, or when
        none came for `farewell` seconds. Then no connection ends whose client was not told so by its last answer."""
        self.draining = True
        self.farewell = farewell
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
        waiting, self.waiting = self.waiting, OrderedDict()
        for relay in waiting:
            relay.woken()

    @property
    def queued(self) -> int:
        """Requests that wait here: for a place, or for a worker."""
        return len(self.waiting) + (len(self.admission.waiting) if self.admission is not None else 0)

    def room(self) -> None:
        """A worker has one request less: the first of those that wait may go there."""
        if not self._letting_in:
            self._letting_in = True
            self.loop.call_soon(self._let_in)

    def _let_in(self) -> None:
        self._letting_in = False
        fleet = self.router.fleet
        while self.waiting and fleet.candidates(self.clock()):
            relay, _ = self.waiting.popitem(last=False)
            relay.woken()

    def read_on(self) -> None:
        """Lets the first of the connections that are held up send more, if there is room."""
        if self.held_up and self.buffered < self.most_buffered:
            connection, _ = self.held_up.popitem(last=False)
            connection.read_on()

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
        self.read_on()
        self.upstream.trim()
