"""An answer to a request of the router itself that is read part by part: it may be long, or come slowly.

    answer = await open_answer(pool, target, b"GET", b"/logs", timeout=5.0)
    answer.status, answer.headers
    async for part in answer.parts(5.0): ...
    answer.close()                              in any case

While nobody takes its parts, the connection is not read. `workers.fetch` gathers a whole answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.upstream import Opening, UpstreamConnection
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.wire.framing import Framing
from sglang_router.wire.gathering import Body
from sglang_router.wire.response import ResponseHead
from sglang_router.workers.fetch import FetchError, Sent, head_for

_MOST_HELD = 1 << 18
"""Bytes of parts that nobody has taken, above which the connection is not read."""


class Streamed:
    """See the module. It is a sink of `relay.upstream`.

    status   of the answer; headers: its fields, names in lower case
    """

    decoding = True
    bodyless = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.connection: UpstreamConnection | Opening | None = None
        self._begun: asyncio.Future[None] = loop.create_future()
        self._parts: deque[bytes] = deque()
        self._held = 0
        self._paused = self._done = False
        self._error: FetchError | None = None
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Streamed {self.status}: {self._held} bytes held{', all' * self._done}>"

    # -- called by the connection --------------------------------------------------------------------------------------

    def connected(self, connection: UpstreamConnection) -> None:
        """Keep the new connection."""
        self.connection = connection

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        """Take the head, with the first bytes of the body."""
        self.status, self.headers = head.status, head.headers
        if not self._begun.done():
            self._begun.set_result(None)
        self.data(data, done)

    def data(self, data: bytes, done: bool) -> None:
        """Take a part; do not read on when nobody takes them."""
        if data:
            self._parts.append(data)
            self._held += len(data)
        if done:
            self._done, self.connection = True, None
        elif self._held > _MOST_HELD and not self._paused and self.connection is not None:
            self._paused = True
            self.connection.pause()
        self._news.set()

    def broken(self, outcome: Outcome, detail: str) -> None:
        """Take the end without a whole answer."""
        self.connection = None
        self._error = FetchError(outcome, detail)
        if not self._begun.done():
            self._begun.set_exception(self._error)
        self._news.set()

    # -- for the reader ------------------------------------------------------------------------------------------------

    async def begun(self, timeout: float) -> None:
        """Wait for the head. Raises: FetchError, when it does not come within so many seconds."""
        await asyncio.wait_for(asyncio.shield(self._begun), timeout)

    async def parts(self, timeout: float) -> AsyncIterator[bytes]:
        """Yield the parts of the body, without the chunked coding.

        Raises: FetchError, when the answer breaks, or nothing comes for `timeout` seconds.
        """
        while True:
            while self._parts:
                yield self._taken()
            if self._error is not None:
                raise self._error
            if self._done:
                return
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), timeout)
            except asyncio.TimeoutError:
                raise FetchError(Outcome.TIMEOUT, f"Nothing more of the answer within {timeout:g} s.") from None

    def _taken(self) -> bytes:
        part = self._parts.popleft()
        self._held -= len(part)
        if self._paused and self._held <= _MOST_HELD // 2 and self.connection is not None:
            self._paused = False
            self.connection.resume()
        return part

    def close(self) -> None:
        """Read no more; a connection whose answer is not whole closes."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()
        if not self._begun.done():
            self._begun.cancel()


async def open_answer(
    pool: ConnectionPool,
    target: Target,
    method: bytes,
    path: bytes,
    *,
    body: Body = b"",
    sent: Sent,
    timeout: float,
) -> Streamed:
    """Send one request with the target's key, on a new connection, and return the answer once its head is here.

    Raises: FetchError, when it does not come within `timeout` seconds.
    """
    answer = Streamed(asyncio.get_running_loop())
    answer.connection = pool.send(target, answer, head_for(pool, target, method, path, body, sent), body, fresh=True)
    try:
        await answer.begun(timeout)
    except (TimeoutError, asyncio.TimeoutError):
        connected = isinstance(answer.connection, UpstreamConnection)
        answer.close()
        if connected:
            raise FetchError(Outcome.TIMEOUT, f"No answer within {timeout:g} s.") from None
        raise FetchError(Outcome.UNCONNECTED, pool.late(target, timeout)) from None
    except BaseException:
        answer.close()
        raise
    return answer
