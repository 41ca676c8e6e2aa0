"""The work of one turn of the event loop, done in stages instead of request by request.

    while sockets are read             at the end of the turn, one stage after the other
    Downstream: a request is whole  -> requests: routed            (Downstream.proceed)
                                    -> legs: heads built, sent     (Relay.send)
    answers: heads and bodies       -> writes: to the sockets

Why: between two steps of one request the processor's caches fill with other code, and each step takes up to twice as
long as it does many times in a row; and uvloop makes a system call for each `transport.write` at once, which on a
busy router wakes a sleeping peer each time, while the first of many writes wakes it for all. At 32 connections with
peers on the same machine, gathered writes take 33 % off the CPU of a request, the other two stages 12 %
(docs/decisions/0003). An idle router does the same work in the same turn: nothing waits for company.

Order holds for each transport as long as all its writes go through here; whoever closes a transport calls `flush`
first.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_router.net.downstream import Downstream
    from sglang_router.net.relay import Relay

_MOST_WRITES = 32
"""Writes that are gathered at most: more would make the first wait for the last."""
_LARGE = 131072
"""Bytes that go out at once, because only a write tells that the client reads too slowly: uvloop reads 256 kB up to 32
times in one turn while a worker has that much, and without a pause the router would have to hold it all."""


class Turn:
    """What is still to do in this turn of one event loop."""

    __slots__ = ("_armed", "_call_soon", "_legs", "_requests", "_writes")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_soon = loop.call_soon
        self._armed = False
        self._requests: list[Downstream] = []
        self._legs: list[Relay] = []
        self._writes: list[tuple[asyncio.Transport, bytes]] = []

    def request(self, connection: Downstream) -> None:
        """A connection can go on: a request is whole, or the answer before it is out."""
        self._requests.append(connection)
        if not self._armed:
            self._arm()

    def leg(self, relay: Relay) -> None:
        """A request has a worker and is to be sent there."""
        self._legs.append(relay)
        if not self._armed:
            self._arm()

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Bytes are to go out."""
        writes = self._writes
        writes.append((transport, data))
        if len(writes) >= _MOST_WRITES or len(data) >= _LARGE:
            self.flush()
        elif not self._armed:
            self._arm()

    def flush(self) -> None:
        """Makes the gathered writes now."""
        writes, self._writes = self._writes, []
        for transport, data in writes:
            if not transport.is_closing():
                transport.write(data)

    def _arm(self) -> None:
        self._armed = True
        self._call_soon(self._run)

    def _run(self) -> None:
        self._armed = False
        requests, self._requests = self._requests, []
        for connection in requests:
            connection.proceed()
        legs, self._legs = self._legs, []
        for relay in legs:
            relay.send()
        self.flush()
