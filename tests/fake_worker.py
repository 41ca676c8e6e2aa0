"""A worker that follows a script, errors included: a raw HTTP server on the test's own event loop.

    worker = FakeWorker({"GET /health": answer(200), "GET /get_load": HANG, "POST /flush_cache": b"nonsense"})
    await worker.start()                       # worker.url
    ...
    worker.script["GET /health"] = answer(503)   # from now on
    await worker.asked("GET /health", 3)         # returns after the third such request

Requests that are not in the script are answered with 404. HANG never answers, CLOSE closes without an answer; a `Gate`
answers when the test opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

HANG = b"HANG"
CLOSE = b"CLOSE"


class Seen(NamedTuple):
    """A request as it came."""

    route: str
    """Method and target."""
    headers: dict[str, str]
    body: bytes


class Gate:
    """An answer that is held back until `open.set()`."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.open = asyncio.Event()


def answer(status: int, body: Any = b"", content_type: str = "") -> bytes:
    """Return a complete HTTP response. A body that is not bytes is sent as JSON."""
    if not isinstance(body, bytes):
        body, content_type = json.dumps(body).encode(), content_type or "application/json"
    content: bytes = body
    fields = f"content-type: {content_type or 'text/plain'}\r\ncontent-length: {len(content)}\r\n"
    return f"HTTP/1.1 {status} X\r\n{fields}\r\n".encode() + content


class FakeWorker:
    """See the module. It is healthy unless the script says otherwise."""

    def __init__(self, script: Mapping[str, bytes | Gate] | None = None) -> None:
        self.script: dict[str, bytes | Gate] = {"GET /health": answer(200), **(script or {})}
        self.seen: list[Seen] = []
        self.port = 0
        self._up = False
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; after `stop`, on the same port again."""
        self._up = True
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections, and close existing ones and one that is just being accepted."""
        self._up = False
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def hung_up(self) -> None:
        """Wait until no client is connected."""

        async def none_left() -> None:
            while self._tasks:
                await self._next()

        await asyncio.wait_for(none_left(), 10.0)

    def reply_to(self, seen: Seen, scripted: bytes | Gate) -> bytes | Gate:
        """Return what answers a request. scripted: what the script has for it."""
        return scripted

    def count(self, route: str) -> int:
        return sum(seen.route == route for seen in self.seen)

    async def asked(self, route: str, times: int = 1) -> None:
        """Wait until such a request came `times` times in all."""

        async def enough() -> None:
            while self.count(route) < times:
                await self._next()

        await asyncio.wait_for(enough(), 10.0)

    async def _next(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not self._up:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            # asyncio's streams report a cancelled handler as an error, so it ends quietly instead.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)
            self._news.set()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.rstrip().split("\r\n")
        fields = (line.split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in fields}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = start.split(" ")
        route = f"{method} {target}"
        self.seen.append(Seen(route, headers, body))
        self._news.set()
        reply = self.reply_to(self.seen[-1], self.script.get(route, answer(404)))
        if isinstance(reply, Gate):
            await reply.open.wait()
            reply = reply.answer
        if reply is HANG:
            await reader.read()  # until the router closes
        if reply in (HANG, CLOSE):
            return False
        writer.write(reply)
        await writer.drain()
        return True
