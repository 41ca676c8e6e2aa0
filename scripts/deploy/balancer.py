"""A Service as kube-proxy makes it: connections go to one pod after the other, as far as it has heard of them.

What the endpoints are is known here LAG seconds later than to those who change them. A connection stays with its pod.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from scripts.kubernetes.link import Background

LAG = 1.0

Place = tuple[str, int]


class Balancer:
    """See the module. port: where clients connect."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._places: Sequence[Place] = ()
        self._turns = itertools.count()
        self.port = 0
        background.call(self._start)

    @property
    def places(self) -> Sequence[Place]:
        """The pods that get new connections now."""
        return self._places

    def follow(self, places: Sequence[Place]) -> None:
        """Send new connections to these pods, from some time on."""
        loop = self._background.loop
        loop.call_soon_threadsafe(loop.call_later, LAG, self._use, tuple(places))

    def _use(self, places: Sequence[Place]) -> None:
        self._places = places

    async def _start(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._places:
            writer.transport.abort()
            return
        place = self._places[next(self._turns) % len(self._places)]
        try:
            from_pod, to_pod = await asyncio.open_connection(*place)
        except OSError:
            writer.transport.abort()
            return
        # Whoever ends first ends both: clients here do not close one half of a connection.
        loop = self._background.loop
        ways = [loop.create_task(_pass(*way)) for way in ((reader, to_pod), (from_pod, writer))]
        _, left = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in left:
            way.cancel()
        writer.close()
        to_pod.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until they end; a reset passes on as one."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        writer.transport.abort()
