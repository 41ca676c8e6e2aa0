"""A router process between a worker that can lie and abusive clients; and a polite client, to see who is affected.

    with arena("--max-payload-size", "1000") as field:
        field.worker.lies["short"] = b"HTTP/1.1 200 OK\\r\\nContent-Length: 9\\r\\n\\r\\nhi"
        with field.polite() as polite:                  # sends one request after the other, and measures the waits
            with field.connect() as client:
                client.send(post("/generate?lie=short"))
                client.answer().complete                # False
        polite.longest                                  # seconds

The command is the one users start. The worker runs on an event loop in a thread of the test, so the test sees all that
it does; `field.settle()` returns when the router has read everything that was sent before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from typing import BinaryIO, NamedTuple
from urllib.parse import parse_qs, urlsplit

from routers import RouterProcess, router_process

PATIENCE = 20.0
"""Seconds after which a test that waits fails; a busy machine is slow."""
POLITE = 5.0
"""Seconds a polite client may wait while others misbehave. Loose, so that a busy machine passes; a router that hangs
would exceed any limit. `scripts/hostile` shows the real figures."""
SERVED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_MODELS = b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'
_TOLD = {
    "/health": SERVED,
    "/v1/models": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(_MODELS), _MODELS),
}
_KEPT = 1 << 16
_MOST = 1 << 28
"""Most bytes of a body that a client here reads."""


def post(target: str, body: bytes = b'{"text": "x"}', *fields: str) -> bytes:
    """Return the bytes of a POST request."""
    lines = [f"POST {target} HTTP/1.1", "Host: router", *fields, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


# -- the worker --------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A request as it reached the worker. `body` is empty where `size` is large."""

    target: str
    body: bytes
    size: int
    connection: int
    """The number of the connection; a number that occurs twice is a connection that was used again."""
    head: str
    """Request line and fields."""


class Leg:
    """The worker's end of one exchange, as a lie sees it."""

    def __init__(self, worker: LyingWorker, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._worker = worker
        self._name = name
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send, and wait while the router does not read."""
        self.writer.write(data)
        await self.writer.drain()
        self._worker.sent[self._name] += len(data)

    async def settle(self) -> None:
        """Return when the router has read what was sent."""
        await asyncio.to_thread(self._worker.settle)

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def hung_up(self) -> None:
        """Return when the router has closed the connection."""
        with contextlib.suppress(ConnectionError):
            await self.reader.read()


Lie = Callable[[Leg], Awaitable[None]]


class LyingWorker:
    """Healthy and honest, unless the request says `?lie=NAME`: then it does what `lies[NAME]` says.

    Bytes are sent as they are, and then the connection is closed. A function may do anything, and the connection is
    kept when it returns. A lie whose name begins with `early` does not wait for the body.
    """

    def __init__(self) -> None:
        self.lies: dict[str, bytes | Lie] = {}
        self.asked: list[Asked] = []
        self.sent: Counter[str] = Counter()
        """Bytes of each lie that the router has read."""
        self.hurry = b""
        """Sent on each new connection, before any request."""
        self.settle: Callable[[], None] = lambda: None
        """See `Arena.settle`."""
        self.port = 0
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._lying: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self) -> dict[str, list[bytes]]:
        """Return the bodies of inference requests, by target."""
        found = defaultdict(list)
        for asked in list(self.asked):
            found[asked.target].append(asked.body)
        return dict(found)

    def until_honest(self) -> None:
        """Wait until every lie is told, and the connections that one closes are closed; poll, as for a process."""
        deadline = time.monotonic() + PATIENCE
        while self._lying:
            assert time.monotonic() < deadline, "a lie does not end"
            time.sleep(0.001)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections += 1
        number = self._connections
        try:
            # asyncio's streams report a cancelled handler as an error, so it ends quietly instead.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                if self.hurry:
                    writer.write(self.hurry)
                while await self._exchange(number, reader, writer):
                    pass
                writer.close()
                await writer.wait_closed()
        finally:
            writer.transport.abort()
            self._tasks.discard(task)
            self._lying.discard(task)

    async def _exchange(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.rstrip().split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(fields.get("content-length", "0"))
        assert "transfer-encoding" not in fields
        method, target, _ = start.split(" ")
        parts = urlsplit(target)
        lie = self.lies.get(name := parse_qs(parts.query).get("lie", [""])[0])
        if method == "GET":
            writer.write(_TOLD.get(parts.path, b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"))
            return True
        leg = Leg(self, name, reader, writer)
        if name.startswith("early") and callable(lie):
            await lie(leg)
            return False
        body = await self._body(reader, size)
        self.asked.append(Asked(target, body, size, number, head))
        task = asyncio.current_task()
        assert task is not None
        if lie is not None:
            self._lying.add(task)
        if callable(lie):
            await lie(leg)
            if not writer.is_closing():
                self._lying.discard(task)
            return True
        await leg.send(SERVED if lie is None else lie)
        return lie is None

    async def _body(self, reader: asyncio.StreamReader, size: int) -> bytes:
        if size <= _KEPT:
            return await reader.readexactly(size)
        while size:
            size -= len(await reader.readexactly(min(size, _KEPT)))
        return b""

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def lying_worker() -> Iterator[LyingWorker]:
    """Yield a LyingWorker that listens."""
    worker, loop = LyingWorker(), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(worker.serve, "127.0.0.1", 0, limit=1 << 18, backlog=2048))
    worker.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(worker.stop(), loop).result(PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


# -- the clients -------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool
    """False when the connection ended before the answer did."""

    @property
    def code(self) -> str:
        """The router's own error code; empty for a worker's answer."""
        return self.headers.get("x-smg-error-code", "")


class Kept:
    """A file that keeps what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self.got = b""
        self._file = file

    def readline(self) -> bytes:
        return self._keep(self._file.readline())

    def read(self, size: int = -1) -> bytes:
        return self._keep(self._file.read(size))

    def close(self) -> None:
        self._file.close()

    def _keep(self, data: bytes) -> bytes:
        self.got += data
        return data


class Client:
    """A connection to the router, written and read by hand. `kept`: all that came, with `keep`."""

    def __init__(self, port: int, *, receive_buffer: int = 0, keep: bool = False) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.kept = Kept(file := self.sock.makefile("rb"))
        self._file: BinaryIO | Kept = self.kept if keep else file

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> bool:
        """Send; return False when the router accepts no more: its answer can still be read."""
        try:
            self.sock.sendall(data)
        except ConnectionError:
            return False
        return True

    def answer(self, method: str = "POST") -> Answer | None:
        """Return the next answer that is not an interim one; None when the connection ends instead."""
        try:
            status = 100
            while 100 <= status < 200:
                line = self._file.readline()
                if not line:
                    return None
                status = int(line.split(b" ")[1])
                headers = dict(self._fields())
            return Answer(status, headers, *self._body(headers, method == "HEAD" or status in (204, 304)))
        except ConnectionError:
            return None

    def _fields(self) -> Iterator[tuple[str, str]]:
        while (line := self._file.readline().rstrip(b"\r\n")) != b"":
            name, _, value = line.decode("latin-1").partition(":")
            yield name.lower(), value.strip()

    def _body(self, headers: dict[str, str], bodyless: bool) -> tuple[bytes, bool]:
        if bodyless:
            return b"", True
        body = b""
        try:
            if "content-length" in headers:
                size = int(headers["content-length"])
                body = self._file.read(min(size, _MOST))
                return body, len(body) == size
            if headers.get("transfer-encoding") != "chunked":
                return self._file.read(), True
            while size := int(self._file.readline().partition(b";")[0] or b"-1", 16):
                data = self._file.read(min(max(size, 0), _MOST) + 2)
                body += data[:size]
                if len(data) != size + 2:
                    return body, False
            while line := self._file.readline():
                if line == b"\r\n":
                    return body, True
        except ConnectionError:
            pass
        return body, False

    def ended(self) -> bool:
        """Wait for the end of the connection; return False if anything else comes."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class Polite:
    """A client that sends a request, waits for the answer, and repeats. `waits` in seconds."""

    def __init__(self, port: int, request: bytes = b"", status: int = 200) -> None:
        self._request = request or post("/generate", b'{"text": "polite"}')
        self._status = status
        self.waits: list[float] = []
        self.failures: list[object] = []
        self._port = port
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    @property
    def longest(self) -> float:
        return max(self.waits)

    def _ask(self) -> None:
        with Client(self._port) as client:
            while True:
                begun = time.monotonic()
                client.send(self._request)
                answer = client.answer()
                self.waits.append(time.monotonic() - begun)
                if answer is None or answer.status != self._status:
                    self.failures.append(answer)
                if self.failures or self._enough.wait(0.002):
                    return

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._enough.set()
        self._thread.join(PATIENCE + 1)


# -- both sides --------------------------------------------------------------------------------------------------------


class Arena:
    """See the module."""

    def __init__(self, router: RouterProcess, worker: LyingWorker) -> None:
        self.router = router
        self.worker = worker
        self.port = urlsplit(router.url).port or 0
        self._barrier = self.connect()
        self._one_at_a_time = threading.Lock()
        worker.settle = self.settle

    def connect(self, receive_buffer: int = 0) -> Client:
        return Client(self.port, receive_buffer=receive_buffer)

    def ask(self, raw: bytes) -> Answer:
        """Send one request on a connection of its own; return its answer."""
        with self.connect() as client:
            client.send(raw)
            answer = client.answer()
        assert answer is not None, "the router closed without an answer"
        return answer

    def settle(self) -> None:
        """Return when the router's event loop has run twice: it has read what had been sent before."""
        with self._one_at_a_time:  # a lie may still wait when the test is done with it
            for _ in range(2):
                self._turn()

    def _turn(self) -> None:
        """Get one answer of the router itself, on a connection that is kept as long as the router keeps it."""
        self._barrier.send(post("/generate", b"no JSON"))
        answer = self._barrier.answer()
        if answer is None:
            self._barrier.close()
            self._barrier = self.connect()
            self._turn()
            return
        assert answer.code == "json_parse_error"

    def close(self) -> None:
        self._barrier.close()

    @contextlib.contextmanager
    def polite(self) -> Iterator[Polite]:
        """Yield a polite client; it must be served throughout the block."""
        polite = Polite(self.port)
        polite.start()
        try:
            yield polite
        finally:
            polite.stop()
        assert not polite.failures, polite.failures
        assert polite.waits
        assert polite.longest < POLITE

    @property
    def rss(self) -> int:
        """Return the resident memory of the router, in bytes."""
        with open(f"/proc/{self.router.process.pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def sockets(self) -> int:
        """Return the number of open descriptors of the router."""
        return len(os.listdir(f"/proc/{self.router.process.pid}/fd"))

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition of the other processes holds; poll, because no event reports it."""
        self.router.until(holds, PATIENCE)


@contextlib.contextmanager
def arena(*flags: str) -> Iterator[Arena]:
    """Yield a router before one LyingWorker; it must end cleanly. No retry and no breaker hides what a lie does."""
    plain = ("--disable-retries", "--disable-circuit-breaker", "--disable-access-log")
    with (
        lying_worker() as worker,
        router_process([worker.url], *plain, *flags) as router,
        contextlib.closing(Arena(router, worker)) as field,
    ):
        yield field
