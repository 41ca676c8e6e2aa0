"""What is simulated: the options of the router, the engines, and what happens to them meanwhile."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from sglang_router.app import settings
from sglang_router.config import RouterArgs
from sglang_router.engine.kv import KVCache
from sglang_router.engine.scheduler import BatchLimits, CostModel, EngineScheduler
from sglang_router.replay.load import UNIT
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.shared.records import SharedRules

BYTES_PER_TOKEN = 4
"""Bytes of real text for one token, about: what options in bytes are converted with."""
_COST, _LIMITS = CostModel(), BatchLimits()
_BLOCKS = SharedRules(b"", b"").blocks


class FleetChange(NamedTuple):
    """Something that happens to the fleet: "join", "leave" or "restart".

    at      seconds after the start
    worker  its number, from 0 on; of one that joins: none
    down    seconds in which a worker that restarts is not there
    """

    kind: str
    at: float
    worker: int = -1
    down: float = 20.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """See the module.

    args          of the router; sizes in bytes are of real text
    workers       number of engines at the start
    speeds        of the engines, in turn; 1.0: as the cost model says
    cache_tokens  slots of each engine's KV cache
    page          tokens of a page
    routers       to which the requests come in turn
    shared_delay  seconds until what one router tells has reached the others; None: they share nothing
    shared_blocks  most entries of a router's replica of placements
    disconnected  the routers would share, but their store is away
    """

    args: RouterArgs
    workers: int = 8
    cache_tokens: int = 300_000
    page: int = 16
    speeds: tuple[float, ...] = (1.0,)
    cost: CostModel = _COST
    limits: BatchLimits = _LIMITS
    changes: tuple[FleetChange, ...] = ()
    routers: int = 1
    shared_delay: float | None = None
    shared_blocks: int = _BLOCKS
    disconnected: bool = False

    def speed(self, number: int) -> float:
        """Return the speed of an engine."""
        return self.speeds[number % len(self.speeds)]

    @property
    def health(self) -> HealthRules:
        """Return how workers are checked."""
        return settings.health_rules(self.args)

    def scheduler(self) -> EngineScheduler:
        """Return a new engine, with an empty cache."""
        return EngineScheduler(KVCache(self.cache_tokens, self.page, UNIT), self.cost, self.limits)

    @property
    def router_args(self) -> RouterArgs:
        """The options for the router: sizes in bytes as they are with one unit for each page."""
        args = dataclasses.replace(self.args)
        args.max_tree_size = self._bytes(args.max_tree_size)
        args.prefix_hash_bytes = self._bytes(args.prefix_hash_bytes)
        return args

    @property
    def most_text(self) -> int:
        """Bytes of routing text that count, a multiple of the unit."""
        return -(-self._bytes(settings.most_routing_text(self.args)) // UNIT) * UNIT

    @property
    def shared_step(self) -> int:
        """Bytes of routing text between two boundaries of what routers tell each other."""
        return -(-self._bytes(SharedRules(b"", b"").step) // UNIT) * UNIT

    def _bytes(self, of_text: int) -> int:
        return max(UNIT, of_text * UNIT // (BYTES_PER_TOKEN * self.page))
