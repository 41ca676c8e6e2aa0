"""Fleets, policies and routers as arithmetic: no socket, no clock, and a listener that writes everything down.

    bench = Bench(3, "cache_aware")            # three healthy workers: bench.workers, at http://w0:1 ...
    plan = bench.route(b"a prompt", now=0.0)
    bench.fleet.remove(bench.workers[0])
    bench.log.whats()                          # ["added", ..., "removed"]

Workers come without health checks, so that they are healthy at once; `checked=True` gives them the usual ones.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

from sglang_router.core.events import Listener, Listeners, Routed, WorkerChanged
from sglang_router.core.fleet import Fleet
from sglang_router.core.policies import POLICIES, Choice, PolicySettings
from sglang_router.core.request import ENDPOINTS, Facts
from sglang_router.core.router import Plan, PolicyListener, RetryRules, Router
from sglang_router.core.worker import BreakerRules, HealthRules, Outcome, Worker, WorkerSpec

GENERATE = ENDPOINTS[b"/generate"]


class Log(Listener):
    """Every event, in the order they came."""

    def __init__(self) -> None:
        self.changes: list[WorkerChanged] = []
        self.decisions: list[Routed] = []

    def worker_changed(self, event: WorkerChanged) -> None:
        self.changes.append(event)

    def routed(self, event: Routed) -> None:
        self.decisions.append(event)

    def whats(self, worker: Worker | None = None) -> list[str]:
        """What changed, of one worker or of all."""
        return [change.what for change in self.changes if worker is None or change.worker is worker]

    def moves(self, what: str) -> list[tuple[str, str]]:
        """From where to where, of one kind of change."""
        return [(change.old, change.new) for change in self.changes if change.what == what]


def spec(name: str, *, checked: bool = False, **health: Any) -> WorkerSpec:
    return WorkerSpec(url=f"http://{name}:1", health=HealthRules(enabled=checked, **health))


def facts(text: bytes = b"", *, namespace: bytes = b"", key: bytes = b"", scaffold: int = 0) -> Facts:
    return Facts(GENERATE, namespace=namespace, text=text, scaffold=scaffold, routing_key=key, size=len(text))


class Bench:
    """See the module. What is not named is a setting of the policy."""

    def __init__(
        self,
        count: int,
        policy: str = "round_robin",
        *,
        checked: bool = False,
        breaker: BreakerRules | None = None,
        retries: RetryRules | None = None,
        seed: int = 1,
        **settings: Any,
    ) -> None:
        self.log = Log()
        rng = random.Random(seed)
        self.policy = POLICIES[policy](PolicySettings(**settings), rng)
        listeners = Listeners()
        listeners.add(PolicyListener(self.policy))
        listeners.add(self.log)
        ids = itertools.count()
        self.fleet = Fleet(listeners, lambda: f"id{next(ids)}", breaker)
        self.router = Router(self.fleet, self.policy, listeners, rng, retries)
        self.workers = [self.fleet.add(spec(f"w{n}", checked=checked), 0.0) for n in range(count)]

    def send(self, request: Facts, now: float = 0.0) -> Plan:
        """Routes a request and ends it well."""
        plan = self.router.route(request, now)
        plan.lease.close(Outcome.SERVED, now)
        return plan

    def route(self, text: bytes = b"", *, now: float = 0.0, namespace: bytes = b"", key: bytes = b"") -> Plan:
        """Routes one request and leaves it running."""
        return self.router.route(facts(text, namespace=namespace, key=key), now)

    def serve(self, text: bytes = b"", *, now: float = 0.0, namespace: bytes = b"", key: bytes = b"") -> Plan:
        """Routes one request and ends it well."""
        return self.send(facts(text, namespace=namespace, key=key), now)

    def choose(self, *among: int, text: bytes = b"", key: bytes = b"") -> Choice:
        """Asks the policy alone: no lease. `among` are the numbers of the candidates; none means all."""
        workers = tuple(self.workers[n] for n in among) or tuple(self.workers)
        return self.policy.choose(facts(text, key=key), workers, 0.0)

    def load(self, *loads: int) -> None:
        """Brings each worker up to a load, in order."""
        for worker, load in zip(self.workers, loads, strict=True):
            for _ in range(load - worker.load):
                self.fleet.lease(worker)
            assert worker.load == load

    def number(self, worker: Worker) -> int:
        return self.workers.index(worker)

    def spread(self, plans: list[Plan]) -> list[int]:
        """How many of the plans each worker got."""
        counts = Counter(plan.worker for plan in plans)
        return [counts[worker] for worker in self.workers]
