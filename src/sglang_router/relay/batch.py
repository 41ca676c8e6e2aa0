"""Do the work of one event-loop iteration in stages instead of request by request.

    while sockets are read                      at the end of the iteration, one stage after the other
    ClientConnection: a request is complete  -> requests: routed            (Starter.proceed)
                                             -> legs: heads built, sent     (Sender.send)
    answers: heads and bodies                -> writes: to the sockets

Why: between two steps of one request the CPU caches fill with other code, so a step takes up to twice as long as when
it is repeated many times in a row. And uvloop makes a system call for each `transport.write` at once: on a busy router
each one wakes a sleeping peer, while the first of many gathered writes wakes it for all. At 32 connections with peers
on the same machine, gathered writes save 33 % of the CPU per request, the other two stages 12 % (docs/decisions/0003).
An idle router does the same work in the same iteration: nothing is delayed in order to fill a batch.

The order of the writes of a transport is kept as long as all of them go through here; call `flush` before you close a
transport. `app.build` makes one batch per event loop and gives it to both sides.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from sglang_router.relay.bulk import Bulk

Writable = bytes | bytearray | memoryview
_MOST_WRITES: Final = 32
"""Most writes that are gathered: with more, the first would wait too long for the last."""
_LARGE: Final = 131072
"""Bytes from which data is written at once, because only a write shows that the client reads too slowly: uvloop reads
up to 32 times 256 kB from a worker in one iteration, and without a pause the router would have to hold all of it."""


class Starter(Protocol):
    """A client connection with a request to start."""

    def proceed(self) -> None:
        """Start the next request."""


class Sender(Protocol):
    """A leg that is ready to be sent."""

    def send(self) -> None:
        """Send the leg's request."""


class Batch:
    """The work still to do in this iteration of one event loop.

    bulk  the work of large bodies, which is for later iterations
    """

    __slots__ = ("_armed", "_call_soon", "_legs", "_requests", "_writes", "bulk")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_soon = loop.call_soon
        self.bulk = Bulk(loop.call_soon)
        self._armed = False
        self._requests: list[Starter] = []
        self._legs: list[Sender] = []
        self._writes: list[tuple[asyncio.Transport, Writable]] = []

    def __repr__(self) -> str:
        return f"<Batch {len(self._requests)} requests, {len(self._legs)} legs, {len(self._writes)} writes>"

    def request(self, connection: Starter) -> None:
        """Call `proceed` of a connection later: a request is complete, or the answer before it is written."""
        self._requests.append(connection)
        if not self._armed:
            self._arm()

    def leg(self, leg: Sender) -> None:
        """Send a planned leg later."""
        self._legs.append(leg)
        if not self._armed:
            self._arm()

    def write(self, transport: asyncio.Transport, data: Writable) -> None:
        """Write bytes later, with the others; at once when they are many."""
        writes = self._writes
        writes.append((transport, data))
        if len(writes) >= _MOST_WRITES or len(data) >= _LARGE:
            self.flush()
        elif not self._armed:
            self._arm()

    def flush(self) -> None:
        """Make the gathered writes now."""
        writes, self._writes = self._writes, []
        for transport, data in writes:
            if not transport.is_closing():
                transport.write(data)

    def _arm(self) -> None:
        self._armed = True
        self._call_soon(self._run)

    def _run(self) -> None:
        """Do the stages: requests, legs, writes. A fault in one of them goes to the log; the others come after it."""
        self._armed = False
        requests, self._requests = self._requests, []
        legs: list[Sender] = []
        started = sent = 0
        try:
            for connection in requests:
                started += 1
                connection.proceed()
            legs, self._legs = self._legs, []
            for leg in legs:
                sent += 1
                leg.send()
        except Exception:
            self._requests[:0] = requests[started:]
            self._legs[:0] = legs[sent:]
            if not self._armed:
                self._arm()
            raise
        self.flush()
