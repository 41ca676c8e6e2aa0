"""A router on the test's own event loop, between clients and workers that the test plays by hand.

    async with Play(workers=2) as play:
        client = await play.client()
        await client.send(post("/generate", b'{"text":"hello"}'))
        leg = await play.leg()                      # the connection on which a worker got the request
        await leg.answer(200, b"{}")
        assert (await client.response()).status == 200

Sockets are real (loopback); only the peers' minds are the test's. On the way out everything is checked to be back at
rest: no load, no request under way, each accepted request finished exactly once.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import uuid
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, NamedTuple

import uvloop

from sglang_router.core.events import Finished, Listener, Listeners, Routed, WorkerChanged
from sglang_router.core.fleet import Fleet
from sglang_router.core.policies import POLICIES, PolicySettings
from sglang_router.core.request import ENDPOINTS
from sglang_router.core.router import PolicyListener, RetryRules, Router
from sglang_router.core.worker import BreakerRules, Worker, WorkerSpec
from sglang_router.net.downstream import Downstream
from sglang_router.net.service import Service, Timeouts
from sglang_router.net.upstream import Upstream
from sglang_router.wire.request import Limits

PATIENCE = 10.0
"""Seconds after which something that should have happened is called missing."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs an async test on the event loop the product uses."""
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    """A POST with a JSON body."""
    lines = [f"POST {path} HTTP/{version}", "Host: router", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    """False when the connection ended before the body did."""


class Peer:
    """One end of a TCP connection, read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), PATIENCE)

    async def head(self) -> tuple[str, list[tuple[str, str]]]:
        """Start line and fields of the next message."""
        data = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE)
        start, *lines = data.decode("latin-1").rstrip().split("\r\n")
        fields = [line.partition(": ") for line in lines]
        return start, [(name.lower(), value) for name, _, value in fields]

    async def exactly(self, count: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(count), PATIENCE)

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), PATIENCE)

    async def rest(self) -> bytes:
        """Everything until the other side closes."""
        try:
            return await asyncio.wait_for(self.reader.read(), PATIENCE)
        except ConnectionResetError:
            return b""

    async def closed(self) -> None:
        """Returns when the other side has closed; fails if it sent anything else."""
        assert await self.rest() == b""

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Closes with RST, as a killed process with unread bytes does."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Client(Peer):
    """The client's end."""

    async def response(self) -> Response:
        """The next response, decoded; `complete` tells whether it ended as its head said."""
        start, fields = await self.head()
        status, headers = int(start.split(" ")[1]), dict(fields)
        assert len(headers) == len(fields), f"a field came twice: {fields}"
        if headers.get("transfer-encoding") == "chunked":
            return Response(status, headers, *await self._chunks())
        if "content-length" not in headers:
            body = b"" if status == 204 else await self.rest()
            return Response(status, headers, body, True)
        try:
            return Response(status, headers, await self.exactly(int(headers["content-length"])), True)
        except asyncio.IncompleteReadError as exc:
            return Response(status, headers, exc.partial, False)

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        try:
            while size := int(await self.until(b"\r\n"), 16):
                body += await self.exactly(size)
                assert await self.exactly(2) == b"\r\n"
            assert await self.exactly(2) == b"\r\n"
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return body, False
        return body, True

    async def chunk(self) -> bytes:
        """The next chunk of a stream."""
        data = await self.exactly(int(await self.until(b"\r\n"), 16))
        assert await self.exactly(2) == b"\r\n"
        return data


class Leg(Peer):
    """A worker's end of a connection that has brought a request."""

    def __init__(self, worker: PlayedWorker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self.worker = worker
        self.start = ""
        self.fields: list[tuple[str, str]] = []
        self.body = b""

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.fields)

    async def request(self) -> None:
        """Reads the next request on this connection."""
        self.start, self.fields = await self.head()
        self.body = await self.exactly(int(self.headers.get("content-length", "0")))

    async def answer(self, status: int, body: bytes = b"{}", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Said", "content-type: application/json", *headers]
        await self.send("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)

    async def start_stream(self, content_type: str = "text/event-stream") -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
        await self.send(head.encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")


class PlayedWorker:
    """A listening worker. Connections that brought a request are handed to the test in that order."""

    def __init__(self, legs: asyncio.Queue[Leg]) -> None:
        self._legs = legs
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        """Listens; after `refuse`, on the same port again."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=1 << 27)
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Refuses connections from now on; those there are stay."""
        assert self._server is not None
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        leg = Leg(self, reader, writer)
        try:
            await leg.request()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.transport.abort()
            return
        finally:
            self._tasks.discard(task)
        self._legs.put_nowait(leg)

    @property
    def idle(self) -> bool:
        """Whether no connection waits for its request."""
        return not self._tasks


class Recorder(Listener):
    """Keeps every event."""

    def __init__(self) -> None:
        self.routes: list[Routed] = []
        self.ends: list[Finished] = []
        self.changes: list[WorkerChanged] = []

    def routed(self, event: Routed) -> None:
        self.routes.append(event)

    def finished(self, event: Finished) -> None:
        self.ends.append(event)

    def worker_changed(self, event: WorkerChanged) -> None:
        self.changes.append(event)


class Play:
    """See the module. `healthy=False` leaves the workers starting; the rest has the meaning of the classes it goes
    to."""

    def __init__(
        self,
        workers: int = 1,
        *,
        policy: str = "round_robin",
        healthy: bool = True,
        retries: RetryRules | None = None,
        breaker: BreakerRules | None = None,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        connect_timeout: float = 5.0,
        app: Any = None,
        everything: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        rng = random.Random(1)
        listeners = Listeners()
        self._count, self._healthy = workers, healthy
        self._clients: list[Client] = []
        self._seen: list[Leg] = []
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self.loop = loop
        self.legs: asyncio.Queue[Leg] = asyncio.Queue()
        self.played: list[PlayedWorker] = []
        self.workers: list[Worker] = []
        self.prodded: list[Worker] = []
        self.events = Recorder()
        self.policy = POLICIES[policy](PolicySettings(), rng)
        self.fleet = Fleet(listeners, lambda: str(uuid.uuid4()), breaker)
        rules = retries or RetryRules(initial_backoff=0.001, max_backoff=0.01)
        self.router = Router(self.fleet, self.policy, listeners, rng, rules)
        self.upstream = Upstream(loop, connect_timeout=connect_timeout)
        self.service = Service(
            loop,
            self.router,
            self.upstream,
            listeners,
            app,
            rng,
            endpoints=ENDPOINTS,
            prod=self.prodded.append,
            timeouts=timeouts,
            limits=limits,
            forward_everything=everything,
        )
        listeners.add(PolicyListener(self.policy))
        listeners.add(self.events)

    async def __aenter__(self) -> Play:
        for _ in range(self._count):
            await self.add_worker()
        self._server = await self.loop.create_server(lambda: Downstream(self.service), "127.0.0.1", 0)
        self._sweep()
        return self

    def _sweep(self) -> None:
        self.service.sweep()
        self._sweeper = self.loop.call_later(0.01, self._sweep)

    async def add_worker(self, key: str | None = None) -> Worker:
        """One more worker, listening and (if the play says so) healthy."""
        played = PlayedWorker(self.legs)
        await played.listen()
        self.played.append(played)
        worker = self.fleet.add(WorkerSpec(url=played.url, api_key=key), self.service.clock())
        if self._healthy:
            self.fleet.probed(worker, None, self.service.clock())
        self.workers.append(worker)
        return worker

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._sweeper is not None
        self._server.close()
        for peer in [*self._clients, *self._seen]:
            peer.writer.transport.abort()
        for played in self.played:
            played.refuse()
        if kind is None:
            await self.at_rest()
        self._sweeper.cancel()
        await self.upstream.close()
        await self.until(lambda: not self.upstream.open and not self.service.connections)
        await self.until(lambda: all(played.idle for played in self.played))

    async def client(self, limit: int = 1 << 27) -> Client:
        """A new connection; its end buffers up to twice `limit` bytes nobody has read."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port, limit=limit))
        self._clients.append(client)
        return client

    async def leg(self) -> Leg:
        """The next request that reached a worker."""
        leg = await asyncio.wait_for(self.legs.get(), PATIENCE)
        self._seen.append(leg)
        return leg

    async def until(self, holds: Callable[[], bool]) -> None:
        """Returns when it holds; the loop turns meanwhile."""

        async def turning() -> None:
            while not holds():  # noqa: ASYNC110  # what is waited for is the router's, which has no event for it
                await asyncio.sleep(0.001)

        await asyncio.wait_for(turning(), PATIENCE)

    async def ended(self, count: int) -> list[Finished]:
        """All ends, once there are that many."""
        await self.until(lambda: len(self.events.ends) >= count)
        return self.events.ends

    async def at_rest(self) -> None:
        """Returns when nothing is under way any more; fails when something stays, or ended twice."""
        await self.until(lambda: not self.service.active and not any(worker.load for worker in self.workers))
        assert not self.service.waiting
        ids = [end.request_id for end in self.events.ends if end.endpoint]
        assert len(ids) == len(set(ids)), "a request ended twice"
