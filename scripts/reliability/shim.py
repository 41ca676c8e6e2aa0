"""The network between router and engine, with faults.

    router ──> Shim ──> engine         mode      effect on connections

                                       pass      bytes go through
                                       slow      each read is delayed by `delay` seconds, in both directions
                                       hole      accepted, then no byte; sent bytes arrive when the mode ends
                                       reset     existing ones get an RST, new ones as soon as a request comes
                                       refuse    no socket listens; existing ones stay

`aliases` are more addresses at which it listens: a fleet of any size in front of one engine. A request that holds the
bytes `deadly` ends it, as a prompt ends an engine: all connections get an RST, and nobody listens any more. It lives on
an event loop that the caller runs; call `set` on that loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import Literal

Mode = Literal["pass", "slow", "hole", "reset", "refuse"]
_READ = 65536


class Shim:
    """See the module. `port` is where it listens, `target` the engine's port."""

    def __init__(
        self,
        port: int,
        target: int,
        aliases: Sequence[str] = ("127.0.0.1",),
        delay: float = 0.2,
        deadly: bytes = b"",
    ) -> None:
        self.dead = False
        self._deadly = deadly
        self.port = port
        self.target = target
        self.url = f"http://{aliases[0]}:{port}"
        self._aliases = list(aliases)
        self._delay = delay
        self._mode: Mode = "pass"
        self._open = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._open.set()
        self._server = await asyncio.start_server(
            self._serve, self._aliases, self.port, reuse_address=True, backlog=512
        )

    async def set(self, mode: Mode) -> None:
        """Change the mode."""
        self._mode = mode
        if mode == "hole":
            self._open.clear()
        else:
            self._open.set()
        if mode == "refuse":
            self._close()
        elif self._server is None:
            await self.start()
        if mode == "reset":
            for writer in list(self._writers):
                _reset(writer)

    async def stop(self) -> None:
        self._close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # asyncio's streams log a cancelled handler as an error, so return normally instead.
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._relay(reader, writer)
        finally:
            self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        pumps: list[asyncio.Task[None]] = []
        other: asyncio.StreamWriter | None = None
        try:
            first = await reader.read(_READ)
            await self._open.wait()
            if self._mode == "reset":
                _reset(writer)
                return
            if not first or self._dies(first):
                return
            there, other = await asyncio.open_connection("127.0.0.1", self.target)
            other.write(first)
            pumps = [
                asyncio.create_task(self._pump(reader, other, asks=True)),
                asyncio.create_task(self._pump(there, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers.discard(writer)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            if other is None and self._mode == "pass":
                _reset(writer)  # the engine is gone; an accepted connection cannot be refused any more
            for each in (writer, other):
                if each is not None:
                    each.close()

    def _dies(self, data: bytes) -> bool:
        """Return whether these bytes of a request end the engine; if so, it is gone."""
        if self._deadly and self._deadly in data:
            self.dead = True
            self._close()
            for writer in list(self._writers):
                _reset(writer)
        return self.dead

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asks: bool = False) -> None:
        while data := await reader.read(_READ):
            if asks and self._dies(data):
                return
            if self._mode == "slow":
                await asyncio.sleep(self._delay)
            await self._open.wait()
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
