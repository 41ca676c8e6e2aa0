"""Hear what the other routers say: a first look at what the store has kept, then all that comes.

    connect --> key --> ends of the streams --> orders, from where this router stands   all of them, in their order
                                            --> placements backwards, newest first      a newcomer
                                            --> follow all three streams from there

What was read is given to the core, which queues it, and is applied before more is read, in pieces, one in a turn of the
event loop. So a store that is full of messages costs time, but neither memory nor a pause.

A newcomer has LOOK_WITHIN seconds for its first look: half of it for orders, of which the rest is read later, beside
all that comes. What it has not read of placements then, it does without. After a gap, because the store was away or
this process was stopped, the streams are read on from where they were left, so that nothing is lost and all comes in
its order: what was placed, and what was emptied after it. Loads of more than some seconds ago are passed over: they say
nothing any more, and what others used of limits meanwhile would count as if they had used it now. When the store came
back with less than it had, the placements are looked at as a newcomer does.

A store that was emptied may number its entries from an earlier time, when its clock was set back: a router would then
wait for ever behind entries that never come. So the ends of the streams are looked at every few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from sglang_router.routing.shared.records import SharedTopic
from sglang_router.sharing.core import Core
from sglang_router.sharing.link import LinkSide
from sglang_router.sharing.store import START, Position, Store, StoreFailed, StreamEntry
from sglang_router.sharing.traffic import Traffic

LOOK_WITHIN: Final = 5.0
"""Seconds for a first look."""
_GAP: Final = 5.0
"""Seconds after which the loads that were told meanwhile are passed over."""
_WAIT: Final = 1.0
"""Seconds for which the store keeps a question to which there is no answer yet."""
_AT_ONCE: Final = 0.001
_MOST: Final = 128
"""Entries of each stream that are read at once."""
_LOOKED_AT_ONCE: Final = 32
_HASHES: Final = 512
"""What is applied in one turn of the event loop."""
_ENDS_EVERY: Final = 2.0
_TOPICS: Final = {topic.value: topic for topic in SharedTopic}
_ORDERS: Final = SharedTopic.ORDERS.value
_PLACEMENTS: Final = SharedTopic.PLACEMENTS.value
_LOADS: Final = SharedTopic.LOADS.value


class StoreReader:
    """See the module.

    agree    called at each connection and every few seconds: agrees with the others on the fleet's key, and returns
             whether it is another one now, so that nothing is known any more
    core     is given what was read
    side     hears how reading goes
    looked   whether the first look is over
    began    set when key and orders are known: nothing should be written before
    """

    def __init__(
        self,
        store: Store,
        agree: Callable[[], Awaitable[bool]],
        core: Core,
        side: LinkSide,
        traffic: Traffic,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._agree = agree
        self._core = core
        self._side = side
        self._traffic = traffic
        self._clock = clock
        self._positions: dict[str, Position] = dict.fromkeys(_TOPICS, START)
        self._read_at: float | None = None  # when it went well last
        self._ends_at = 0.0
        self.looked = False
        self.began = asyncio.Event()

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            try:
                await self._catch_up()
                while True:
                    await self._follow()
            except StoreFailed as failure:
                self.looked = True  # nothing to look at
                await self._side.failed(failure)

    async def _catch_up(self) -> None:
        """Read what is new since the last time, or as a newcomer. Raises: StoreFailed."""
        if await self._agree():
            self._forget()
        began = self._clock()
        ends = await self._look_at_ends()
        self._side.well()
        if self._lost(ends):
            self._forget()
            self._core.store_lost()
        if self._read_at is None:
            await self._read_orders(ends[_ORDERS], began + LOOK_WITHIN / 2)
            self.began.set()
            await self._look_back(ends[_PLACEMENTS], began + LOOK_WITHIN)
            # Of loads, too: all of them come anew within a second.
            self._positions = {**ends, _ORDERS: self._positions[_ORDERS]}
        elif began - self._read_at > _GAP:
            self._positions[_LOADS] = ends[_LOADS]
        self._read_at = self._clock()
        self.looked = True

    async def _read_orders(self, end: Position, until: float) -> None:
        while self._positions[_ORDERS] < end and self._clock() < until:
            found = await self._store.follow({_ORDERS: self._positions[_ORDERS]}, _MOST, _AT_ONCE)
            if not found:  # the last ones were removed
                self._positions[_ORDERS] = end
                return
            await self._take(found)

    async def _look_back(self, newest: Position, until: float) -> None:
        """Read placements, newest first."""
        while newest > START and self._clock() < until:
            entries = await self._store.older(_PLACEMENTS, newest, _LOOKED_AT_ONCE)
            for entry in entries:
                self._hear(_PLACEMENTS, entry, old=True)
            await self._apply()
            if len(entries) < _LOOKED_AT_ONCE:
                return
            newest = before(entries[-1].position)

    async def _follow(self) -> None:
        """Read what comes next of all streams; wait for it a while. Raises: StoreFailed."""
        found = await self._store.follow(self._positions, _MOST, _WAIT)
        now = self._clock()
        paused = self._read_at is not None and now - self._read_at > _GAP
        if paused:
            found.pop(_LOADS, None)
        await self._take(found)
        self._side.well()
        if not paused:
            self._read_at = self._clock()
        if paused or now >= self._ends_at:
            await self._catch_up()

    async def _look_at_ends(self) -> dict[str, Position]:
        self._ends_at = self._clock() + _ENDS_EVERY
        return await self._store.ends(list(_TOPICS))

    def _lost(self, ends: dict[str, Position]) -> bool:
        """Whether a stream ends before what was read of it: the store has lost something."""
        return any(ends[stream] < position for stream, position in self._positions.items())

    def _forget(self) -> None:
        """Begin as a newcomer."""
        self._positions = dict.fromkeys(_TOPICS, START)
        self._read_at = None

    async def _take(self, found: dict[str, list[StreamEntry]]) -> None:
        """Give what was read to the core, and have it applied."""
        for stream, entries in found.items():
            for entry in entries:
                self._hear(stream, entry)
            self._positions[stream] = entries[-1].position
        await self._apply()

    def _hear(self, stream: str, entry: StreamEntry, *, old: bool = False) -> None:
        payload = b"" if entry.payload is None else entry.payload
        self._traffic.read(stream, len(payload), entry.position, self._clock())
        self._core.receive(_TOPICS[stream], payload, old)

    async def _apply(self) -> None:
        while self._core.apply(self._clock(), _HASHES):  # noqa: ASYNC110 - not a wait: others have their turn
            await asyncio.sleep(0)


def before(position: Position) -> Position:
    """Return the last position before another one."""
    milliseconds, number = position
    return (milliseconds, number - 1) if number else (milliseconds - 1, (1 << 64) - 1)
