"""Membership: starts and ends what the router does for a worker while it is registered.

    fleet: "added"   --> the pool keeps connections, health checks and the engine survey start
    fleet: "role"    --> the pool follows a worker whose role changed
    fleet: "removed" --> health checks and survey end, idle connections close; requests in flight end by themselves
    amend(...)       --> the pool follows a worker whose key changed

A worker that seems to be another one under a second URL, as `localhost` and `127.0.0.1` with the same port, is warned
of: one engine would get the share of two.

It is the only listener that does this, so code that adds or removes a worker only tells the fleet.
"""

from __future__ import annotations

import logging

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker
from sglang_router.workers.engine_survey import EngineSurvey
from sglang_router.workers.health_checks import HealthChecks

log = logging.getLogger("sglang_router.workers")


class Membership(Listener):
    """See the module."""

    def __init__(self, fleet: Fleet, pool: ConnectionPool, checks: HealthChecks, survey: EngineSurvey) -> None:
        self._fleet = fleet
        self._pool = pool
        self._checks = checks
        self._survey = survey
        self._places: dict[tuple[str, int, bytes], Worker] = {}  # the first worker of each place

    def worker_changed(self, event: WorkerChanged) -> None:
        """Keep connections to a worker that was added, check and survey it; stop all that for one that was removed."""
        if event.what == "added":
            self._joined(event.worker)
        elif event.what == "removed":
            self._left(event.worker)
        elif event.what == "role":
            self._pool.move(event.worker.target._replace(role=event.old), event.worker.target)

    def _joined(self, worker: Worker) -> None:
        self._pool.know(worker.target)
        other = self._places.setdefault(self._pool.origin(worker.target).place, worker)
        if other.spec.url != worker.spec.url:
            log.warning("%s and %s seem to be one engine under two URLs: remove one", other.url, worker.url)
        self._checks.start(worker)
        self._survey.start(worker)

    def _left(self, worker: Worker) -> None:
        self._checks.stop(worker)
        self._survey.stop(worker)
        place = self._pool.origin(worker.target).place
        if self._places.get(place) is worker:
            del self._places[place]
        self._pool.forget(worker.target)

    def amend(self, worker: Worker, spec: WorkerSpec) -> None:
        """Change what is said of a worker: key, name, weights, labels, health checks. Its URL and rank stay."""
        before = worker.target
        self._fleet.amend(worker, spec)
        if worker.target != before:
            self._pool.move(before, worker.target)
