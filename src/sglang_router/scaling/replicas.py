"""Brings the number of replicas on this machine to what it should be (`launch_server --router-autoscale`).

    too few    `runner.add_one()` until there are enough, or there is no room for another
    too many   `runner.remove()` for the one whose cache is worth least, which is drained first; one at a time

What a cache is worth: the bytes of prompt that hits found on that worker, counted half after ten minutes. Equal ones
by the size of their trees, then the newest goes: one that is still loading goes before any that serves.

Replicas that failed for good count for the most there may be: to start ever more of what does not run helps nobody.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from sglang_router.core.events import Listener, Routed, WorkerChanged
from sglang_router.core.worker import Health, Worker
from sglang_router.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sglang_router.core.fleet import Fleet
    from sglang_router.core.scaling import Decision, ScalingRules
    from sglang_router.core.tree import Tree

log = logging.getLogger("sglang_router.scaling")

_HALF_LIFE = 600.0
"""Seconds after which a hit counts half."""


class Runner(Protocol):
    """Who starts and ends replicas. What it calls a replica is its own affair; its workers are those of the fleet."""

    @property
    def why_not(self) -> str:
        """Why `add_one` could not, the last time."""

    def add_one(self) -> Any:
        """Begins to start one more, which is in the fleet at once. None: there is no room for it."""

    def replica_of(self, worker: Worker) -> Any:
        """The replica behind a worker; None for a worker that is run by somebody else."""

    def remove(self, replica: Any) -> Awaitable[object]:
        """Drains one, takes it out of the fleet and ends it."""


class Replicas(Listener):
    """See the module. To be added to the listeners as well, so that it hears of hits; `tree` is that of the policy."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fleet: Fleet,
        runner: Runner,
        tree: Tree | None,
        clock: Callable[[], float],
        rules: ScalingRules,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._runner = runner
        self._tree = tree
        self._clock = clock
        self._most = rules.most
        self._worth: dict[Worker, tuple[float, float]] = {}  # bytes, and the moment they were counted
        self._leaving = ""  # URL of the worker that is being removed
        self._removal: asyncio.Task[None] | None = None
        self._full = ""  # why there is no room for another one
        self._closed = False

    # -- what caches are worth ---------------------------------------------------------------------------------------

    def routed(self, event: Routed) -> None:
        if event.matched > 0:
            now = self._clock()
            self._worth[event.worker] = self.worth(event.worker, now) + event.matched, now

    def worker_changed(self, event: WorkerChanged) -> None:
        if event.what in ("removed", "restarted"):
            self._worth.pop(event.worker, None)

    def worth(self, worker: Worker, now: float) -> float:
        """Bytes of prompt that a worker's cache saved lately."""
        amount, at = self._worth.get(worker, (0.0, now))
        return float(amount * 0.5 ** ((now - at) / _HALF_LIFE))

    def _held(self, worker: Worker) -> int:
        return self._tree.size(worker.slot) if self._tree is not None else 0

    # -- Actuator ----------------------------------------------------------------------------------------------------

    def scale(self, decision: Decision) -> None:
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
        return {
            "kind": "replicas",
            "replicas": len(self._own()),
            "leaving": self._leaving or None,
            "no_room": self._full or None,
        }

    async def close(self) -> None:
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
        """The least worth of those that count; what failed is not in the number that is too high."""
        now = self._clock()
        able = [w for w in self._own() if not w.draining and w.health in (Health.HEALTHY, Health.STARTING)]
        if able:
            worker = min(able, key=lambda w: (self.worth(w, now), self._held(w), -w.order))
            worth = self.worth(worker, now)
            log.info("worker %s leaves: its cache is worth least, %.0f bytes used lately", worker.url, worth)
            self._leaving = worker.url
            self._removal = self._loop.create_task(self._remove(worker))

    async def _remove(self, worker: Worker) -> None:
        try:
            await self._runner.remove(self._runner.replica_of(worker))
        except Conflict as exc:  # somebody restarts it just now; another look comes in a second
            log.warning("worker %s is not removed now: %s", worker.url, exc)
        except Exception:  # a fault must not end the scaling: it would never take one away again
            log.exception("worker %s could not be removed", worker.url)
        finally:
            self._leaving, self._removal = "", None
