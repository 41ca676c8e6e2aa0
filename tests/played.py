"""A router on the test's own event loop, between clients and workers that the test plays by hand.

    async with Play(workers=2) as play:
        client = await play.client()
        await client.send(post("/generate", b'{"text":"hello"}'))
        leg = await play.leg()                      # the connection on which a worker got the request
        await leg.answer(200, b"{}")
        assert (await client.response()).status == 200

Sockets are real (loopback); the test decides what the peers do. At the end of the block everything must be at rest: no
load, no request in flight, each accepted request finished exactly once.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, NamedTuple, cast

import uvloop

from sglang_router.app.build import Seams, build
from sglang_router.config import RouterArgs
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.deadlines import Due
from sglang_router.routing.decider import Decider
from sglang_router.routing.endpoints import ENDPOINTS, Endpoint
from sglang_router.routing.events import Finished, FirstByte, Listener, Routed, WorkerChanged
from sglang_router.routing.router import Router
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker
from sglang_router.workers.engine_survey import EngineSurvey
from sglang_router.workers.health_checks import HealthChecks

PATIENCE = 10.0
"""Seconds after which a test that waits fails."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run an async test on the event loop that the product uses."""
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    """Return a POST request with a JSON body."""
    lines = [f"POST {path} HTTP/{version}", "Host: router", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def narrow(sock: socket.socket, size: int = 1 << 16) -> None:
    """Give a connection small buffers that stay small, whatever the system would choose. size: bytes of each."""
    for which in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, which, size)


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
        """Return start line and fields of the next message."""
        data = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE)
        start, *lines = data.decode("latin-1").rstrip().split("\r\n")
        fields = [line.partition(": ") for line in lines]
        return start, [(name.lower(), value) for name, _, value in fields]

    async def exactly(self, count: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(count), PATIENCE)

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), PATIENCE)

    async def rest(self) -> bytes:
        """Return everything until the other side closes."""
        try:
            return await asyncio.wait_for(self.reader.read(), PATIENCE)
        except ConnectionResetError:
            return b""

    async def closed(self) -> None:
        """Return when the other side has closed; fail if it sent anything else."""
        assert await self.rest() == b""

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with RST, as a killed process with unread bytes does."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Client(Peer):
    """The client's end of a connection."""

    async def response(self) -> Response:
        """Return the next response, decoded; `complete` says whether it ended as its head announced."""
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
        """Return the next chunk of a stream."""
        data = await self.exactly(int(await self.until(b"\r\n"), 16))
        assert await self.exactly(2) == b"\r\n"
        return data


class Leg(Peer):
    """A worker's end of a connection that has carried a request."""

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
        """Read the next request on this connection."""
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
    """A listening worker. The test gets the connections that carried a request, in the order of the requests."""

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
        """Listen; after `refuse`, on the same port again."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=1 << 27)
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Refuse connections from now on; existing ones stay."""
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
        self.firsts: list[FirstByte] = []
        self.changes: list[WorkerChanged] = []

    def routed(self, event: Routed) -> None:
        self.routes.append(event)

    def first_byte(self, event: FirstByte) -> None:
        self.firsts.append(event)

    def finished(self, event: Finished) -> None:
        self.ends.append(event)

    def worker_changed(self, event: WorkerChanged) -> None:
        self.changes.append(event)


class HandClock:
    """A clock that only the test moves, so that no limit passes because a machine is slow."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoChecks(HealthChecks):
    """Health checks that are never made; `asked` records the workers for which one was requested."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.asked: list[Worker] = []

    def start(self, worker: Worker) -> None:
        """Do nothing: the test sets the health of a worker."""

    def check_now(self, worker: Worker) -> None:
        self.asked.append(worker)


class NoSurvey(EngineSurvey):
    """An engine survey without questions to engines."""

    def start(self, worker: Worker) -> None:
        """Do nothing: the test sets what an engine reports."""


async def no_app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("this play has no control plane")


QUICK: dict[str, Any] = {
    "policy": "round_robin",
    "retry_initial_backoff_ms": 1,
    "retry_max_backoff_ms": 10,
    "connect_timeout_secs": 5.0,
    "slow_start_secs": 0.0,
    "disable_outlier_ejection": True,
    "max_concurrent_requests": -1,
}


class Play:
    """See the module.

    healthy    False: the workers stay in health STARTING
    app        the control plane
    decider    returns the decider that the relay asks
    endpoints  the relayed endpoints
    clock      of the router
    options    further options of the router
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        healthy: bool = True,
        app: Any = no_app,
        decider: Callable[[Router], Decider] = lambda router: router,
        endpoints: Mapping[bytes, Endpoint] = ENDPOINTS,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        loop = asyncio.get_running_loop()
        seams = Seams(
            clock=clock,
            rng=random.Random(1),
            endpoints=endpoints,
            decider=decider,
            checks=NoChecks,
            survey=NoSurvey,
            app=app,
        )
        self.app = built = build(RouterArgs(**{**QUICK, **options}), loop, seams=seams)
        self._count, self._healthy = workers, healthy
        self._clients: list[Client] = []
        self._seen: list[Leg] = []
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self.loop = loop
        self.legs: asyncio.Queue[Leg] = asyncio.Queue()
        self.played: list[PlayedWorker] = []
        self.workers: list[Worker] = []
        self.events = Recorder()
        self.clock = built.clock
        self.fleet = built.fleet
        self.router = built.router
        self.clients = built.clients
        self.connections = built.connections
        assert isinstance(built.checks, NoChecks)
        self.checked = built.checks.asked
        built.listeners.add(self.events)

    async def __aenter__(self) -> Play:
        for _ in range(self._count):
            await self.add_worker()
        self._server = await self.loop.create_server(
            lambda: cast("asyncio.Protocol", ClientConnection(self.app.frontend)), "127.0.0.1", 0
        )
        self._sweep()
        self.app.relay.aborts.again = ()  # no leg that the test does not expect, however slow the machine is
        return self

    def _sweep(self) -> None:
        self.clients.sweep()
        self._sweeper = self.loop.call_later(0.01, self._sweep)

    async def add_worker(self, key: str | None = None) -> Worker:
        """Add a worker, listening and (unless healthy=False) healthy."""
        played = PlayedWorker(self.legs)
        await played.listen()
        self.played.append(played)
        worker = self.fleet.add(WorkerSpec(url=played.url, api_key=key), self.clock())
        if self._healthy:
            self.fleet.probed(worker, None, self.clock())
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
        await self.connections.close()
        await self.until(lambda: not self.connections.open and not self.clients.connections)
        await self.until(lambda: all(played.idle for played in self.played))

    async def client(self, limit: int = 1 << 27) -> Client:
        """Open a connection; its end buffers up to twice `limit` bytes that were not read."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port, limit=limit))
        self._clients.append(client)
        return client

    def narrow(self, client: Client, size: int = 1 << 16) -> ClientConnection:
        """Give the only client's connection small socket buffers; return the router's end of it."""
        (connection,) = self.clients.connections
        assert isinstance(connection, ClientConnection)
        for writer in (client.writer, connection.transport):
            narrow(writer.get_extra_info("socket"), size)
        return connection

    async def leg(self) -> Leg:
        """Return the next request that reached a worker."""
        leg = await asyncio.wait_for(self.legs.get(), PATIENCE)
        self._seen.append(leg)
        return leg

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when a condition holds; the loop runs meanwhile."""

        async def turning() -> None:
            while not holds():  # noqa: ASYNC110  # what is waited for is the router's, which has no event for it
                await asyncio.sleep(0.001)

        await asyncio.wait_for(turning(), PATIENCE)

    async def ended(self, count: int) -> list[Finished]:
        """Return all Finished events, once there are that many."""
        await self.until(lambda: len(self.events.ends) >= count)
        return self.events.ends

    async def at_rest(self) -> None:
        """Return when nothing is in flight any more; fail when something stays, or a request ended twice."""
        await self.until(lambda: not self.clients.active and not any(worker.load for worker in self.workers))
        await self.until(
            lambda: not self.clients.budget.held or any(c.deadline[0] is Due.BODY for c in self.clients.connections)
        )
        assert not len(self.router.queue)
        assert not self.app.relay.queued
        assert not self.router.leases
        assert not self.clients.budget.held
        ids = [end.tag.id for end in self.events.ends if end.tag.route.endpoint]
        assert len(ids) == len(set(ids)), "a request ended twice"
