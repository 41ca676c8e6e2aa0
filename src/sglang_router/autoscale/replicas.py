"""Brings the number of replicas on this machine to the desired number (`launch_server --router-autoscale`).

    too few    `runner.add_one()` until there are enough, or no room for another one
    too many   `runner.remove()` for the replica with the least useful cache, which is drained first; one at a time

How useful a cache is: the bytes of prompt that hits found on that worker, counted half after ten minutes. Among equals
the one with the smallest tree goes, then the newest: a worker that still starts goes before any that serves.

Replicas that failed for good count towards the maximum: there is no use in starting ever more replicas that do not run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from sglang_router.autoscale.scaler import Decision, ScalingRules
from sglang_router.errors import Conflict
from sglang_router.routing.events import Listener, Routed, WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker

log = logging.getLogger("sglang_router.scaling")

_HALF_LIFE = 600.0
"""Seconds after which a hit counts half."""


class ReplicaRunner(Protocol):
    """Starts and ends replicas. A replica is an opaque value here; its workers are in the fleet."""

    @property
    def why_not(self) -> str:
        """Why the last `add_one` failed."""

    def add_one(self) -> Any:
        """Start one more replica; its worker is in the fleet at once. None: there is no room for it."""

    def replica_of(self, worker: Worker) -> Any:
        """Return the replica behind a worker; None for a worker that the runner did not start."""

    def remove(self, replica: Any) -> Awaitable[object]:
        """Drain a replica, remove its worker from the fleet, and end it."""


class ReplicaActuator(Listener):
    """See the module. Add it to the listeners as well, so that it hears of hits."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fleet: Fleet,
        runner: ReplicaRunner,
        clock: Callable[[], float],
        rules: ScalingRules,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._runner = runner
        self._clock = clock
        self._most = rules.most
        self._worth: dict[str, tuple[float, float]] = {}  # by worker id: bytes, and when they were counted
        self._leaving = ""  # URL of the worker that is being removed
        self._removal: asyncio.Task[None] | None = None
        self._full = ""  # why there is no room for another replica
        self._closed = False

    # -- how useful caches are ---------------------------------------------------------------------------------------

    def routed(self, event: Routed) -> None:
        """Add to the worth of a worker that had a matching prefix."""
        leg = event.leg
        if leg.matched > 0:
            now, worker_id = self._clock(), leg.target.worker_id
            self._worth[worker_id] = self.worth(worker_id, now) + leg.matched, now

    def worker_changed(self, event: WorkerChanged) -> None:
        """Forget the worth of a worker that was removed or restarted."""
        if event.what in ("removed", "restarted"):
            self._worth.pop(event.worker.id, None)

    def worth(self, worker_id: str, now: float) -> float:
        """Return the bytes of prompt that a worker's cache saved lately."""
        amount, at = self._worth.get(worker_id, (0.0, now))
        return float(amount * 0.5 ** ((now - at) / _HALF_LIFE))

    # -- Actuator ----------------------------------------------------------------------------------------------------

    def scale(self, decision: Decision) -> None:
        """Add the missing replicas, or remove one."""
        missing = decision.desired - decision.current
        if self._closed:
            return
        if missing > 0:
            self._add(missing)
            return
        self._full = ""
        if missing < 0 and self._removal is None:
            self._remove_one()

    def explain(self) -> dict[str, Any]:
        """Describe the state, for GET /scale."""
        return {
            "kind": "replicas",
            "replicas": len(self._own()),
            "leaving": self._leaving or None,
            "no_room": self._full or None,
        }

    async def close(self) -> None:
        """Stop; cancel a removal."""
        self._closed = True
        if self._removal is not None:
            self._removal.cancel()
            await asyncio.gather(self._removal, return_exceptions=True)

    def _own(self) -> list[Worker]:
        return [worker for worker in self._fleet if self._runner.replica_of(worker) is not None]

    def _add(self, missing: int) -> None:
        for _ in range(min(missing, self._most - len(self._own()))):
            if self._runner.add_one() is None:
                if not self._full:
                    log.warning("no room for another replica: %s", self._runner.why_not)
                self._full = self._runner.why_not or "no port or GPU is left"
                return
            self._full = ""

    def _remove_one(self) -> None:
        """Remove the replica with the least useful cache. Failed replicas are not in the number that is too high."""
        now = self._clock()
        able = [w for w in self._own() if not w.draining and w.health in (Health.HEALTHY, Health.STARTING)]
        if able:
            worker = min(able, key=lambda w: (self.worth(w.id, now), self._fleet.pools.remembered(w), -w.order))
            worth = self.worth(worker.id, now)
            log.info("removing worker %s: its cache is the least useful, %.0f bytes hit lately", worker.url, worth)
            self._leaving = worker.url
            self._removal = self._loop.create_task(self._remove(worker))

    async def _remove(self, worker: Worker) -> None:
        try:
            await self._runner.remove(self._runner.replica_of(worker))
        except Conflict as exc:  # it is being restarted; the next decision tries again
            log.warning("worker %s cannot be removed now: %s", worker.url, exc)
        except Exception:  # a fault must not end autoscaling: no replica would ever be removed again
            log.exception("worker %s could not be removed", worker.url)
        finally:
            self._leaving, self._removal = "", None
