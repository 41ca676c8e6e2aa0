"""Share what this router knows with the other routers of its fleet, and know what they know.

    sharing = FleetSharing(core, store, link ...)  the core (`routing.shared`) knows; nothing there waits for a store
    sharing.start()                                tasks: read, write, lead; each goes on whatever happens
    sharing.learned                                the first look is over: /readiness may say so
    sharing.look()                                 a job: silent routers are forgotten
    await sharing.close()                          tells the others that this router ends

    core --outgoing--> StoreWriter --append--> store --follow--> StoreReader --receive, apply--> core

The fleet's key comes from a file, or else from the store: then nothing is written before it is known, and a store that
was emptied gets it again from the first router that comes back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any, Final

from sglang_router.routing.shared.records import SharedReading
from sglang_router.sharing.core import Core
from sglang_router.sharing.fleet_key import FleetKey
from sglang_router.sharing.leading import Leader
from sglang_router.sharing.link import StoreLink
from sglang_router.sharing.reading import LOOK_WITHIN, StoreReader
from sglang_router.sharing.standing import SharedStanding
from sglang_router.sharing.store import Store
from sglang_router.sharing.traffic import Traffic
from sglang_router.sharing.writing import StoreWriter

log = logging.getLogger("sglang_router.sharing")

_AGAIN_AFTER: Final = 5.0
"""Seconds after a fault of this program, until a task runs again."""
_CANCELLED_WITHIN: Final = 0.5
"""Seconds in which a task that was cancelled should have ended."""


class FleetSharing:
    """See the module.

    core    what this router knows, and what it hears
    link    how well the store is reached
    key     of the fleet
    name    of this router among the others
    memory  about how many bytes placements may take in the store
    """

    def __init__(
        self,
        core: Core,
        store: Store,
        link: StoreLink,
        key: FleetKey,
        name: str,
        memory: int,
    ) -> None:
        clock = link.clock
        self._core = core
        self._store = store
        self._key = key
        self._clock = clock
        self._learn_until = math.inf
        self._tasks: list[asyncio.Task[None]] = []
        self.link = link
        self.traffic = Traffic()
        self.reader = StoreReader(store, self._agree, core, link.reading, self.traffic, clock)
        self.writer = StoreWriter(store, core, link.writing, self.traffic, clock, memory)
        self.leader = Leader(store, name, clock)
        link.heard = self._link_changed

    def __repr__(self) -> str:
        return f"<FleetSharing {self.link!r}>"

    @property
    def learned(self) -> bool:
        """Whether the first look at the store is over, or its time."""
        return self.reader.looked or self._clock() >= self._learn_until

    @property
    def reading(self) -> SharedReading:
        """What was heard and is known of the others."""
        return self._core.reading

    @property
    def state(self) -> str:
        """Whether the store is reached, or what is wrong, in one word: see `StoreLink.state`."""
        return self.link.state

    @property
    def losses(self) -> int:
        """How often the store could not be reached any more."""
        return self.link.losses

    @property
    def leads(self) -> bool:
        """Whether this router acts for all."""
        return self.leader.leads

    @property
    def standing(self) -> SharedStanding:
        """How sharing goes."""
        link, lag = self.link, self.traffic.lag
        return SharedStanding(
            store=link.shown,
            state=link.state,
            problem=link.problem,
            peers=len(self._core.reading.peers),
            lag=None if lag is None else round(lag, 4),
        )

    def start(self, *, lead: bool) -> None:
        """Share from now on. lead: whether this router may decide for all how many workers there should be."""
        self._learn_until = self._clock() + 2 * LOOK_WITHIN  # also with a store that does not answer
        work = [self.reader.run, self._write, *([self.leader.run] if lead else [])]
        self._tasks = [asyncio.ensure_future(_keep(each)) for each in work]

    def look(self) -> None:
        """Forget the routers that are silent. A job calls it."""
        self._core.look(self._clock())

    async def close(self) -> None:
        """Tell the others that this router ends, if the store takes it at once; end the connections."""
        running = set(self._tasks)
        while running:
            for task in running:
                task.cancel()
            # Again, because before Python 3.12 `asyncio.wait_for` can swallow a cancellation.
            _, running = await asyncio.wait(running, timeout=_CANCELLED_WITHIN)
        if self.link.connected:
            await asyncio.gather(self.writer.leave(), self.leader.resign())
        await self._store.close()

    async def _write(self) -> None:
        await self.reader.began.wait()
        await self.writer.run()

    async def _agree(self) -> bool:
        """Take the key of the store, or let it have ours; return whether it is another one. Raises: StoreFailed."""
        key = self._key.own if self._key.fixed else await self._store.shared_key(self._key.own)
        changed = key != self._key.own
        if changed:
            self._key.own = key
            self._core.use_key(key)
        return changed

    def _link_changed(self) -> None:
        self._core.connected = self.link.connected


async def _keep(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do some work for ever: a fault in it must not end it for good."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("shared state: a fault in the router; trying again")
        await asyncio.sleep(_AGAIN_AFTER)
