"""Pools: the workers that can serve one model in one role, with their candidates, their policy and its memory.

    Fleet   -- place, remove, changed -->  Pools  --  PoolKey(model, role)  -->  Pool
    Router  -- only, find ------------->                                          |-- candidates(now)
                                                                                  |-- policy, its memory
                                                                                  '-- outliers

Which pool a worker belongs to follows from the names of models that the fleet's workers announce (`routing.models`), or
is said by `assign`, a function given at construction. Pools are made when a worker needs one and closed when their last
worker has left.

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

*Seats.* A pool numbers its workers, so that sets of them are bit masks (`routing.roster`): in order of registration, or
as its policy's memory numbers them (`Worker.slot`): then the sets of both mean the same.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Final, NamedTuple

from sglang_router.errors import NoWorkers, RouterError, Unavailable, WorkersFull, WorkersStarting
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.model_names import base_of
from sglang_router.routing.models import Section, ServedModels, Serving
from sglang_router.routing.outliers import Outliers
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.rules import FleetRules
from sglang_router.routing.seating import Seating
from sglang_router.routing.slow_start import SlowStart
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker

_RETRY_AFTER: Final = 5.0
"""Retry-After in seconds, when nothing better is known."""
_MOST_REASONS: Final = 3
"""Most reasons that an error names."""
_PROBED_AFTER: Final = 1.0
"""Seconds in which the one request of a half-open breaker may be back."""


class PoolKey(NamedTuple):
    """What the workers of a pool have in common.

    model  the first name of its model, JSON text; b"" for the first model of the fleet, whatever its name
    role   "regular"; "prefill" or "decode" with disaggregation
    """

    model: bytes = b""
    role: str = "regular"


class Pool:
    """See the module. Only the fleet and `Pools` change it.

    workers    in order of registration
    outliers   finds the workers that do much worse than the others; None: no worker is ejected
    refreshed  how often the able workers were found anew: each time when the state of one may have changed
    reopen_at  the next moment when a breaker of the pool becomes half-open; infinity: none is open
    """

    __slots__ = (
        "_able",
        "_most_load",
        "_room",
        "_rules",
        "_seating",
        "_slow_start",
        "_time_up",
        "key",
        "outliers",
        "policy",
        "refreshed",
        "reopen_at",
        "workers",
    )

    def __init__(self, key: PoolKey, policy: Policy, rules: FleetRules, time_up: Callable[[Pool, float], None]) -> None:
        self.key = key
        self.policy = policy
        self.workers: list[Worker] = []
        self.outliers: Outliers[Worker] | None = Outliers(rules.outliers) if rules.outliers is not None else None
        self.refreshed = 0
        self.reopen_at = math.inf
        self._rules = rules
        self._most_load = rules.most_load
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

    def _refresh(self, now: float) -> None:
        self.refreshed += 1
        changed = self._seating.settle()
        self._able = self._seating.able
        self._slow_start.changed(changed, self._able, now)

    def has_room(self, worker: Worker) -> bool:
        """Return whether a worker is below the most load that one may have."""
        return not self._most_load or worker.load < self._most_load

    def _with_room(self, now: float) -> Candidates:
        """Return the able workers without the full ones, and without those in slow start that have their share."""
        roster = self._able.roster
        mask = roster.all
        if self._most_load and roster.high >= self._most_load:
            mask &= ~roster.at_least(self._most_load)
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
        if not self.workers and not self._rules.elastic:
            return NoWorkers(retry_after=_RETRY_AFTER)
        if self._most_load and self.able(now):
            return WorkersFull(retry_after=1.0)
        rotation = [w for w in self.workers if w.in_rotation]
        if self._starting(rotation):
            return WorkersStarting(_with_reasons(WorkersStarting.message, rotation), retry_after=_RETRY_AFTER)
        waits = [max(0.0, w.circuit.reopen_at - now) for w in rotation if w.breaker is Breaker.OPEN]
        waits += [_PROBED_AFTER for w in rotation if w.breaker is Breaker.HALF_OPEN]
        return Unavailable(_with_reasons(Unavailable.message, rotation), retry_after=min(waits, default=_RETRY_AFTER))

    def _starting(self, rotation: list[Worker]) -> bool:
        """Return whether a worker may become ready within seconds, without an operator."""
        if rotation:
            return all(w.health is Health.STARTING for w in rotation) and not all(w.hopeless for w in rotation)
        return self._rules.elastic or any(w.returning for w in self.workers)

    def remembered(self, worker: Worker) -> int:
        """Return the bytes of prefixes that a worker is believed to have cached; 0 for policies without a memory."""
        return self.policy.memory.size(worker) if self.policy.memory is not None else 0


def _with_reasons(message: str, workers: list[Worker]) -> str:
    """Add to a message why these workers are not there: the most frequent reasons, without URLs."""
    counts = Counter(worker.reason for worker in workers if worker.reason)
    if not counts:
        return message
    most = counts.most_common(_MOST_REASONS)
    reasons = "; ".join(f"{reason.rstrip('.')} ({count} of {len(workers)})" for reason, count in most)
    return f"{message} Reasons: {reasons}."


def one_pool(worker: Worker) -> PoolKey:
    """Put all workers in one pool, whatever they announce."""
    return PoolKey()


class Pools:
    """See the module. Iteration gives the pools that have workers, or the default one while there are no workers.

    only     the pool, while there is exactly one and each request may go to each of its workers
    default  the pool of the first model, and of workers that belong to no other; it is never closed
    models   the names that workers announce
    version  increases when pools or names change: a request may belong to another pool then
    """

    def __init__(
        self,
        make_policy: Callable[[], Policy],
        rules: FleetRules,
        time_up: Callable[[Pool, float], None],
        assign: Callable[[Worker], PoolKey] | None = None,
    ) -> None:
        self._make_policy = make_policy
        self._rules = rules
        self._time_up = time_up
        self.models = ServedModels()
        self._by_model = assign is None
        self._assign = assign or self._pool_of_model
        self._names: dict[bytes, Serving] | None = None  # who serves each announced name; None: not found out yet
        self._nameless: Serving | None = None  # the workers that announce nothing
        self._pools: dict[tuple[bytes, str], Pool] = {}  # by PoolKey
        self._of: dict[Worker, Pool] = {}
        self._closing: list[Pool] = []  # without workers; their memory is still to be freed
        self._nobody = self._new(PoolKey(role=""))  # for requests that no pool can serve
        self.default = self._open(PoolKey())
        self._used: tuple[Pool, ...] = ()
        self.version = 0
        self.only: Pool | None = None
        self._count()

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._used)

    def __len__(self) -> int:
        return len(self._used)

    def __repr__(self) -> str:
        return f"<Pools {list(self._used)}>"

    def find(self, model: bytes, role: str = "regular") -> Serving:
        """Return who serves a model in a role; something without workers, if nobody does, for which see `refusal`."""
        pools = self._pools
        if not self._by_model:
            return pools.get((model, role)) or pools.get((b"", role)) or self._nobody
        names = self._names
        if names is None:
            names = self._find_names()
        found = names.get(model) or names.get(base_of(model))
        if found is None and not self.models.several:
            found = self._used[0]
        if found is None and model:
            found = self._nameless
        return found or self._nobody

    def refusal(self, serving: Serving, model: bytes) -> RouterError | None:
        """Return the error for a request to which `find` gave nobody; None for any other request."""
        known = self._by_model and self.models.several
        return self.models.refusal(model) if known and serving is self._nobody else None

    def _find_names(self) -> dict[bytes, Serving]:
        found: dict[bytes, Serving] = {}
        for name, workers in self.models.by_name().items():
            pool = self._of[workers[0]]
            mine = [worker for worker in workers if self._of[worker] is pool]
            found[name] = pool if len(mine) == len(pool.workers) else Section(pool, mine)
        nameless = self.models.nameless()
        self._nameless = Section(self._of[nameless[0]], nameless) if nameless else None
        self._names = found
        return found

    def of(self, worker: Worker) -> Pool:
        """Return the pool of a registered worker."""
        return self._of[worker]

    def remembered(self, worker: Worker) -> int:
        """Return the bytes of prefixes that a worker is believed to have cached; 0 for one that was removed."""
        pool = self._of.get(worker)
        return pool.remembered(worker) if pool is not None else 0

    # -- for the fleet -----------------------------------------------------------------------------------------------

    def place(self, worker: Worker) -> None:
        """Put a worker into its pool: a new one, or one of which something else is known now."""
        others = self.models.note(worker) and self._by_model
        moved = [self._put(each) for each in (list(self.models) if others else [worker])]
        if others or any(moved):
            self._count(others)

    def _put(self, worker: Worker) -> bool:
        """Put a worker into its pool; return whether it was not there."""
        key, old = self._assign(worker), self._of.get(worker)
        if old is not None:
            if old.key == key:
                return False
            self._take_out(worker)
        pool = self._pools.get(key) or self._open(key)
        self._of[worker] = pool
        pool.add(worker)
        return True

    def remove(self, worker: Worker) -> None:
        """Remove a worker from its pool, and the pool with its last worker unless it is the default."""
        self._take_out(worker)
        others = self.models.forget(worker) and self._by_model
        for each in list(self.models) if others else ():
            self._put(each)
        self._count(others)

    def _take_out(self, worker: Worker) -> None:
        pool = self._of.pop(worker)
        pool.remove(worker)
        if not pool.workers and pool is not self.default:
            del self._pools[pool.key]
            self._closing.append(pool)

    def _pool_of_model(self, worker: Worker) -> PoolKey:
        return PoolKey(self.models.pool_of(worker))

    def changed(self, worker: Worker) -> None:
        """Tell the worker's pool that its state changed; do nothing for a removed one."""
        pool = self._of.get(worker)
        if pool is not None:
            pool.changed(worker)

    def tidy(self, now: float, budget: int) -> bool:
        """Do up to `budget` steps of cleaning the policies' memories; return whether there is more to do."""
        pools = [*self._pools.values(), *self._closing]
        share = max(1, budget // len(pools))
        busy = [pool for pool in pools if pool.policy.tidy(now, share)]
        # A prefix tree must be emptied before it is dropped: the cyclic collector does not see it.
        self._closing = [pool for pool in self._closing if pool in busy]
        return bool(busy)

    def _open(self, key: PoolKey) -> Pool:
        pool = self._pools[key] = self._new(key)
        return pool

    def _new(self, key: PoolKey) -> Pool:
        return Pool(key, self._make_policy(), self._rules, self._time_up)

    def _count(self, names_changed: bool = False) -> None:
        used = tuple(pool for pool in self._pools.values() if pool.workers) or (self.default,)
        if used != self._used or names_changed:
            self._used = used
            self._names = None
            self.version += 1
        chosen_by_name = self._by_model and self.models.mixed
        self.only = self._used[0] if len(self._used) == 1 and not chosen_by_name else None
