"""Where a request goes that a worker has failed, and after which pause.

    a failure       a worker that has not failed the request; else one that has, after a pause that grows
                    a pair of which a half has none left: a regular worker, if there is one
    a 404 for what nobody knows who keeps it: the next worker, until all were asked (`routing.kept_ids`)

A request about something that a worker keeps, or that continues it, goes nowhere else than to that worker, if it is
known and has not broken down. While nobody knows it, those that were asked do not count as retries here.

What creates or changes something (`Endpoint.once`) is sent again only if the worker before has not taken it: nobody
wants a second batch, or a second copy of a file.
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple

from sglang_router.routing.assignment import Assignment
from sglang_router.routing.candidates import Candidates, candidates_of
from sglang_router.routing.facts import Facts
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.models import Serving
from sglang_router.routing.outcome import BREAKS, Outcome
from sglang_router.routing.pair import ServingPair
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.rules import RetryRules
from sglang_router.routing.trail import Trail
from sglang_router.routing.worker import Worker

_NOBODY: Final = candidates_of(())
_FREE: Final = frozenset((Outcome.REFUSED, Outcome.STALE))
"""What cost no engine anything: a retry after it needs no budget."""
_NOT_TAKEN: Final = frozenset((Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED, Outcome.BUSY))
"""After these a worker has not begun with the request."""


class NextTry(NamedTuple):
    """One of these candidates gets the request, after `delay` seconds. readers: of a pair, those for its first half."""

    serving: Serving
    candidates: Candidates
    delay: float = 0.0
    readers: Candidates | None = None


class Again:
    """See the module.

    rules  how often a request is retried, and after which pauses
    rng    for the jitter of pauses
    """

    __slots__ = ("_assignment", "_fleet", "_rng", "_rules")

    def __init__(self, fleet: Fleet, assignment: Assignment, rules: RetryRules, rng: random.Random) -> None:
        self._fleet = fleet
        self._assignment = assignment
        self._rules = rules
        self._rng = rng

    def after(
        self,
        trail: Trail,
        worker: Worker,
        facts: Facts,
        outcome: Outcome,
        budget: RetryBudget,
        now: float,
        continued: bool = False,
    ) -> NextTry | None:
        """Return where a request goes that a worker has failed; None when no worker is left, or no budget.

        continued  the client has the beginning of the answer, so that no other model may go on with it
        """
        rules, tries, assignment = self._rules, trail.tries, self._assignment
        if trail.retries - trail.strangers >= rules.total or (facts.endpoint.once and outcome not in _NOT_TAKEN):
            return None
        elsewhere = outcome is Outcome.BUSY or outcome is Outcome.VANISHED
        once = elsewhere or outcome in BREAKS
        tries[worker] = rules.per_worker if once else tries.get(worker, 0) + 1
        serving = assignment.serving(facts)
        readers: Candidates | None = None
        keeps = assignment.holder(facts) is worker
        if keeps and (facts.endpoint.about or outcome is Outcome.BUSY or outcome is Outcome.FAILED):
            fresh, again = _NOBODY, candidates_of([worker] if tries[worker] < rules.per_worker else [])
        elif facts.endpoint.about and (left := assignment.next_to_ask(facts, tries, now)) is not None:
            (serving, fresh), again = left, _NOBODY
        else:
            most = 0 if elsewhere else rules.per_worker
            fresh, again, readers = self._halves(serving, trail, most, now)
            if not fresh and (not again or outcome is Outcome.REFUSED):
                if isinstance(serving, ServingPair) and (regular := assignment.naming.find(facts)).able(now):
                    serving = regular
                    fresh, again, readers = self._halves(serving, trail, most, now)
                elif assignment.naming.on and not continued and (other := assignment.instead(facts, now)):
                    serving = other
                    fresh, again, readers = self._halves(serving, trail, rules.per_worker, now)
        if not (fresh or again) or (outcome not in _FREE and not budget.take(now)):
            return None
        trail.retries += 1
        if fresh:
            return NextTry(serving, fresh, readers=readers)
        return NextTry(serving, again, trail.pause(rules, self._rng), readers)

    def not_found(self, trail: Trail, worker: Worker, facts: Facts, now: float) -> NextTry | None:
        """Return who is asked next for what a worker does not keep; None when all were asked."""
        trail.tries[worker] = self._rules.per_worker
        found = self._assignment.next_to_ask(facts, trail.tries, now)
        if found is None:
            return None
        trail.retries += 1
        trail.strangers += 1
        return NextTry(*found)

    def _halves(
        self, serving: Serving, trail: Trail, most: int, now: float
    ) -> tuple[Candidates, Candidates, Candidates | None]:
        """Return what `_candidates` does, and of a pair those for its first half: it is no fresher than that."""
        fresh, again = self._candidates(serving, trail, most, now)
        if not isinstance(serving, ServingPair):
            return fresh, again, None
        first, second = self._candidates(serving.prefill, trail, most, now)
        if first:
            return fresh, again, first
        return _NOBODY, (fresh or again) if second else _NOBODY, second

    def _candidates(self, serving: Serving, trail: Trail, most: int, now: float) -> tuple[Candidates, Candidates]:
        """Return the workers that have not failed the request, and those that have but may be tried again.

        most  attempts at one worker

        The first are those with room, or all of them when none has room: a retry is not queued. Another rank of an
        engine that has failed comes last: it ends with that engine, and is no second opinion. A request that may itself
        be at fault goes to a worker with a half-open breaker only if there is no other.
        """
        able, tries = serving.able(now), trail.tries
        tried = able.set_of(tries)
        mask = serving.candidates(now).mask & ~tried or able.mask & ~tried
        siblings = able.set_of([other for worker in tries for other in self._fleet.entries(worker.spec.url)])
        mask = mask & ~siblings or mask
        if trail.failures:
            mask = mask & ~able.roster.on_trial or mask
        again = 0 if mask else able.set_of([worker for worker in tries if tries[worker] < most])
        return able.those(mask), able.those(again)
