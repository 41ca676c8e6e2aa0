"""The decision: which worker gets a request, and whether and where it is tried again.

    route(facts, now) -> Plan                  candidates, policy, lease
    retry(plan, outcome, now) -> Plan | None   the leg failed: another one, or None when the failure is the answer

A retry goes at once to a worker that has not failed this request. Only when there is none left does it return to one
that has, after a pause that grows (exponential, with jitter). Back-pressure (BUSY) is never answered by coming again.

All retries together stay within a budget (`core.retry_budget`), so that they do not finish off a fleet that is sick. A
refused connection cost no engine anything: to go elsewhere then is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.events import Listener, Retried, Routed, WorkerChanged
from sglang_router.core.retry_budget import RetryBudget
from sglang_router.core.worker import Lease, Outcome, Worker

if TYPE_CHECKING:
    import random

    from sglang_router.core.fleet import Fleet
    from sglang_router.core.policies import Policy
    from sglang_router.core.request import Facts


class RetryRules(msgspec.Struct, frozen=True):
    """per_worker: tries on one worker; total: retries of one request; backoff in seconds, jitter a share of it."""

    per_worker: int = 3
    total: int = 6
    initial_backoff: float = 0.05
    max_backoff: float = 30.0
    multiplier: float = 1.5
    jitter: float = 0.2


class Plan:
    """The leg of a request that is under way, and what happened before it.

    delay    seconds to wait before the leg is sent
    retries  legs before this one
    """

    __slots__ = ("branch", "delay", "facts", "lease", "matched", "retries", "returns", "total", "tries", "worker")

    def __init__(self, facts: Facts, lease: Lease, branch: str, matched: int, total: int) -> None:
        self.facts = facts
        self.lease = lease
        self.worker = lease.worker
        self.branch = branch
        self.matched = matched
        self.total = total
        self.delay = 0.0
        self.retries = 0
        self.returns = 0  # retries that came back to a worker that had failed
        self.tries: dict[Worker, int] = {}  # failed legs by worker; stays empty on the good way

    def __repr__(self) -> str:
        return f"<Plan {self.worker.url} {self.branch} {self.matched}/{self.total} retry {self.retries}>"


class Router:
    """Routes by one policy over one fleet. `rng` serves the jitter."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        listener: Listener,
        rng: random.Random,
        retries: RetryRules | None = None,
        budget: RetryBudget | None = None,
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.retries = retries or RetryRules()
        self.budget = budget or RetryBudget()
        self._listener = listener
        self._rng = rng

    def route(self, facts: Facts, now: float) -> Plan:
        """The first leg.

        Raises: Unavailable (503) and its kinds when no worker may take it.
        """
        candidates = self.fleet.candidates(now)
        if not candidates:
            raise self.fleet.unavailable(now)
        self.budget.request(now)
        return self._lease(facts, candidates, now, 0)

    def retry(self, plan: Plan, outcome: Outcome, now: float, continued: Facts | None = None) -> Plan | None:
        """Closes the leg with its outcome, and takes another one if the rules allow.

        `continued`: the stream broke, and this is what another worker is to be asked for the rest of it.
        """
        plan.lease.close(outcome, now)
        rules, tries = self.retries, plan.tries
        if (continued is None and not outcome.retryable) or plan.retries >= rules.total:
            return None
        busy = outcome is Outcome.BUSY
        tries[plan.worker] = rules.per_worker if busy else tries.get(plan.worker, 0) + 1
        candidates = self.fleet.able(now)
        fresh = tuple(w for w in self.fleet.candidates(now) if w not in tries)
        fresh = fresh or tuple(w for w in candidates if w not in tries)
        again: tuple[Worker, ...] = ()
        if not fresh and not busy:
            again = tuple(w for w in candidates if tries[w] < rules.per_worker)
        if not fresh and not again:
            return None
        if outcome is not Outcome.REFUSED and not self.budget.take(now):
            return None
        following = self._lease(continued or plan.facts, fresh or again, now, plan.retries + 1)
        following.tries, following.returns = tries, plan.returns
        if again:
            following.delay = self._backoff(plan.returns)
            following.returns += 1
        self._listener.retried(Retried(plan.worker, outcome, following.delay))
        return following

    def _lease(self, facts: Facts, candidates: tuple[Worker, ...], now: float, retries: int) -> Plan:
        choice = self.policy.choose(facts, candidates, now)
        plan = Plan(facts, self.fleet.lease(choice.worker), choice.branch, choice.matched, choice.total)
        plan.retries = retries
        self._listener.routed(
            Routed(facts, choice.worker, self.policy.name, choice.branch, choice.matched, choice.total, retries)
        )
        return plan

    def _backoff(self, returns: int) -> float:
        rules = self.retries
        pause = min(rules.initial_backoff * rules.multiplier ** min(returns, 64), rules.max_backoff)
        return float(pause * (1.0 + self._rng.uniform(-rules.jitter, rules.jitter)))


class PolicyListener(Listener):
    """Tells the policy of workers that come, go, or come back empty."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def worker_changed(self, event: WorkerChanged) -> None:
        if event.what == "added":
            self._policy.added(event.worker)
        elif event.what == "removed":
            self._policy.removed(event.worker)
        elif event.what == "restarted":
            self._policy.emptied(event.worker)
