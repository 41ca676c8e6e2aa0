"""Questions of the router itself to one worker: health checks, the control plane.

    answer = await fetch(upstream, worker, b"GET", b"/health", timeout=5.0)

Here a future per question is fine. It goes over the same connections as inference, with the worker's own key.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.worker import Outcome

if TYPE_CHECKING:
    from sglang_router.core.worker import Worker
    from sglang_router.net.upstream import Connection, Opening, Upstream
    from sglang_router.wire.response import Framing, ResponseHead


class Answer(msgspec.Struct):
    """A whole answer of a worker."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class FetchError(Exception):
    """A worker gave no answer; `outcome` says how."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


class Collector:
    """A Sink that gathers one answer, for the control plane and the health checks."""

    decoding = True

    def __init__(self, answer: asyncio.Future[Answer], most: int) -> None:
        self.answer = answer
        self._most = most
        self._head: ResponseHead | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self.leg: Connection | Opening | None = None

    def sent_on(self, connection: Connection) -> None:
        self.leg = connection

    def begin(self, head: ResponseHead, framing: Framing, data: bytes, done: bool) -> None:
        self._head = head
        self.data(data, done)

    def data(self, data: bytes, done: bool) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self.answer.done():
            return
        if done:
            assert self._head is not None
            self.answer.set_result(Answer(self._head.status, self._head.headers, b"".join(self._parts)))
        elif self._size > self._most and self.leg is not None:
            self.leg.abort()
            self.broken(Outcome.INVALID, f"The worker's answer is larger than {self._most} bytes.")

    def broken(self, outcome: Outcome, detail: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(FetchError(outcome, detail))


async def fetch(
    upstream: Upstream,
    worker: Worker,
    method: bytes,
    target: bytes,
    *,
    body: bytes = b"",
    content_type: bytes = b"application/json",
    timeout: float,
    most: int = 64 << 20,
) -> Answer:
    """Asks one worker, with its own key, and returns the whole answer.

    Raises: FetchError when there is none within `timeout` seconds.
    """
    lines = [upstream.origin(worker).start(method, target), b"content-length: %d\r\n" % len(body)]
    if body:
        lines += (b"content-type: ", content_type, b"\r\n")
    if worker.key is not None:
        lines += (b"authorization: Bearer ", worker.key, b"\r\n")
    head = b"".join((*lines, b"\r\n"))
    loop = asyncio.get_running_loop()
    for fresh in (False, True):
        collector = Collector(loop.create_future(), most)
        collector.leg = upstream.send(worker, collector, head, body, fresh=fresh)
        try:
            return await asyncio.wait_for(collector.answer, timeout)
        except FetchError as exc:
            if exc.outcome is not Outcome.STALE or fresh:
                raise
        except (TimeoutError, asyncio.TimeoutError):
            collector.leg.abort()
            raise FetchError(Outcome.TIMEOUT, f"No answer within {timeout:g} s.") from None
        except asyncio.CancelledError:
            collector.leg.abort()
            raise
    raise AssertionError("a fresh connection is never stale")
