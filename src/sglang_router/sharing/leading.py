"""One router of a fleet decides how many workers there should be: the one that holds the leadership in the store.

It is held for 15 s and renewed every 5 s. Who could not renew it stops to act by its own clock, one second before
another router can have it; a router that ends gives it back. While the store is away, nobody acts: two routers that
scale the same engines, each by the half of the load that it sees, are worse than a number of workers that stays.

A store that was flushed, restarted empty, evicts keys or fails over forgets who leads, while that router still acts. So
who finds nobody in the store waits for 15 s before it acts: until then a leader of before has stopped, or has taken the
leadership back. Only after one that gave it back the next acts at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Final

from sglang_router.sharing.store import LeaderHold, Store, StoreFailed, Trouble

log = logging.getLogger("sglang_router.sharing")

HELD_FOR: Final = 15.0
_RENEWALS: Final = 3
"""How often it is renewed in that time."""
_MARGIN: Final = 1 / 15
"""The part of that time by which the holder stops early."""
_RESIGNS_WITHIN: Final = 1.0
_OWN_TROUBLES: Final = (Trouble.DENIED, Trouble.FOREIGN, Trouble.REFUSED)
"""Those that may concern the leadership alone."""


class Leader:
    """See the module. name: of this router among the others; held_for: seconds."""

    def __init__(self, store: Store, name: str, clock: Callable[[], float], held_for: float = HELD_FOR) -> None:
        self._store = store
        self._name = name
        self._clock = clock
        self._held_for = held_for
        self._from = -math.inf
        self._until = -math.inf
        self._trouble: Trouble | None = None  # the last one that was told

    @property
    def leads(self) -> bool:
        """Whether this router may act."""
        return self._from <= self._clock() < self._until

    async def run(self) -> None:
        """Take and keep the leadership until cancelled."""
        while True:
            asked = self._clock()
            try:
                held = await self._store.hold(self._name, self._held_for)
            except StoreFailed as failure:  # what was held ends by itself
                self._tell(failure)
            else:
                self._trouble = None
                self._take(held, asked)
            await asyncio.sleep(self._held_for / _RENEWALS)

    def _take(self, held: LeaderHold, asked: float) -> None:
        """Act by what the store answered. asked: when it was asked."""
        lapsed = asked >= self._until  # then the store says what it knew once, before a failover
        if held is LeaderHold.PASSED_ON:
            self._from = asked
        elif (lapsed or held is LeaderHold.NEW) and not self.leads:
            self._from = asked + self._held_for
        self._until = -math.inf if held is LeaderHold.OTHER else asked + self._held_for * (1 - _MARGIN)

    def _tell(self, failure: StoreFailed) -> None:
        """Log what keeps this router from leading, once; of other troubles the tasks that read and write tell."""
        if failure.trouble in _OWN_TROUBLES and failure.trouble is not self._trouble:
            self._trouble = failure.trouble
            log.warning("%s; this router cannot lead, so it does not scale", failure)

    async def resign(self) -> None:
        """Give the leadership back, if the store takes it at once."""
        led, self._until = self.leads, -math.inf
        if led:
            try:
                await asyncio.wait_for(self._store.resign(self._name), _RESIGNS_WITHIN)
            except (StoreFailed, asyncio.TimeoutError):
                return
