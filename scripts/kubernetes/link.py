"""A link to the API server that can be broken, and engines behind the addresses of pods: both on one loop in a thread.

link.cut()      resets all connections, and new ones
link.drop()     closes the server's side only: what is open stays open, and silent; new connections work
link.heal()

engines.served  requests for answers, by the address that got them
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence

_ANSWERS = {
    "/health": b"OK",
    "/v1/models": b'{"object":"list","data":[{"id":"m","object":"model"}]}',
    "/get_model_info": b'{"model_path":"m"}',
    "/server_info": b'{"model_path":"m"}',
    "/get_server_info": b'{"model_path":"m"}',
}


class Background:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], object]) -> None:
        """Run a function, or make and run a coroutine, there; wait for it."""

        async def there() -> None:
            found = function()
            if asyncio.iscoroutine(found):
                await found

        asyncio.run_coroutine_threadsafe(there(), self.loop).result(30)

    def close(self) -> None:
        """End the loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


class Link:
    """See the module. port: where clients connect; to: the API server's."""

    def __init__(self, background: Background, to: int) -> None:
        self._background = background
        self._to = to
        self._is_cut = False
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.port = 0
        background.call(self._start)

    async def _start(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            _reset(writer)
            return
        pair = writer, to_server
        self._pairs.add(pair)
        await asyncio.gather(self._pass(reader, to_server, pair), self._pass(from_server, writer, pair))
        self._pairs.discard(pair)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        if pair in self._pairs:  # not dropped
            writer.close()

    def cut(self) -> None:
        """Reset all connections, and new ones."""
        self._background.call(self._cut)

    def _cut(self) -> None:
        self._is_cut = True
        for pair in list(self._pairs):
            self._pairs.discard(pair)
            for writer in pair:
                _reset(writer)

    def drop(self) -> None:
        """Let what is open stay open and silent."""
        self._background.call(self._drop)

    def _drop(self) -> None:
        for pair in list(self._pairs):
            self._pairs.discard(pair)
            pair[1].close()

    def heal(self) -> None:
        """Let connections pass again."""
        self._is_cut = False


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Engines:
    """Engines at addresses of this machine, all at one port."""

    def __init__(self, background: Background, addresses: Sequence[str], port: int) -> None:
        self.port = port
        self.served: Counter[str] = Counter()
        self._addresses = addresses
        background.call(self._start)

    async def _start(self) -> None:
        await asyncio.start_server(self._serve, self._addresses, self.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError, IndexError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                path = head.split(" ")[1].partition("?")[0]
                length = head.partition("content-length:")[2].partition("\r\n")[0]
                await reader.readexactly(int(length or 0))
                if head.startswith("post"):
                    self.served[writer.get_extra_info("sockname")[0]] += 1
                body = b'{"text":"hi","meta_info":{}}' if head.startswith("post") else _ANSWERS.get(path)
                status = "200 OK" if body is not None else "404 Not Found"
                body = body or b""
                fields = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(fields.encode() + body)
        writer.close()
