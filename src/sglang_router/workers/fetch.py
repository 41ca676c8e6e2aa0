"""Requests of the router itself to one target: health checks, questions to engines, the control plane, webhooks.

    fetched = await fetch(pool, worker.target, b"GET", b"/health", timeout=5.0)
    fetched.status, fetched.headers, fetched.body

They use the same connections as inference requests, and the target's own key. One future per request is cheap enough
here.
"""

from __future__ import annotations

import asyncio

import msgspec

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.upstream import Opening, UpstreamConnection
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.wire.framing import Framing
from sglang_router.wire.gathering import Body
from sglang_router.wire.headers import via
from sglang_router.wire.response import ResponseHead

MOST_ANSWER = 64 << 20
"""Bytes of an answer, unless the caller says otherwise."""


class Fetched(msgspec.Struct):
    """A whole answer. `headers`: names in lower case; `body`: without the chunked coding."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300


class Sent(msgspec.Struct, frozen=True):
    """How a request is sent that is made for a client.

    authorization  the client's, for a target without a key of its own
    via            the client's: who passed this on before, so that what goes in a circle is noticed
    once           on a new connection, because it must not be sent twice
    """

    content_type: bytes = b"application/json"
    authorization: bytes | None = None
    via: bytes = b""
    once: bool = False


_PLAIN = Sent()


class FetchError(Exception):
    """There is no whole answer; `outcome` says how it failed, the text why."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


class Collector:
    """A sink that gathers one answer of at most `max_bytes`."""

    decoding = True
    bodyless = False

    def __init__(self, answer: asyncio.Future[Fetched], max_bytes: int) -> None:
        self.answer = answer
        self.connection: UpstreamConnection | Opening | None = None
        self._max_bytes = max_bytes
        self._head: ResponseHead | None = None
        self._parts: list[bytes] = []
        self._size = 0

    def connected(self, connection: UpstreamConnection) -> None:
        """Keep the new connection, to abort it if the answer is too large."""
        self.connection = connection

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        """Keep the head."""
        self._head = head
        self.data(data, done)

    def data(self, data: bytes, done: bool) -> None:
        """Collect bytes; set the answer at the end, or fail when there are too many."""
        self._parts.append(data)
        self._size += len(data)
        if self.answer.done():
            return
        if done:
            assert self._head is not None
            self.answer.set_result(Fetched(self._head.status, self._head.headers, b"".join(self._parts)))
        elif self._size > self._max_bytes and self.connection is not None:
            self.connection.abort()
            self.broken(Outcome.INVALID, f"The worker's answer is larger than {self._max_bytes} bytes.")

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Fail with FetchError."""
        if not self.answer.done():
            self.answer.set_exception(FetchError(outcome, detail))


async def fetch(
    pool: ConnectionPool,
    target: Target,
    method: bytes,
    path: bytes,
    *,
    body: Body = b"",
    sent: Sent = _PLAIN,
    timeout: float,
    max_bytes: int = MOST_ANSWER,
) -> Fetched:
    """Send one request with the target's key and return the whole answer. `path` may have a query.

    Raises: FetchError when there is no answer within `timeout` seconds, or it has more than `max_bytes`.
    """
    head = head_for(pool, target, method, path, body, sent)
    try:
        return await ask_once(pool, target, head, body, timeout=timeout, max_bytes=max_bytes, fresh=sent.once)
    except FetchError as exc:
        if exc.outcome is not Outcome.STALE:
            raise
    return await ask_once(pool, target, head, body, timeout=timeout, max_bytes=max_bytes, fresh=True)


def head_for(pool: ConnectionPool, target: Target, method: bytes, path: bytes, body: Body, sent: Sent) -> bytes:
    """Return the head of a request with this body, with the target's key."""
    fields = [b"content-length: %d\r\n" % len(body)]
    if body:
        fields += (b"content-type: ", sent.content_type, b"\r\n")
    if target.key is None and sent.authorization is not None:
        fields += (b"authorization: ", sent.authorization, b"\r\n")
    if sent.via:
        fields += (b"via: ", sent.via, b"\r\n")
    return head_of(pool, target, method, path, *fields)


def head_of(pool: ConnectionPool, target: Target, method: bytes, path: bytes, *fields: bytes) -> bytes:
    """Return the head of a request with the target's key. fields: further header lines, each with its end."""
    key = () if target.key is None else (b"authorization: Bearer ", target.key, b"\r\n")
    return b"".join((pool.origin(target).start(method, path), *fields, *key, via(pool.mark), b"\r\n"))


async def ask_once(
    pool: ConnectionPool,
    target: Target,
    head: bytes,
    body: Body,
    *,
    timeout: float,
    max_bytes: int,
    fresh: bool = False,
) -> Fetched:
    """Send these bytes once and return the whole answer; `fresh`: on a new connection.

    Raises: FetchError. Its outcome is STALE when a kept connection had been closed: then send again, `fresh`.
    """
    collector = Collector(asyncio.get_running_loop().create_future(), max_bytes)
    collector.connection = pool.send(target, collector, head, body, fresh=fresh)
    try:
        return await asyncio.wait_for(collector.answer, timeout)
    except (TimeoutError, asyncio.TimeoutError):
        connected = isinstance(collector.connection, UpstreamConnection)
        collector.connection.abort()
        if connected:
            raise FetchError(Outcome.TIMEOUT, f"No answer within {timeout:g} s.") from None
        raise FetchError(Outcome.UNCONNECTED, pool.late(target, timeout)) from None
    except asyncio.CancelledError:
        collector.connection.abort()
        raise
