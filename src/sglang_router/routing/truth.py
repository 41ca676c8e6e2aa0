"""Compare what the router believed of a worker's cache with what its engine reports, answer by answer.

    Router.ended --> served(lease, usage, now) --> counts                    `routing.tokens`
                                               --> prediction, verdict       `routing.belief`
                                                     '--> the memory of the worker is emptied
                                               --> Policy.reported

Engines that tell no cached tokens, and policies that remember no prefixes, are not judged. Nor is a worker by
the answers of an endpoint that has told no hit of it yet: some say 0 whatever they found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sglang_router.routing.belief import FEW, LONGEST_PROMPT, surprising
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.lease import Lease
from sglang_router.routing.pool import Pool
from sglang_router.routing.roles import DECODE
from sglang_router.routing.usage import Usage

LEARN_EVERY: Final = 4
"""Answers of a worker of which one is used to learn how long a token is: that changes slowly."""


class _Raised:
    """What a policy raised."""

    __slots__ = ("_error",)

    def __init__(self, error: Exception) -> None:
        self._error = error

    def show(self, now: float) -> None:
        """Raise it."""
        raise self._error


class Truth:
    """See the module. soon: calls a function soon, after the current call."""

    __slots__ = ("_fleet", "_soon")

    def __init__(self, fleet: Fleet, soon: Callable[[Callable[[float], None]], None]) -> None:
        self._fleet = fleet
        self._soon = soon

    def served(self, lease: Lease, usage: Usage | None, now: float) -> None:
        """Take note of the end of a leg that was served. usage: what its engine told; None: nothing."""
        worker, choice, facts = lease.worker, lease.choice, lease.facts
        if worker.removed:
            return
        pool = self._fleet.pools.of(worker)
        if usage is not None:
            worker.tokens.told(usage, facts.endpoint.name)
            if usage.prompt > 0 and choice.total > 0:
                if worker.processed % LEARN_EVERY == 0:
                    worker.tokens.rate.told(choice.total, usage.prompt)
                if usage.cached >= 0 and worker.role != DECODE:  # what it has cached was handed over
                    self._compare(lease, usage, pool)
        try:
            pool.policy.reported(choice, facts, usage, now)
        except Exception as error:  # a policy failed: the event loop logs it, and the request ends all the same
            self._soon(_Raised(error).show)

    def _compare(self, lease: Lease, usage: Usage, pool: Pool) -> None:
        """Compare what was cached with what was predicted, and learn from it."""
        worker, choice = lease.worker, lease.choice
        usage.predicted = predicted = worker.tokens.predict(choice.matched, choice.total, usage.prompt)
        if predicted <= FEW:
            return
        usage.missed = surprising(usage)
        worker.belief.misses += usage.missed
        facts = lease.facts
        if lease.alone and lease.life == worker.life and worker.tokens.tells(facts.endpoint.name):
            start, half = facts.namespace + b"\0", facts.scaffold + choice.matched // 2
            prompt = start + facts.text[:LONGEST_PROMPT] if usage.missed else b""
            worker.belief.heard(usage, pool.remembered(worker), prompt, len(start) + half)
            if usage.missed and worker.belief.empty:
                self._fleet.found_empty(worker)
