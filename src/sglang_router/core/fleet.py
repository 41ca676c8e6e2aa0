"""The fleet: the only owner of workers and of everything that changes on them.

    add / remove / drain / resume    membership
    lost / down                      whoever runs the engine says that its process is gone
    candidates(now)                  who may take a request now
    lease(worker)                    load + 1; Lease.close(outcome, now): load - 1 and the breaker hears
    probed(worker, ...)              a health check's result

`candidates` is computed when something changed, not per request: a state change marks it stale, and the passing of time
matters only at `_reopen_at`, the next moment an open breaker may let a probe through.

    in rotation, healthy, breaker lets pass             -> candidates
    none of these, but some that only the health checks
      call bad (their breakers let pass)                -> these: all sick at once means busy, or a broken check (panic)
    none of these either                                -> `unavailable` says why, and when to come again

Slow start: a worker that comes with an empty cache must not be flooded with all that no one else wants. For
`slow_start` seconds its load may be no more than a share, growing to all, of the mean load of the others; a worker
above that is no candidate for the moment. Strangers still go to it first, as its tree is the smallest.

`most_load` bounds the requests of each worker: who has that many is no candidate, and when all have, requests wait.

Outliers (`core.outliers`) are held off while there are healthy workers that are not. `judge` is called once a second.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.events import WorkerChanged
from sglang_router.core.report import NOTHING
from sglang_router.core.worker import Breaker, BreakerRules, Health, Hears, Lease, Outcome, Worker, WorkerSpec
from sglang_router.errors import Conflict, NoWorkers, Unavailable, WorkersFull, WorkersStarting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang_router.core.events import Listener
    from sglang_router.core.outliers import Outliers
    from sglang_router.core.report import EngineReport


class Fleet:
    """All workers. `new_id` makes worker ids (the reference uses UUIDs); `startup_timeout` and `slow_start` in seconds.

    elastic    somebody starts a worker when there is none: requests may wait for it
    most_load  requests that a worker may have; 0: as many as come
    outliers   finds those that do much worse than the others; None: nobody is held off
    """

    def __init__(
        self,
        listener: Listener,
        new_id: Callable[[], str],
        breaker: BreakerRules | None = None,
        startup_timeout: float = 1800.0,
        slow_start: float = 0.0,
        most_load: int = 0,
        outliers: Outliers[Worker] | None = None,
    ) -> None:
        self.breaker_rules = breaker or BreakerRules()
        self.startup_timeout = startup_timeout
        self.slow_start = slow_start
        self.most_load = most_load
        self.outliers = outliers
        self.elastic = False
        self._listener = listener
        self._new_id = new_id
        self._workers: dict[str, Worker] = {}  # by URL, in order of registration
        self._added = 0
        self._restored: set[Worker] = set()  # not found well yet, and its cache may be warm
        self._able: tuple[Worker, ...] = ()
        self._warming: list[Worker] = []  # candidates whose slow start is not over
        self._room: tuple[Worker, ...] = ()  # of the last candidates, those that had room
        self._stale = False
        self._reopen_at = math.inf

    # -- membership --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def by_url(self, url: str) -> Worker | None:
        return self._workers.get(url)

    def by_id(self, worker_id: str) -> Worker | None:
        return next((worker for worker in self if worker.id == worker_id), None)

    def entries(self, url: str) -> list[Worker]:
        """All workers of the engine with this base URL: itself, or its ranks."""
        return [worker for worker in self if worker.spec.url == url]

    def add(self, spec: WorkerSpec, now: float, *, restored: str = "") -> Worker:
        """Registers a worker. It takes requests once a health check found it well.

        `restored`: the id it had before the router was started again. Its cache may still be as it was: that is
        believed when its first check finds it well.

        Raises: Conflict when the URL is registered already.
        """
        worker = Worker(spec, restored or self._new_id(), self._added + 1, now)
        if worker.url in self._workers:
            raise Conflict(f"Worker {worker.url} already exists", param="url")
        self._added += 1
        self._workers[worker.url] = worker
        if restored and spec.health.enabled:
            self._restored.add(worker)
        self._changed(worker, "added", "", worker.health.value)
        return worker

    def remove(self, worker: Worker) -> None:
        """Takes a worker out for good: no request goes there from now on; running ones end by themselves."""
        if not worker.removed:
            worker.removed = True
            del self._workers[worker.url]
            self._restored.discard(worker)
            self._changed(worker, "removed", worker.health.value, "")

    def amend(self, worker: Worker, spec: WorkerSpec) -> None:
        """Changes what is said of a worker: key, name, weights, health checks. Its URL stays."""
        worker.spec = msgspec.structs.replace(spec, url=worker.spec.url, dp_rank=worker.dp_rank)
        worker.key = spec.api_key.encode() if spec.api_key else None

    def reported(self, worker: Worker, report: EngineReport) -> None:
        """Takes what an engine said of itself."""
        worker.report = report

    def set_draining(self, worker: Worker, draining: bool, *, returning: bool = False) -> None:
        """Stops (or resumes) sending requests to a worker that stays registered and keeps its cached prefixes.

        `returning`: it will be restarted, so that requests may wait for it when there is no other.
        """
        worker.returning = draining and returning
        if worker.draining != draining:
            worker.draining = draining
            names = ("active", "draining")
            self._changed(worker, "draining", names[not draining], names[draining])

    # -- who may take a request --------------------------------------------------------------------------------------

    def candidates(self, now: float) -> tuple[Worker, ...]:
        """The workers that may take a request now, in order of registration; the same tuple until something changes."""
        if now >= self._reopen_at:
            self._half_open(now)
        if self._stale:
            self._stale = False
            able = [w for w in self if w.in_rotation and _lets_pass(w)]
            well = [w for w in able if w.health is Health.HEALTHY]
            kept = [w for w in well if not w.held_off]
            self._able = tuple(kept or well or [w for w in able if w.health is Health.UNHEALTHY])
            self._warming = [w for w in self._able if now < w.warm_at]
        return self._with_room(now) if self._warming or self.most_load else self._able

    def able(self, now: float) -> tuple[Worker, ...]:
        """The same, however much each has to do: for a retry, which does not wait."""
        self.candidates(now)
        return self._able

    def _with_room(self, now: float) -> tuple[Worker, ...]:
        """Those but for the full ones, and for those in slow start that have their share already."""
        full = {w for w in self._able if w.load >= self.most_load} if self.most_load else set()
        self._warming = warming = [w for w in self._warming if now < w.warm_at]
        others = [w.load for w in self._able if w not in warming]
        if others and warming:
            mean = sum(others) / len(others)
            full |= {w for w in warming if w.load >= max(1.0, mean * (1.0 - (w.warm_at - now) / self.slow_start))}
        if not full:
            return self._able
        room = tuple(w for w in self._able if w not in full)
        if room != self._room:  # else the same object: policies remember what they know of one
            self._room = room
        return self._room

    def judge(self, now: float) -> None:
        """Holds off those that do much worse than the others, and lets back whose time is up."""
        if self.outliers is None:
            return
        well = [w for w in self if w.in_rotation and _lets_pass(w) and w.health is Health.HEALTHY]
        reasons = {ejection.worker: ejection.reason for ejection in self.outliers.judge(well, now)}
        for worker in well:
            old, worker.held_off = worker.held_off, reasons.get(worker, "")
            if bool(old) != bool(worker.held_off):
                names = ("kept", "held_off")
                self._changed(worker, "outlier", names[bool(old)], names[bool(worker.held_off)])

    def unavailable(self, now: float) -> Unavailable:
        """Why there are no candidates, and when it is worth asking again."""
        if not self._workers and not self.elastic:
            return NoWorkers(retry_after=5.0)
        if self.most_load and self.able(now):
            return WorkersFull(retry_after=1.0)
        rotation = [w for w in self if w.in_rotation]
        coming = self.elastic if not rotation else all(w.health is Health.STARTING for w in rotation)
        if coming or (not rotation and any(w.returning for w in self)):
            return WorkersStarting(retry_after=5.0)
        waits = [max(0.0, w.reopen_at - now) for w in rotation if w.breaker is Breaker.OPEN]
        waits += [1.0 for w in rotation if w.breaker is Breaker.HALF_OPEN]  # its probe may be back by then
        return Unavailable(retry_after=min(waits, default=5.0))

    def lease(self, worker: Worker) -> Lease:
        """Takes one unit of load on a worker. The load counts from here on, whatever the policy."""
        worker.load += 1
        lease = Lease(worker, self._close)
        if worker.breaker is Breaker.HALF_OPEN:
            worker.probing = lease
            self._stale = True
        return lease

    def _close(self, lease: Lease, outcome: Outcome, now: float) -> None:
        worker = lease.worker
        worker.load -= 1
        hears = outcome.hears
        probe = worker.probing is lease
        if probe:
            worker.probing = None
            self._stale = True
        if hears is Hears.SUCCESS:
            worker.processed += 1
        if worker.removed:  # nobody knows it any more: no state to keep, nothing to tell
            return
        if outcome is Outcome.REFUSED:
            worker.gone_silent = True
        elif hears is Hears.SUCCESS and worker.gone_silent and lease.silent:
            self._came_back(worker, now)
        if hears is Hears.NOTHING:
            return
        if self.outliers is not None:
            self.outliers.heard(worker, hears is not Hears.SUCCESS, lease.first_byte, lease.place, now)
        if self.breaker_rules.enabled:
            self._hear(worker, hears, probe, now)

    # -- the breaker -------------------------------------------------------------------------------------------------

    def _hear(self, worker: Worker, hears: Hears, probe: bool, now: float) -> None:
        if worker.breaker is Breaker.CLOSED:
            if hears is Hears.SUCCESS:
                worker.failures = 0
                return
            worker.failures += 1
            worker.opened_by = hears
            if worker.failures >= self.breaker_rules.threshold:
                self._open(worker, self.breaker_rules.timeout, now)
        elif probe and worker.breaker is Breaker.HALF_OPEN:
            if hears is not Hears.SUCCESS:
                worker.failures += 1
                worker.opened_by = hears
                self._open(worker, min(worker.open_for * 2, self.breaker_rules.max_timeout), now)
            else:
                worker.successes += 1
                if worker.successes >= self.breaker_rules.successes:
                    self._shut(worker)

    def _open(self, worker: Worker, seconds: float, now: float) -> None:
        worker.open_for = seconds
        worker.reopen_at = now + seconds
        worker.successes = 0
        self._reopen_at = min(self._reopen_at, worker.reopen_at)
        self._move(worker, Breaker.OPEN)

    def _shut(self, worker: Worker) -> None:
        worker.failures = worker.successes = 0
        worker.opened_by = Hears.NOTHING
        self._move(worker, Breaker.CLOSED)

    def _half_open(self, now: float) -> None:
        for worker in self:
            if worker.breaker is Breaker.OPEN and worker.reopen_at <= now:
                self._move(worker, Breaker.HALF_OPEN)
        self._reopen_at = min((w.reopen_at for w in self if w.breaker is Breaker.OPEN), default=math.inf)

    def _move(self, worker: Worker, state: Breaker) -> None:
        old, worker.breaker = worker.breaker, state
        worker.probing = None  # one still under way is a request like any other from here on
        self._changed(worker, "breaker", old.value, state.value)

    # -- health ------------------------------------------------------------------------------------------------------

    def probed(self, worker: Worker, error: str | None, now: float, *, refused: bool = False) -> None:
        """Takes the result of one health check; `error` says what was wrong, None that it is well."""
        if worker.removed or worker.health is Health.DOWN:
            return
        if error is not None:
            self._probe_failed(worker, error, now, refused)
            return
        worker.last_error = ""
        worker.health_failures = 0
        worker.health_successes += 1
        if worker.gone_silent:
            self._came_back(worker, now)
        if worker.opened_by is Hears.CONTACT_FAILURE and worker.breaker is not Breaker.CLOSED:
            self._shut(worker)
        enough = worker.health_successes >= worker.spec.health.success_threshold
        if worker.health is Health.STARTING:
            if worker not in self._restored:
                self._warm_up(worker, now)
            self._restored.discard(worker)
            self._set_health(worker, Health.HEALTHY)
        elif worker.health is Health.UNHEALTHY and enough:
            self._set_health(worker, Health.HEALTHY)

    def _probe_failed(self, worker: Worker, error: str, now: float, refused: bool) -> None:
        worker.last_error = error
        worker.health_successes = 0
        worker.health_failures += 1
        if worker in self._restored or (refused and worker.health is not Health.STARTING):
            worker.gone_silent = True
        if worker.health is Health.STARTING:
            if now - worker.since > self.startup_timeout:
                self._set_health(worker, Health.UNHEALTHY)
        elif worker.health_failures >= worker.spec.health.failure_threshold:
            self._set_health(worker, Health.UNHEALTHY)

    def lost(self, worker: Worker, now: float) -> None:
        """Its process is gone; another one, with nothing in its cache, will listen there: it is STARTING again."""
        if worker.removed:
            return
        had = worker.health is not Health.STARTING or worker in self._restored
        self._restored.discard(worker)
        worker.since = now
        worker.held_off = ""
        worker.health_failures = worker.health_successes = 0
        worker.report = NOTHING
        self._set_health(worker, Health.STARTING)
        if worker.breaker is not Breaker.CLOSED:
            self._shut(worker)
        worker.failures = 0
        worker.gone_silent = False
        if had:
            self._came_back(worker, now)

    def down(self, worker: Worker, reason: str) -> None:
        """Its process is gone and nobody will start another one: no candidate any more, whatever a check may find."""
        if not worker.removed:
            worker.last_error = reason
            worker.report = NOTHING
            self._set_health(worker, Health.DOWN)

    def _set_health(self, worker: Worker, health: Health) -> None:
        if worker.health is not health:
            old, worker.health = worker.health, health
            self._changed(worker, "health", old.value, health.value)

    def _came_back(self, worker: Worker, now: float) -> None:
        """A listener that was gone is back: another process, with nothing in its cache."""
        worker.gone_silent = False
        self._restored.discard(worker)
        self._warm_up(worker, now)
        self._changed(worker, "restarted", "", "")

    def _warm_up(self, worker: Worker, now: float) -> None:
        if self.slow_start:
            worker.warm_at = now + self.slow_start

    def _changed(self, worker: Worker, what: str, old: str, new: str) -> None:
        self._stale = True
        self._listener.worker_changed(WorkerChanged(worker, what, old, new))


def _lets_pass(worker: Worker) -> bool:
    if worker.breaker is Breaker.HALF_OPEN:
        return worker.probing is None
    return worker.breaker is Breaker.CLOSED
