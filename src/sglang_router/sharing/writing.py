"""Tell the other routers what is new: all messages of some 25 ms in one round trip.

What is to be told is taken from the core at the moment in which it can be written. So nothing queues here while the
store is slow or away: the core goes on to gather, within its bounds, and loads that are told late are those of now.

A message that could not be written is lost and counted, and the core hears of it: loads are told again within a second,
and placements are only hints, but for caches that were emptied. Orders of operators are not lost: those that the store
has not taken are written again, in their order, until it has. A stream that takes nothing (its key holds something
else, or its ids are used up) does not make those repeat that another one took.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from sglang_router.routing.shared.records import SharedTopic
from sglang_router.sharing.core import Core
from sglang_router.sharing.link import LinkSide
from sglang_router.sharing.store import Appended, Store, StoreFailed
from sglang_router.sharing.traffic import Traffic

_MOST_ORDERS: Final = 1024
_MOST: Final = {SharedTopic.LOADS.value: 4096, SharedTopic.ORDERS.value: 10_000}
"""Entries that stay in a stream, whatever their size."""
_OVERHEAD: Final = 64
"""Bytes that the store needs for an entry besides its payload."""
_FEWEST: Final = 256
_GUESSED: Final = 4096
"""Bytes of an entry of placements before the first one is known."""
_TIDY_EVERY: Final = 60.0
_HOUR: Final = 3600.0
_KEPT: Final[dict[str, tuple[float, float | None]]] = {
    SharedTopic.PLACEMENTS.value: (2 * _HOUR, _HOUR),
    SharedTopic.LOADS.value: (_HOUR, None),
    SharedTopic.ORDERS.value: (30 * 24 * _HOUR, None),
}
"""For how long a stream stays when no router is there any more, and the age up to which its entries do."""
_LEAVES_WITHIN: Final = 1.0


class StoreWriter:
    """See the module.

    memory  about how many bytes placements may take in the store
    side    hears how writing goes
    """

    def __init__(
        self, store: Store, core: Core, side: LinkSide, traffic: Traffic, clock: Callable[[], float], memory: int
    ) -> None:
        self._store = store
        self._core = core
        self._side = side
        self._traffic = traffic
        self._clock = clock
        self._memory = memory
        self._orders: list[bytes] = []  # not written yet
        self._tidy_at = 0.0

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(self._core.interval)
            try:
                await self._write(self._core.outgoing(self._clock()))
                if self._clock() >= self._tidy_at:
                    self._tidy_at = self._clock() + _TIDY_EVERY
                    await self._store.tidy(_KEPT)
                    self._side.well()
            except StoreFailed as failure:
                await self._side.failed(failure)

    async def leave(self) -> None:
        """Tell the others what is new, and that this router ends, if the store takes it at once."""
        last = [*self._core.outgoing(self._clock()), *self._core.leave()]
        try:
            await asyncio.wait_for(self._write(last), _LEAVES_WITHIN)
        except (StoreFailed, asyncio.TimeoutError):
            return

    async def _write(self, messages: list[tuple[SharedTopic, bytes]]) -> None:
        """Write messages, after the orders that are not written yet. Raises: StoreFailed."""
        self._orders += [payload for topic, payload in messages if topic is SharedTopic.ORDERS]
        del self._orders[:-_MOST_ORDERS]
        batch = [self._appended(SharedTopic.ORDERS.value, payload) for payload in self._orders]
        batch += [
            self._appended(topic.value, payload) for topic, payload in messages if topic is not SharedTopic.ORDERS
        ]
        if not batch:
            return
        began = self._clock()
        orders = len(self._orders)
        try:
            results = await self._store.append(batch)
        except StoreFailed as failure:
            results = [failure] * len(batch)
        failures: list[StoreFailed] = []
        kept: list[bytes] = []
        missed: dict[str, None] = {}
        for number, (each, result) in enumerate(zip(batch, results, strict=True)):
            if not isinstance(result, StoreFailed):
                self._traffic.wrote(each.stream, len(each.payload), result, began)
                continue
            failures.append(result)
            if number < orders:
                kept.append(each.payload)
            else:
                self._traffic.missed(each.stream)
                missed[each.stream] = None
        self._orders = kept
        for stream in missed:
            self._core.missed(SharedTopic(stream))
        if failures:
            raise failures[0]
        self._side.well()

    def _appended(self, stream: str, payload: bytes) -> Appended:
        return Appended(stream, payload, _MOST.get(stream) or self._most_placements())

    def _most_placements(self) -> int:
        """Return how many entries of placements fit into their memory, by the mean of those of late."""
        size = self._traffic.size.get(SharedTopic.PLACEMENTS.value, _GUESSED)
        return max(int(self._memory / (size + _OVERHEAD)), _FEWEST)
