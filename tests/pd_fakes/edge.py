"""The edge of the wire: an HTTP/1.1 server for one fake engine, and everything that can go wrong there.

A request is handled by a task of its own, which outlives its connection: an engine does not notice that a client has
gone while its request waits. What a handler sends to a closed connection is lost.

    kill()      as kill -9: every connection is reset, nothing listens, all state is gone; `start()` is the restart
    freeze()    as SIGSTOP: connections are accepted by the system, and nothing is ever read or answered; `thaw()`
    fail(...)   the next request to a path is reset, never answered, or answered with a status
    hold(...)   the next legs stop at a stage, until the test lets them go
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from routers import free_port

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

WITHIN = 30.0
"""Seconds after which a wait fails; a busy machine is slow."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST."""


class Stage(enum.Enum):
    """Moments in the life of a leg at which a test can hold it."""

    RECEIVED = "received"
    """The request is queued; nothing has been done."""
    ADMITTED = "admitted"
    """The legs know each other; the KV cache has not moved."""
    MOVED = "moved"
    """The KV cache has moved; nothing of the answer is sent."""
    STREAMING = "streaming"
    """The first token of a streamed answer is sent."""


class Fault(enum.Enum):
    """What `EdgeServer.fail` makes of a request."""

    RESET = "reset"
    """The connection is reset once the request is read."""
    SILENT = "silent"
    """The request is never answered; the engine does not know of it."""
    CUT_HEAD = "cut in the head"
    """The connection closes within the head of the answer."""


class Request(NamedTuple):
    """A request as it came. `body` is the decoded JSON, None if it is none."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        try:
            return json.loads(self.raw)
        except ValueError:
            return None


class Reply:
    """The answer of one request, as far as its connection takes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.begun = False

    @property
    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        return self._writer.transport.is_closing() or self._reader.at_eof() or self._reader.exception() is not None

    async def whole(self, status: int, value: Any = b"", content_type: str = "") -> None:
        """Send a complete answer; a value that is not bytes goes as JSON."""
        content: bytes = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = content_type or ("text/plain" if isinstance(value, bytes) else "application/json")
        self.begun = True
        await self._send(
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
        )

    async def stream(self) -> None:
        """Begin a stream of events."""
        self.begun = True
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        await self._send(head.encode())

    async def chunk(self, data: bytes) -> None:
        await self._send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def end(self) -> None:
        await self._send(b"0\r\n\r\n")

    async def _send(self, data: bytes) -> None:
        if not self.gone:
            with contextlib.suppress(ConnectionError):
                self._writer.write(data)
                await self._writer.drain()


class Hold:
    """Stops legs at one stage, of one engine or of several. `engines` are those that have one here, in order."""

    def __init__(self) -> None:
        self.engines: list[EdgeServer] = []
        self._open = asyncio.Event()
        self._came = asyncio.Event()

    async def stop(self, engine: EdgeServer) -> None:
        self.engines.append(engine)
        self._came.set()
        engine.wake()
        await self._open.wait()

    async def reached(self) -> EdgeServer:
        """Wait until a leg is held; return its engine."""
        await asyncio.wait_for(self._came.wait(), WITHIN)
        return self.engines[0]

    def release(self) -> None:
        """Let all legs go on, those that come later too."""
        self._open.set()


class EdgeServer:
    """See the module. Subclasses answer in `handle`, and forget everything in `reset`."""

    def __init__(self) -> None:
        self.port = free_port()
        self.up = False
        self.seen: list[Request] = []
        self._frozen: asyncio.Event | None = None
        self._faults: dict[str, list[Fault | tuple[int, Any]]] = {}
        self._holds: dict[Stage, Hold] = {}
        self._listeners: list[socket.socket] = []
        self._opened: set[asyncio.Task[None]] = set()  # a task for each connection
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._news = asyncio.Event()
        self._life = object()  # another one after `kill`

    # -- what a test does with it ------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; after `kill`, on the same ports again."""
        self.up = True
        self._listeners = [self.listen(self._serve, self.port)]

    def listen(self, serve: Serve, port: int) -> socket.socket:
        """Serve connections until `kill`.

        A closed server of asyncio forgets connections that it has just accepted, and leaves them open, as no killed
        engine does. So connections are accepted here.
        """
        listener = socket.create_server(("127.0.0.1", port), backlog=512)
        listener.setblocking(False)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener, serve)
        return listener

    def _accept(self, listener: socket.socket, serve: Serve) -> None:
        with contextlib.suppress(OSError):  # there is no other one
            while True:
                connection = listener.accept()[0]
                connection.setblocking(False)
                task = asyncio.ensure_future(self._open(connection, serve, self._life))
                self._opened.add(task)
                task.add_done_callback(self._opened.discard)

    async def _open(self, connection: socket.socket, serve: Serve, life: object) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        if life is not self._life:
            _abort(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            self._writers.discard(writer)
            self._tasks.discard(task)

    def kill(self, flush: bool = False) -> None:
        """End it as kill -9 does; with `flush`, what is written arrives first.

        `start` makes a new one with the same ports, which knows nothing of before.
        """
        self.up = False
        self._life = object()
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._listeners = []
        for writer in list(self._writers):
            if flush:
                writer.close()
            else:
                _abort(writer)
        for task in list(self._tasks):
            task.cancel()
        self._faults.clear()
        self._holds.clear()
        self.thaw()
        self.reset()
        self.wake()

    async def stop(self) -> None:
        """End it, and wait until nothing of it is left."""
        tasks = list(self._opened)
        self.kill()
        await asyncio.gather(*tasks, return_exceptions=True)

    def freeze(self) -> None:
        """Answer nothing from now on, health checks included; the listening socket takes connections."""
        self._frozen = self._frozen or asyncio.Event()

    def thaw(self) -> None:
        if self._frozen is not None:
            self._frozen.set()
            self._frozen = None

    def fail(self, path: str, *faults: Fault | tuple[int, Any]) -> None:
        """Let the next requests to a path fail, one for each fault: a `Fault`, or a status and what to answer."""
        self._faults.setdefault(path, []).extend(faults)

    def hold(self, stage: Stage, hold: Hold | None = None) -> Hold:
        """Stop legs that reach a stage from now on. `hold`: one of another engine, to stop the legs of both."""
        self._holds[stage] = hold = hold or Hold()
        return hold

    def count(self, path: str) -> int:
        """Return how many requests to a path have come."""
        return sum(request.path == path for request in self.seen)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition holds; it is checked after each change of this engine."""

        async def well() -> None:
            while not holds():
                self._news.clear()
                await self._news.wait()

        await asyncio.wait_for(well(), WITHIN)

    # -- for subclasses ----------------------------------------------------------------------------------

    def wake(self) -> None:
        """Tell `until` that something has changed."""
        self._news.set()

    async def at(self, stage: Stage) -> None:
        """Stop here if the test wants it."""
        if hold := self._holds.get(stage):
            await hold.stop(self)

    def reset(self) -> None:
        """Forget all state."""

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request."""
        raise NotImplementedError

    # -- connections -------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while await self._exchange(reader, writer):
                pass

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await read_request(reader)
        if self._frozen is not None:
            await self._frozen.wait()
        self.seen.append(request)
        self.wake()
        reply = Reply(reader, writer)
        if faults := self._faults.get(request.path):
            return await self._go_wrong(faults.pop(0), reply, reader, writer)
        task = asyncio.get_running_loop().create_task(self.handle(request, reply))
        self._tasks.add(task)
        task.add_done_callback(self._handled)
        await asyncio.wait((task,))
        return not task.cancelled() and reply.begun

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.wake()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def _go_wrong(
        self,
        fault: Fault | tuple[int, Any],
        reply: Reply,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        if isinstance(fault, tuple):
            await reply.whole(*fault)
            return True
        if fault is Fault.SILENT:
            await reader.read()  # until the client closes
        elif fault is Fault.CUT_HEAD:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
            await writer.drain()
        else:
            _abort(writer)
        return False


async def read_request(reader: asyncio.StreamReader) -> Request:
    """Read one request. Raises: IncompleteReadError when the client closes."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    start, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        raw = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            raw += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    else:
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
    method, target, _ = start.split(" ")
    path, _, query = target.partition("?")
    return Request(method, path, query, headers, raw)


async def ask(
    host: str, port: int, method: str, target: str, value: Any = None, thanks: bytes = b""
) -> tuple[int, Any]:
    """Send one request to another fake, on a connection of its own; return status and decoded JSON.

    thanks  is sent when the whole answer has arrived

    Raises: OSError if it cannot be reached, or is lost before it has answered.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        body = json.dumps(value).encode()
        head = f"{method} {target} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
            content = await reader.readexactly(length)
        except asyncio.IncompleteReadError:
            raise ConnectionResetError("the connection was closed") from None
        writer.write(thanks)
        return int(lines[0].split(" ")[1]), json.loads(content) if content else None
    finally:
        writer.close()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset a connection."""
    if (sock := writer.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
