"""Routers that share what they know, without a store: what one tells, the others receive when the test says so.

joined = Joined(2, 3)                     two routers in front of the same three workers
joined.benches[0].route(b"a prompt")
joined.flush(now=1.0)                     each tells what is new, and each applies what came
joined.add(0, hands=Hands)                a router that adds and removes workers for others' word
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from fleets import Bench
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.quotas import Quotas
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.sessions import Sessions
from sglang_router.routing.shared.records import SharedRules, SharedTopic
from sglang_router.routing.shared.sharing import SharedState
from sglang_router.routing.shared.workers import WorkerHands
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker

KEY = bytes(range(32))
LARGE = 1 << 30
"""A budget that is never used up."""


def rules(number: int, **more: Any) -> SharedRules:
    return SharedRules(**{"key": KEY, "router": b"router%02d" % number, **more})


class Hands:
    """Adds and removes workers; those of flags stay. A description is a URL, and perhaps, behind a space, its cost."""

    def __init__(self, bench: Bench) -> None:
        self._fleet = bench.fleet

    def url(self, described: bytes) -> str:
        if not described.startswith(b"http://"):
            raise ValueError("it is no URL")
        return described.decode().partition(" ")[0]

    def has(self, url: str) -> bool:
        return any(worker.spec.source is Source.API for worker in self._fleet.entries(url))

    def add(self, described: bytes) -> None:
        url, _, cost = described.decode().partition(" ")
        if not self._fleet.entries(url):
            self._fleet.add(msgspec.structs.replace(spec_at(url), cost=float(cost or 1.0)), 0.0)

    def remove(self, url: str) -> None:
        for worker in self._fleet.entries(url):
            if worker.spec.source is Source.API:
                self._fleet.remove(worker)


def spec_at(url: str, source: Source = Source.API, instance: str = "") -> WorkerSpec:
    """Return a worker that is healthy at once."""
    return WorkerSpec(url=url, source=source, instance=instance, health=HealthRules(enabled=False))


class Joined:
    """See the module. Further arguments are those of `fleets.Bench`.

    lost   whether what is told comes to nobody
    sent   all that was told, as (number of the router, topic, payload)
    """

    def __init__(self, routers: int, workers: int, policy: Any = "round_robin", **settings: Any) -> None:
        self.lost = False
        self.sent: list[tuple[int, SharedTopic, bytes]] = []
        self.states: list[SharedState] = []
        self.benches: list[Bench] = []
        for _ in range(routers):
            self.add(workers, policy, **settings)

    def add(
        self,
        workers: int,
        policy: Any = "round_robin",
        sessions: Callable[[], Sessions] | None = None,
        quotas: Quotas | None = None,
        blocks: int = 1 << 18,
        hands: Callable[[Bench], WorkerHands] | None = None,
        place: bytes = b"",
        **settings: Any,
    ) -> tuple[Bench, SharedState]:
        """Add a router.

        sessions  makes its memory of sessions; quotas: its limits of clients
        blocks    of its replica of placements
        hands     makes what adds and removes workers for others' word
        place     its machine
        """
        state = SharedState(rules(len(self.states), blocks=blocks, place=place))
        state.connected = True
        bench = Bench(0, policy, kv_caches=KVCaches(None, shared=state.prefixes), **settings)
        if quotas is not None:
            bench.router.quotas = quotas
        if sessions is not None:
            bench.router.sessions = sessions()
        state.attach(bench.router, None if hands is None else hands(bench))
        bench.listeners.add(state)
        bench.join(workers)
        self.states.append(state)
        self.benches.append(bench)
        return bench, state

    def tell(self, now: float) -> None:
        """Let each router tell what is new."""
        for number, state in enumerate(self.states):
            for topic, payload in state.outgoing(now):
                self.sent.append((number, topic, payload))
                if not self.lost:
                    for other in self.states:
                        other.receive(topic, payload)

    def flush(self, now: float) -> None:
        """Let each router tell what is new, and apply what came."""
        self.tell(now)
        for state in self.states:
            assert not state.apply(now, LARGE)

    def loads(self, number: int) -> list[int]:
        """Return the requests in flight at the workers, as one router sees them."""
        return [worker.load for worker in self.benches[number].workers]

    def worker(self, router: int, number: int) -> Worker:
        return self.benches[router].workers[number]
