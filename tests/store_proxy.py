"""A TCP proxy between a router and its store: it passes bytes on, or none, or speaks TLS to the router.

with StoreProxy(server.port) as proxy:
    proxy.url                 # where the router connects
    proxy.cut(True)           # a network that loses everything: connections stay open, nothing comes
    proxy.cut(False)          # it works again; what was open is closed, as after a long cut
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from types import TracebackType

WITHIN = 20.0


class StoreProxy:
    """See the module. tls: of the side of the router; None: plain."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._to = port
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._through = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> StoreProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(WITHIN)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(WITHIN)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WITHIN)
        self._loop.close()

    def cut(self, cut: bool) -> None:
        """Lose everything from now on, or nothing more."""
        asyncio.run_coroutine_threadsafe(self._cut(cut), self._loop).result(WITHIN)

    async def _open(self) -> None:
        self._through.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cut(self, cut: bool) -> None:
        if cut:
            self._through.clear()
            return
        for writer in list(self._writers):
            writer.transport.abort()
        self._through.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._through.wait()
            with contextlib.suppress(OSError):
                store, to_store = await asyncio.open_connection("127.0.0.1", self._to)
                self._writers.add(to_store)
                try:
                    await asyncio.wait(
                        [asyncio.ensure_future(self._pump(*way)) for way in ((reader, to_store), (store, writer))],
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    self._writers.discard(to_store)
                    to_store.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._through.wait()
                writer.write(data)
                await writer.drain()
