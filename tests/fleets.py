"""Fleets, policies and routers without sockets and clocks, and a listener that records everything.

    bench = Bench(3, "cache_aware")            # three healthy workers: bench.workers, at http://w0:1 ...
    attempt = bench.route(b"a prompt", now=0.0)
    attempt.worker, attempt.branch             # the worker of its plan, and the policy's reason
    attempt.end(Outcome.SERVED, now=1.0)       # or attempt.retry(Outcome.FAILED, now=1.0): the next attempt, or None
    bench.fleet.remove(bench.workers[0])
    bench.log.whats()                          # ["added", ..., "removed"]

    asked = bench.ask(facts(b"a prompt"), 0.0) # may be queued: asked.waits says for what
    bench.settle(1.0)                          # runs what the router scheduled with `soon`
    asked.answers                              # all answers of the router: [Wait, Plan]

Workers come without health checks, so that they are healthy at once; with `checked=True` they have the usual ones.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from sglang_router.routing.candidates import candidates_of
from sglang_router.routing.decider import Delivered
from sglang_router.routing.endpoints import ENDPOINTS
from sglang_router.routing.events import Listener, Listeners, Routed, WorkerChanged
from sglang_router.routing.facts import Facts
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, RequestTag, Route, Wait
from sglang_router.routing.policies import POLICIES
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.pool import PoolKey
from sglang_router.routing.pools import one_pool
from sglang_router.routing.queue import Queue
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.router import Router
from sglang_router.routing.rules import FleetRules, HealthRules, PolicySettings, QueueRules, RetryRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

GENERATE = ENDPOINTS[b"/generate"]
ROUTE = Route("POST", "/generate", "generate")


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
        """Return what changed, of one worker or of all."""
        return [change.what for change in self.changes if worker is None or change.worker is worker]

    def moves(self, what: str) -> list[tuple[str, str]]:
        """Return old and new state of each change of one kind."""
        return [(change.old, change.new) for change in self.changes if change.what == what]


def spec(name: str, *, checked: bool = False, **health: Any) -> WorkerSpec:
    return WorkerSpec(url=f"http://{name}:1", health=HealthRules(enabled=checked, **health))


def facts(
    text: bytes = b"",
    *,
    namespace: bytes = b"",
    key: bytes = b"",
    scaffold: int = 0,
    model: bytes = b"",
    streaming: bool = False,
) -> Facts:
    return Facts(GENERATE, namespace, text, scaffold, streaming, model, key, b'{"text":"%b"}' % text)


def by_model(worker: Worker) -> PoolKey:
    """Return a pool for each model and role; the engine's report counts if the operator named no model."""
    model = worker.spec.model_id or worker.report.model or ""
    return PoolKey(b'"%b"' % model.encode() if model else b"", worker.spec.worker_type)


def any_policy() -> Policy:
    """Return the policy of a fleet in which no request is routed."""
    return Policy(PolicySettings(), random.Random(0))


class Attempt:
    """A plan of one leg, and its worker. It ends once: by `end` or by `retry`."""

    def __init__(self, bench: Bench, asked: Asked, plan: Plan) -> None:
        (self.leg,) = plan.legs
        worker = bench.fleet.by_url(self.leg.target.name)
        assert worker is not None
        assert self.leg.target == worker.target
        self.worker = worker
        self.plan = plan
        self.asked = asked
        self._bench = bench

    @property
    def branch(self) -> str:
        return self.leg.branch

    @property
    def matched(self) -> int:
        return self.leg.matched

    @property
    def total(self) -> int:
        return self.leg.total

    @property
    def delay(self) -> float:
        return self.plan.delay

    @property
    def retries(self) -> int:
        return self.plan.retries

    def end(self, outcome: Outcome = Outcome.SERVED, now: float = 0.0, usage: Usage | None = None) -> None:
        self._bench.router.ended(self.asked.tag, self.leg, outcome, now, usage)

    def retry(self, outcome: Outcome, now: float = 0.0, status: int = 0, continued: bool = False) -> Attempt | None:
        """Fail the leg; return the next attempt. None: no retry, and the request is ended as the relay does it."""
        asked = self.asked
        answer = self._bench.router.retry(asked.tag, self.leg, asked.facts, outcome, now, continued, status)
        if answer is None:
            self.end(outcome, now)
            return None
        asked.hear(answer)
        return asked.attempt


class Asked:
    """A request, and all that the router answered, at once and later."""

    def __init__(self, bench: Bench, tag: RequestTag, facts: Facts) -> None:
        self.tag = tag
        self.facts = facts
        self.answers: list[Delivered] = []
        self._bench = bench
        self._attempt: Attempt | None = None

    def hear(self, answer: Delivered) -> None:
        self.answers.append(answer)
        self._attempt = None
        if isinstance(answer, Plan) and len(answer.legs) == 1:
            self._attempt = Attempt(self._bench, self, answer)

    @property
    def waits(self) -> tuple[str, float] | None:
        """What it waits for, and until when; None when it is not queued any more."""
        last = self.answers[-1]
        return (last.why, last.until) if isinstance(last, Wait) else None

    @property
    def plan(self) -> Plan:
        """The latest plan, of one leg or two."""
        last = self.answers[-1]
        assert isinstance(last, Plan)
        return last

    @property
    def attempt(self) -> Attempt:
        """The latest plan; it has one leg."""
        assert self._attempt is not None
        return self._attempt


class Bench:
    """See the module. Further arguments are settings of the policy.

    checked    workers for which the router requested a health check
    soon       what the router scheduled for after the current call, see `settle`
    """

    def __init__(
        self,
        count: int,
        policy: str | type[Policy] = "round_robin",
        *,
        checked: bool = False,
        rules: FleetRules | None = None,
        retries: RetryRules | None = None,
        queue: QueueRules | None = None,
        assign: Callable[[Worker], PoolKey] | None = one_pool,
        seed: int = 1,
        **settings: Any,
    ) -> None:
        self.log = Log()
        self.checked: list[Worker] = []
        self.soon: list[Callable[[float], None]] = []
        self._asked: dict[int, Asked] = {}
        rng = random.Random(seed)
        self.listeners = listeners = Listeners()
        listeners.add(self.log)
        ids = itertools.count()
        kind = POLICIES[policy] if isinstance(policy, str) else policy
        self.fleet = Fleet(
            listeners,
            lambda: f"id{next(ids)}",
            lambda: kind(PolicySettings(**settings), rng),
            rules,
            assign,
        )
        self.pool = self.fleet.pools.default
        self.policy = self.pool.policy
        self.router = Router(
            self.fleet,
            Queue(queue or QueueRules()),
            listeners,
            retries or RetryRules(),
            RetryBudget(),
            rng,
            self.soon.append,
            self.checked.append,
        )
        self.router.deliver = self._deliver
        listeners.add(self.router)
        self._checked = checked
        self.workers: list[Worker] = []
        self.join(count)

    def _deliver(self, number: int, answer: Delivered) -> None:
        self._asked[number].hear(answer)

    def join(self, count: int, now: float = 0.0) -> None:
        """Add workers."""
        for _ in range(count):
            self.workers.append(self.fleet.add(spec(f"w{len(self.workers)}", checked=self._checked), now))

    def settle(self, now: float = 0.0) -> None:
        """Run what the router scheduled, and what it schedules meanwhile."""
        while self.soon:
            self.soon.pop(0)(now)

    def ask(self, request: Facts, now: float = 0.0, priority: int | None = None) -> Asked:
        """Ask where a request goes. priority: that its client asks for.

        Raises: RouterError, when it is refused.
        """
        number = len(self._asked) + 1
        tag = RequestTag(number, b"r%d" % number, now, ROUTE)
        tag.named = (*tag.named[:5], priority)
        asked = self._asked[number] = Asked(self, tag, request)
        asked.hear(self.router.ask(asked.tag, request, now))
        return asked

    def send(self, request: Facts, now: float = 0.0) -> Attempt:
        """Route a request and end it as served."""
        attempt = self.ask(request, now).attempt
        attempt.end(now=now)
        return attempt

    def route(self, text: bytes = b"", *, now: float = 0.0, namespace: bytes = b"", key: bytes = b"") -> Attempt:
        """Route one request and leave it in flight."""
        return self.ask(facts(text, namespace=namespace, key=key), now).attempt

    def serve(self, text: bytes = b"", *, now: float = 0.0, namespace: bytes = b"", key: bytes = b"") -> Attempt:
        """Route one request and end it as served."""
        return self.send(facts(text, namespace=namespace, key=key), now)

    def choose(self, *among: int, text: bytes = b"", key: bytes = b"") -> Choice:
        """Ask the policy and let it record; no lease. `among` are the numbers of the candidates; none means all."""
        workers = [self.workers[n] for n in among] or self.workers
        asked = facts(text, key=key)
        choice = self.policy.choose(asked, candidates_of(workers), 0.0)
        self.policy.chosen(choice, asked, 0.0)
        return choice

    def load(self, *loads: int) -> None:
        """Bring each worker up to a load, in order."""
        for worker, load in zip(self.workers, loads, strict=True):
            for _ in range(load - worker.load):
                self.fleet.lease(worker)
            assert worker.load == load

    def number(self, worker: Worker) -> int:
        return self.workers.index(worker)

    def spread(self, attempts: list[Attempt]) -> list[int]:
        """Return how many of the attempts each worker got."""
        counts = Counter(attempt.worker for attempt in attempts)
        return [counts[worker] for worker in self.workers]
