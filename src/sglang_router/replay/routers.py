"""Several routers in front of the simulated engines: requests come to them in turn, also those of one session.

Each is built as in production, with a fleet and a policy of its own. They share what they know (`routing.shared`) over
a stream that is played: what one tells reaches all, itself too, after `Setup.shared_delay` seconds, in the order in
which it was told. Without a delay they know nothing of each other; nor do they when their store is away, but then they
know that, and send what is new where all agree.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from sglang_router.app.routers import fleet_of, router_of
from sglang_router.replay.load import UNIT
from sglang_router.replay.result import Sharing
from sglang_router.replay.setup import Setup
from sglang_router.replay.timeline import Timeline
from sglang_router.replay.workers import SimulatedWorkers
from sglang_router.routing.decider import Deliver
from sglang_router.routing.events import Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.router import Router
from sglang_router.routing.shared.records import SharedRules, SharedTopic
from sglang_router.routing.shared.sharing import SharedState

_KEY = bytes(32)
_ALL = 1 << 60


class SimulatedRouters:
    """See the module. Iteration gives the routers; `turn` the one whose turn it is.

    fleets  theirs
    told    messages so far; size: their bytes
    """

    def __init__(self, setup: Setup, timeline: Timeline, kind: type[Policy], seed: int) -> None:
        self.fleets: list[Fleet] = []
        self.told = self.size = 0
        self._delay = setup.shared_delay if setup.routers > 1 else None
        self._setup = setup
        self._timeline = timeline
        self._states: list[SharedState] = []
        self._routers: list[Router] = []
        self._rngs = [random.Random(seed if not number else f"{seed} {number}") for number in range(setup.routers)]
        self._listeners = [Listeners() for _ in range(setup.routers)]
        for number, rng in enumerate(self._rngs):
            self.fleets.append(self._fleet(number, kind, rng))
        self._turns = itertools.cycle(range(setup.routers))

    def __repr__(self) -> str:
        return f"<SimulatedRouters {self._routers}>"

    def __iter__(self) -> Iterator[Router]:
        return iter(self._routers)

    def _fleet(self, number: int, kind: type[Policy], rng: random.Random) -> Fleet:
        ids, caches = itertools.count(1), None
        if self._delay is not None:
            rules = SharedRules(_KEY, number.to_bytes(8, "big"), self._setup.shared_blocks, self._setup.shared_step)
            state = SharedState(rules)
            state.connected = not self._setup.disconnected
            self._states.append(state)
            caches = KVCaches(None, shared=state.prefixes)
        args, listeners = self._setup.router_args, self._listeners[number]
        return fleet_of(args, listeners, lambda: f"w{next(ids)}", rng, kind, caches=caches)

    def attach(self, workers: SimulatedWorkers, deliver: Deliver) -> None:
        """Make the routers. deliver: gets the answers to queued requests."""
        args, soon = self._setup.router_args, self._timeline.soon.append
        for number, fleet in enumerate(self.fleets):
            listeners = self._listeners[number]
            router = router_of(args, fleet, listeners, self._rngs[number], soon, workers.check_now)
            router.deliver = deliver
            router.sessions.contexts.bytes_per_token = UNIT / self._setup.page
            listeners.add(router)
            self._routers.append(router)
            if self._states:
                self._states[number].attach(router)
                listeners.add(self._states[number])

    def start(self) -> None:
        """Begin to share."""
        for state in self._states if not self._setup.disconnected else ():
            self._timeline.background(self._timeline.now, self._flush, state)

    def turn(self) -> Router:
        """Return the router that gets the next request."""
        return self._routers[next(self._turns)]

    def look(self) -> None:
        """Do what each router does a few times a second."""
        for router in self._routers:
            router.look(self._timeline.now)
        for state in self._states:
            state.look(self._timeline.now)

    def sharing(self, seconds: float) -> Sharing | None:
        """Return what sharing took, for each router; None if nothing was shared."""
        count = len(self._states)
        if not count or not seconds:
            return None
        readings = [state.reading for state in self._states]
        return Sharing(
            self.told / count / seconds,
            self.size / count / seconds,
            max(reading.entries for reading in readings),
            sum(sum(reading.dropped.values()) for reading in readings),
            sum(reading.agreed for reading in readings),
        )

    def _flush(self, state: SharedState) -> None:
        """Let a router tell what is new, and again later."""
        now, delay = self._timeline.now, self._delay or 0.0
        for topic, payload in state.outgoing(now):
            self.told += 1
            self.size += len(payload)
            self._timeline.background(now + delay, self._arrive, topic, payload)
        self._timeline.background(now + state.interval, self._flush, state)

    def _arrive(self, topic: SharedTopic, payload: bytes) -> None:
        for state in self._states:
            state.receive(topic, payload)
            while state.apply(self._timeline.now, _ALL):
                pass
