"""One router of a fleet decides how many workers there should be: the one that holds the leadership in the store.

It is held for 15 s and renewed every 5 s. Who could not renew it stops to act by its own clock, one second before
another router can have it; a router that ends gives it back. While the store is away, nobody acts: two routers that
scale the same engines, each by the half of the load that it sees, are worse than a number of workers that stays.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from sglang_router.sharing.store import Store, StoreFailed

HELD_FOR: Final = 15.0
RENEWED_EVERY: Final = 5.0
_MARGIN: Final = 1.0
_RESIGNS_WITHIN: Final = 1.0


class Leader:
    """See the module. name: of this router among the others."""

    def __init__(self, store: Store, name: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._name = name
        self._clock = clock
        self._until = -math.inf

    @property
    def leads(self) -> bool:
        """Whether this router may act."""
        return self._clock() < self._until

    async def run(self) -> None:
        """Take and keep the leadership until cancelled."""
        while True:
            asked = self._clock()
            try:
                held = await self._store.hold(self._name, HELD_FOR)
            except StoreFailed:  # the tasks that read and write tell of it; what was held ends by itself
                pass
            else:
                self._until = asked + HELD_FOR - _MARGIN if held else -math.inf
            await asyncio.sleep(RENEWED_EVERY)

    async def resign(self) -> None:
        """Give the leadership back, if the store takes it at once."""
        led, self._until = self.leads, -math.inf
        if led:
            try:
                await asyncio.wait_for(self._store.resign(self._name), _RESIGNS_WITHIN)
            except (StoreFailed, asyncio.TimeoutError):
                return
