"""The fleet: the only owner of workers and of everything that changes on them.

    add / remove / drain / resume    membership
    withhold                         the worker's source lets it get no new requests
    probed(worker, ...)              the result of a health check
    lost / down                      the part that runs the engine reports that its process is gone
    lease(worker)                    load + 1; Lease.close(outcome, now): load - 1, and the breaker hears the outcome
    share(worker, elsewhere)         other routers have so many requests in flight there
    doubt(worker)                    another router has taken it out: its next failure opens the breaker
    hear(lease, ...)                 it hears later how a leg ended, when it is known whose fault it was
    judge(now)                       once a second: ejects outliers (`routing.outliers`), pool by pool

Each change has two effects: the pool of the worker is marked stale (`routing.pools`), and an event is emitted. The
pools decide which workers may take a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from sglang_router.errors import Conflict, Unavailable
from sglang_router.routing.breaker import LEG_ENDS
from sglang_router.routing.engine_report import NOTHING, EngineReport
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.lease import Lease
from sglang_router.routing.model_names import Names
from sglang_router.routing.outcome import Hears, Outcome
from sglang_router.routing.policies.base import Policy
from sglang_router.routing.pool import Pool, PoolKey
from sglang_router.routing.pools import Pools
from sglang_router.routing.rules import FleetRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Breaker, BreakerEvent, Health
from sglang_router.routing.worker import Worker, change_of_pause

# Members of an enumeration are looked up slowly before Python 3.12.
_NOTHING, _SUCCESS = Hears.NOTHING, Hears.SUCCESS
_SERVED, _REJECTED, _REFUSED, _LOST = Outcome.SERVED, Outcome.REJECTED, Outcome.REFUSED, Outcome.LOST
_HALF_OPEN: Final = Breaker.HALF_OPEN


class Fleet:
    """All workers.

    new_id       makes the ids of workers (the reference uses UUIDs)
    make_policy  makes the policy of a pool
    assign       returns the key of the pool that a worker belongs to; None: by the model that it announces
    """

    def __init__(
        self,
        listener: Listener,
        new_id: Callable[[], str],
        make_policy: Callable[[], Policy],
        rules: FleetRules | None = None,
        assign: Callable[[Worker], PoolKey] | None = None,
    ) -> None:
        self.rules = rules or FleetRules()
        self.pools = Pools(make_policy, self.rules, self._time_up, assign)
        self._breaks = self.rules.breaker.enabled
        self._listener = listener
        self._new_id = new_id
        self._workers: dict[str, Worker] = {}  # by URL, in order of registration
        self._engines: dict[str, list[Worker]] = {}  # by base URL: an engine, or its ranks
        self._added = 0
        self._leases = 0  # the number of the last lease
        self._restored: set[Worker] = set()  # not checked yet; the cache may still be warm

    def __repr__(self) -> str:
        return f"<Fleet {len(self)} workers, {self.pools!r}>"

    # -- membership --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def by_url(self, url: str) -> Worker | None:
        """Return a worker by its URL (with "@" and the rank for a rank); None without one."""
        return self._workers.get(url)

    def by_id(self, worker_id: str) -> Worker | None:
        """Return a worker by its id; None without one."""
        return next((worker for worker in self if worker.id == worker_id), None)

    def entries(self, url: str) -> list[Worker]:
        """Return all workers of the engine with this base URL: itself, or its ranks."""
        return list(self._engines.get(url, ()))

    def add(self, spec: WorkerSpec, now: float, *, restored: str = "") -> Worker:
        """Register a worker. It takes requests once a health check has passed.

        restored  the id it had before a restart of the router; its cache is assumed to be as it was once a check passes

        Raises: Conflict, when the URL is registered already.
        """
        worker = Worker(spec, restored or self._new_id(), self._added + 1, now)
        if worker.url in self._workers:
            raise Conflict(f"Worker {worker.url} already exists", param="url")
        self._added += 1
        self._workers[worker.url] = worker
        self._engines.setdefault(spec.url, []).append(worker)
        if restored and spec.health.enabled:
            self._restored.add(worker)
        self.pools.place(worker)
        self._changed(worker, "added", "", worker.health.value)
        return worker

    def remove(self, worker: Worker) -> None:
        """Remove a worker for good: it gets no request from now on; those in flight finish."""
        if not worker.removed:
            worker.removed = True
            del self._workers[worker.url]
            self._engines[worker.spec.url].remove(worker)
            if not self._engines[worker.spec.url]:
                del self._engines[worker.spec.url]
            self._restored.discard(worker)
            self.pools.remove(worker)
            self._changed(worker, "removed", worker.health.value, "")

    def amend(self, worker: Worker, spec: WorkerSpec) -> None:
        """Change what an operator said of a worker: key, name, weights, health checks. Its URL stays."""
        worker.describe(msgspec.structs.replace(spec, url=worker.spec.url, dp_rank=worker.dp_rank))
        if not worker.removed:
            self.pools.amended(worker)

    def reported(self, worker: Worker, report: EngineReport, counted: bool = True) -> None:
        """Store what an engine reported about itself. counted: it has just counted its requests."""
        if report.window is not None:
            worker.window.told(report.window, report.requests if counted else None, worker.load)
        if report == worker.report:
            return
        worker.report = report
        worker.told_port = report.bootstrap_port or worker.told_port
        old = worker.role if report.role is None else worker.tell_role(report.role)
        if report.prefilled_tokens is not None and report.prefill_busy_us is not None:
            worker.work.told(report.prefilled_tokens, report.prefill_busy_us)
        if not worker.removed:
            self.pools.place(worker)
            if worker.role != old:
                self._changed(worker, "role", old, worker.role)

    def announced(self, worker: Worker, names: Names) -> None:
        """Store the names of models that an engine announces; they count until it announces others."""
        worker.announce(names)
        if not worker.removed:
            self.pools.place(worker)

    def emptied(self, worker: Worker) -> None:
        """Forget the prefixes of a worker: its cache was flushed, or is useless."""
        worker.belief.forget()
        worker.tokens.emptied()
        if not worker.removed:
            worker.caches += 1
            self.pools.of(worker).emptied(worker)

    def found_empty(self, worker: Worker) -> None:
        """Forget the prefixes of a worker whose reports say that its cache is empty."""
        self.emptied(worker)
        self._changed(worker, "emptied", "", "")

    def set_draining(self, worker: Worker, draining: bool, *, returning: bool = False) -> None:
        """Stop (or resume) sending requests to a worker that stays registered and keeps its cached prefixes.

        returning  it will be restarted, so that requests may wait for it when there is no other worker
        """
        worker.returning = draining and returning
        if worker.draining != draining:
            worker.draining = draining
            names = ("active", "draining")
            self._changed(worker, "draining", names[not draining], names[draining])

    def withhold(self, worker: Worker, why: str) -> None:
        """Let a worker get no new requests because its source says so, or again when `why` is "".

        That is apart from `set_draining`, which is the operator's: neither ends the other.
        """
        old, worker.withheld = worker.withheld, why
        if old != why:
            names = ("allowed", "withheld")
            self._changed(worker, "withheld", names[bool(old)], names[bool(why)])

    def set_paused(self, worker: Worker, paused: tuple[str, ...]) -> None:
        """Say what an engine does without for now; until it has all back, (), its worker gets no new requests."""
        before, worker.paused = worker.paused, paused
        change = change_of_pause(before, paused)
        if change is not None and not worker.removed:
            self._changed(worker, *change)

    # -- who may take a request --------------------------------------------------------------------------------------

    def candidates(self, now: float) -> tuple[Worker, ...]:
        """Return the candidates of all pools."""
        return tuple(worker for pool in self.pools for worker in pool.candidates(now))

    def able(self, now: float) -> tuple[Worker, ...]:
        """Return the able workers of all pools; see `Pool.able`."""
        return tuple(worker for pool in self.pools for worker in pool.able(now))

    def unavailable(self, now: float) -> Unavailable:
        """Return why no pool has a candidate: the reason of the first one."""
        return next(iter(self.pools)).unavailable(now)

    def judge(self, now: float) -> None:
        """Eject workers that do much worse than the others of their pool, and end ejections whose time is up."""
        names = ("kept", "held_off")
        for pool in self.pools:
            for worker in pool.judge(now):
                self._changed(worker, "outlier", names[not worker.ejected], names[bool(worker.ejected)])

    # -- leases ------------------------------------------------------------------------------------------------------

    def number_leases(self, after: int) -> None:
        """Give the next lease a number above this one: other numbers may stand for leases of an earlier process."""
        self._leases = after

    def lease(self, worker: Worker, probe: bool = True) -> Lease:
        """Take one unit of load on a worker. The load counts from now on, whatever the policy.

        probe  the request may be the probe of a half-open breaker
        """
        load = worker.load
        worker.load = load + 1
        if worker.bit:
            worker.roster.raised(worker.bit, load)
        self._leases = number = self._leases + 1
        if worker.circuit.state is _HALF_OPEN and probe and not worker.probing:
            worker.probing = number  # the circuit lets no other request pass until this one ends
            self.pools.changed(worker)
        return Lease(number, worker, self._close)

    def share(self, worker: Worker, elsewhere: int) -> None:
        """Count the requests that other routers have in flight at a worker now, instead of those told before."""
        old = worker.load
        worker.load += elsewhere - worker.elsewhere
        worker.elsewhere = elsewhere
        if worker.bit:
            worker.roster.moved(worker.bit, old, worker.load)

    def _close(self, lease: Lease, outcome: Outcome, now: float, held: bool) -> None:
        worker = lease.worker
        load = worker.load
        worker.load = load - 1
        if worker.bit:
            worker.roster.lowered(worker.bit, load)
        if outcome is _SERVED or outcome is _REJECTED:
            worker.processed += 1
            if lease.silent and worker.gone_silent and not worker.removed:
                self._came_back(worker, now)
        elif outcome is _REFUSED or outcome is _LOST:
            worker.gone_silent = True
        if not held:
            self.hear(lease, outcome.hears, now)

    def hear(self, lease: Lease, hears: Hears, now: float) -> None:
        """Tell breaker and outlier detection what a closed lease says of its worker; NOTHING: it says nothing."""
        worker = lease.worker
        if worker.removed:  # no state to keep, no event to send
            return
        probe = worker.probing == lease.number
        if probe:
            worker.probing = 0
            self.pools.changed(worker)
        if hears is _NOTHING:
            return
        if worker.outliers is not None:
            worker.outliers.heard(worker, hears is not _SUCCESS, lease.first_byte, lease.bucket, now)
        # A success changes nothing while there are no failures, which is nearly always.
        if self._breaks and (hears is not _SUCCESS or worker.circuit.failures):
            self._hear(worker, LEG_ENDS[hears is _SUCCESS, probe], now, hears)

    def doubt(self, worker: Worker, now: float) -> None:
        """Let the next failure of a worker open its breaker, and the next success clear it of all."""
        if self._breaks and not worker.removed:
            self._hear(worker, BreakerEvent.DOUBTED, now)

    # -- breakers ----------------------------------------------------------------------------------------------------

    def _hear(self, worker: Worker, event: BreakerEvent, now: float, kind: Hears = _NOTHING) -> None:
        """Pass an event to the circuit of a worker; emit an event if its state changed."""
        circuit, old = worker.circuit, worker.circuit.state
        circuit.hear(event, self.rules.breaker, now, kind)
        if circuit.state is old:
            return
        worker.probing = 0  # a probe that is still in flight is a request like any other from here on
        if circuit.state is Breaker.OPEN:
            pool = self.pools.of(worker)
            pool.reopen_at = min(pool.reopen_at, circuit.reopen_at)
        self._changed(worker, "breaker", old.value, circuit.state.value)

    def _time_up(self, pool: Pool, now: float) -> None:
        """Make breakers half-open whose time is up. A pool calls this when it is asked for candidates."""
        is_open = [worker for worker in pool.workers if worker.breaker is Breaker.OPEN]
        pool.reopen_at = math.inf
        for worker in is_open:
            if worker.circuit.reopen_at <= now:
                self._hear(worker, BreakerEvent.TIME_UP, now)
            else:
                pool.reopen_at = min(pool.reopen_at, worker.circuit.reopen_at)

    # -- health ------------------------------------------------------------------------------------------------------

    def probed(
        self, worker: Worker, error: str | None, now: float, *, refused: bool = False, lasting: bool = False
    ) -> None:
        """Take the result of one health check: `error` says what was wrong; None: it passed.

        refused  nobody listens
        lasting  the reason does not heal by waiting
        """
        if worker.removed or worker.health is Health.DOWN:
            return
        if error is not None:
            worker.hopeless = lasting
            self._probe_failed(worker, error, now, refused)
            return
        worker.last_error = ""
        worker.hopeless = False
        worker.health_failures = 0
        worker.health_successes += 1
        if worker.gone_silent:
            self._came_back(worker, now)
        self._hear(worker, BreakerEvent.CHECK_PASSED, now)
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
            if now - worker.since > self.rules.startup_timeout:
                self._set_health(worker, Health.UNHEALTHY)
        elif worker.health_failures >= worker.spec.health.failure_threshold:
            self._set_health(worker, Health.UNHEALTHY)

    def lost(self, worker: Worker, now: float) -> None:
        """Make a worker STARTING again: its process is gone, and another one with an empty cache will listen there."""
        if worker.removed:
            return
        had = worker.health is not Health.STARTING or worker in self._restored
        self._restored.discard(worker)
        worker.since = now
        worker.ejected = ""
        worker.health_failures = worker.health_successes = 0
        worker.hopeless = False
        worker.report = NOTHING
        self._set_health(worker, Health.STARTING)
        self._hear(worker, BreakerEvent.PROCESS_LOST, now)
        worker.gone_silent = False
        if had:
            self._came_back(worker, now)

    def down(self, worker: Worker, reason: str) -> None:
        """Make a worker DOWN, and no candidate whatever a check says: its process is gone and is not started again."""
        if not worker.removed:
            worker.last_error = reason
            worker.report = NOTHING
            self._set_health(worker, Health.DOWN)

    def _set_health(self, worker: Worker, health: Health) -> None:
        if worker.health is not health:
            old, worker.health = worker.health, health
            self._changed(worker, "health", old.value, health.value)

    def _came_back(self, worker: Worker, now: float) -> None:
        """Treat a worker as restarted: after refused connections, another process with an empty cache listens there."""
        worker.gone_silent = False
        worker.life += 1
        worker.work = worker.work.renewed()
        worker.weights = ""
        self.set_paused(worker, ())  # that was the other process
        self._restored.discard(worker)
        self._warm_up(worker, now)
        self.emptied(worker)
        self._changed(worker, "restarted", "", "")

    def _warm_up(self, worker: Worker, now: float) -> None:
        if self.rules.slow_start:
            worker.warm_at = now + self.rules.slow_start

    def _changed(self, worker: Worker, what: str, old: str, new: str) -> None:
        self.pools.changed(worker)
        self._listener.worker_changed(WorkerChanged(worker, what, old, new))
