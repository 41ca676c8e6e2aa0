"""A pool: the workers that can serve one model in one role, with their candidates, their policy and its memory.

*Candidates* are worked out when the state of a worker changed, not per request, and when time has come to `reopen_at`:
the next moment when an open breaker may let a probe pass.

    in rotation, healthy, there, not judged out              -> candidates
    else: in rotation, unhealthy, there, not judged out      -> candidates (panic: when all checks fail, the workers are
                                                                busy or the check is broken)
    else                                                     -> `unavailable` says why, and when to retry

A worker is *there* unless failed contacts (refused, no route, no connection in time) opened its breaker: no request can
cause those, so any number of workers may be out for them.

It is *judged out* when it is ejected as an outlier, or when failed answers or broken connections opened its breaker.
Requests can cause that, and when most workers fail, the cause is seldom the workers. So at most half of the workers
that are there are judged out, and never the last one. Of more than that, those are let in again that are only ejected,
and then those whose breakers have opened for the shortest time. Their breakers stay as they are: a probe closes them.

*Slow start.* A worker with an empty cache that has its share of the load (`routing.slow_start`) is no candidate.

*Full workers.* A worker with `most_load` requests in flight is no candidate; when all have that many, requests wait.
Where several routers share what they know, one whose own requests are less than its part of `most_load` goes on: else
those of a router with a queue take each place that gets free, and another one's never begin. So it is with windows.

*Seats.* A pool numbers its workers, so that sets of them are bit masks (`routing.roster`): in order of registration, or
as its policy's memory numbers them (`Worker.slot`): then the sets of both mean the same.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import NamedTuple

from sglang_router.errors import Unavailable, WorkersFull
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.outliers import Outliers
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.reasons import why_none
from sglang_router.routing.rules import FleetRules
from sglang_router.routing.seating import Seating
from sglang_router.routing.slow_start import SlowStart
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker


class PoolKey(NamedTuple):
    """What the workers of a pool have in common.

    model  the first name of its model, JSON text; b"" for the first model of the fleet, whatever its name
    role   "regular"; "prefill" or "decode" with disaggregation
    """

    model: bytes = b""
    role: str = "regular"


class Pool:
    """See the module. Only the fleet and `Pools` change it.

    rule       after which its policy was made, see `Tailor`; None: the usual one
    workers    in order of registration
    outliers   finds the workers that do much worse than the others; None: no worker is ejected
    refreshed  how often the able workers were found anew: each time when the state of one may have changed
    reopen_at  the next moment when a breaker of the pool becomes half-open; infinity: none is open
    """

    __slots__ = (
        "_able",
        "_most_load",
        "_room",
        "_routers",
        "_rules",
        "_seating",
        "_share",
        "_slow_start",
        "_time_up",
        "key",
        "outliers",
        "policy",
        "refreshed",
        "reopen_at",
        "rule",
        "workers",
    )

    def __init__(self, key: PoolKey, policy: Policy, rules: FleetRules, time_up: Callable[[Pool, float], None]) -> None:
        self.key = key
        self.policy = policy
        self.rule: Hashable = None
        self.workers: list[Worker] = []
        self.outliers: Outliers[Worker] | None = Outliers(rules.outliers) if rules.outliers is not None else None
        self.refreshed = 0
        self.reopen_at = math.inf
        self._rules = rules
        self._most_load = rules.most_load
        self._routers, self._share = 1, 0  # that send to these workers; requests of this one that a full worker takes
        self._time_up = time_up
        self._seating = Seating(self.workers)
        self._able = self._room = self._seating.able  # and those of them that had room the last time
        self._slow_start = SlowStart(rules.slow_start)

    def __repr__(self) -> str:
        model = self.key.model.decode(errors="replace") or "any model"
        return f"<Pool {model} {self.key.role}: {len(self.workers)} workers, {len(self._able)} able, {self.policy!r}>"

    # -- membership, for `Pools` -------------------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """Add a worker."""
        insort(self.workers, worker, key=attrgetter("order"))
        worker.outliers = self.outliers
        worker.window.routers = self._routers
        if worker.breaker is Breaker.OPEN:
            self.reopen_at = min(self.reopen_at, worker.circuit.reopen_at)
        self.policy.added(worker)
        self._seat(worker)

    def remove(self, worker: Worker) -> None:
        """Remove a worker."""
        self._seating.displace(worker)
        place = self.workers.index(worker)
        del self.workers[place]
        self.policy.removed(worker)
        self._number(place)

    def emptied(self, worker: Worker) -> None:
        """Let the policy forget what it remembers of a worker, whose seat may be another one now."""
        self._seating.displace(worker)
        self.policy.emptied(worker)
        self._seat(worker)

    def _seat(self, worker: Worker) -> None:
        """Give a worker its seat."""
        if self.policy.memory is not None:
            self._seating.place(worker, worker.slot)
        else:
            self._number(self.workers.index(worker))

    def _number(self, place: int) -> None:
        """Number the workers from this place on, unless the policy's memory does it."""
        if self.policy.memory is None:
            following = self.workers[place:]
            for worker in following:
                if worker.seat >= 0:
                    self._seating.displace(worker)
            for seat, worker in enumerate(following, place):
                self._seating.place(worker, seat)

    def use(self, policy: Policy) -> Policy:
        """Let another policy choose from now on; return the old one, which has forgotten the workers."""
        old, self.policy = self.policy, policy
        for worker in self.workers:
            self._seating.displace(worker)
            old.removed(worker)
        for worker in self.workers:
            policy.added(worker)
            self._seat(worker)
        return old

    def limit(self, most_load: int) -> None:
        """Let each worker have at most so many requests in flight from now on; 0: no limit."""
        self._most_load = most_load
        self.divide(self._routers)

    def divide(self, routers: int) -> None:
        """Divide full workers between so many routers: each gets its part of one even if the others have filled it."""
        self._routers = routers
        self._share = self._most_load // routers if routers > 1 else 0
        for worker in self.workers:
            worker.window.routers = routers

    def changed(self, worker: Worker) -> None:
        """Take note that the state of a worker changed."""
        self._seating.changed(worker)

    # -- who may take a request --------------------------------------------------------------------------------------

    def candidates(self, now: float) -> Candidates:
        """Return the workers that may take a request now. It is the same object until something changes."""
        if now >= self.reopen_at:
            self._time_up(self, now)
        if self._seating.unsettled:
            self._refresh(now)
        return self._with_room(now) if self._slow_start.running or self._most_load else self._able

    def able(self, now: float) -> Candidates:
        """Return the candidates and the workers left out only for their load: for a retry, which is not queued."""
        self.candidates(now)
        return self._able

    def well(self) -> list[Worker]:
        """Return the healthy workers whose breakers let requests pass, ejected ones too: those that are compared."""
        return [w for w in self.workers if w.health is Health.HEALTHY and w.in_rotation and w.lets_pass]

    def judge(self, now: float) -> list[Worker]:
        """Eject the workers that do much worse than the others, and end ejections whose time is up; return those."""
        if self.outliers is None:
            return []
        workers, changed = self.well(), []
        reasons = {ejection.worker: ejection.reason for ejection in self.outliers.judge(workers, now)}
        for worker in workers:
            old, worker.ejected = worker.ejected, reasons.get(worker, "")
            if bool(old) != bool(worker.ejected):
                changed.append(worker)
        return changed

    def _refresh(self, now: float) -> None:
        self.refreshed += 1
        changed = self._seating.settle()
        self._able = self._seating.able
        self._slow_start.changed(changed, self._able, now)

    def has_room(self, worker: Worker) -> bool:
        """Return whether a worker is below the most load that one may have, or this router below its part of that."""
        return not self._most_load or worker.load < self._most_load or worker.own_load < self._share

    def _with_room(self, now: float) -> Candidates:
        """Return the able workers without the full ones, and without those in slow start that have their share."""
        roster = self._able.roster
        mask = roster.all
        if self._most_load and roster.high >= self._most_load:
            mask &= ~roster.at_least(self._most_load)
            if self._share:
                for worker in self.workers:
                    if worker.elsewhere and worker.own_load < self._share:
                        mask |= worker.bit
        if self._slow_start.running:
            mask &= ~self._slow_start.with_their_share(self._able, now)
        if mask == roster.all:
            return self._able
        if mask != self._room.mask:
            self._room = self._able.those(mask)
        return self._room

    # -- when there are none -----------------------------------------------------------------------------------------

    def unavailable(self, now: float) -> Unavailable:
        """Return the error that says why there are no candidates, and when to retry."""
        if self._most_load and self.workers and self.able(now):
            return WorkersFull(retry_after=1.0)
        return why_none(self.workers, self._rules.elastic, now)

    def remembered(self, worker: Worker) -> int:
        """Return the bytes of prefixes that a worker is believed to have cached; 0 for policies without a memory."""
        return self.policy.memory.size(worker) if self.policy.memory is not None else 0
