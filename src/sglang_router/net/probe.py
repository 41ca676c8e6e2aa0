"""Health checks: one small task per worker asks its health endpoint and tells the fleet what came of it.

    start(worker) --> check --> pause --> check --> ...          until the worker is removed
                        |         |
                        |         '-- spec.health.interval while all is well, else `unhealthy_interval` if
                        |             that is shorter; cut short by prod(worker)
                        '-- GET spec.health.endpoint with the worker's key; all but 2xx is an error
                            --> fleet.probed(worker, error, now), which knows what follows

Relays call `prod` when a worker refuses or breaks a connection: the check comes at once then, not in ten
seconds. A hundred relays that meet the same dead worker make one check, not a hundred.

Once a worker's process is found well, it is asked what it is: that is `meet`, of `net.reports`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from sglang_router.core.worker import Health, Outcome, Worker
from sglang_router.net.fetch import FetchError, fetch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sglang_router.core.fleet import Fleet
    from sglang_router.net.upstream import Upstream

log = logging.getLogger("sglang_router.health")

_REST = 0.05
"""Seconds between two checks, however often a worker is prodded: no tight loop on a dead one."""


class _Watch:
    """What is kept for one worker: its task, and two flags others wait on or set."""

    __slots__ = ("ended", "met", "prodded", "settled", "task")

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.prodded = asyncio.Event()
        self.settled = asyncio.Event()  # found well, and met; or no longer watched
        self.met = False
        self.ended = False

    def end(self) -> None:
        # The cancellation alone would not do: up to Python 3.11 wait_for loses one that comes together with its result.
        self.ended = True
        self.prodded.set()
        self.task.cancel()


class Prober:
    """The health checks of all workers; see the module.

    unhealthy_interval  seconds
    meet                asks a worker what it is, each time its process is found well for the first time
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fleet: Fleet,
        upstream: Upstream,
        clock: Callable[[], float],
        unhealthy_interval: float = 1.0,
        meet: Callable[[Worker], Awaitable[None]] | None = None,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._upstream = upstream
        self._clock = clock
        self._unhealthy_interval = unhealthy_interval
        self._meet = meet
        self._watches: dict[Worker, _Watch] = {}
        self.released = False

    def start(self, worker: Worker) -> None:
        """Checks a worker from now on. Does nothing when that is so already."""
        present = self._watches.get(worker)
        if present is not None and not present.ended:
            return
        watch = self._watches[worker] = _Watch()
        watch.task = self._loop.create_task(self._run(worker, watch))
        watch.task.add_done_callback(lambda _: self._ended(worker, watch))

    def stop(self, worker: Worker) -> None:
        """Ends the checks of a worker at once; those of a removed one also end by themselves, but later."""
        watch = self._watches.get(worker)
        if watch is not None:
            watch.end()

    def prod(self, worker: Worker) -> None:
        """Has a worker checked at once; many calls before the check make one."""
        watch = self._watches.get(worker)
        if watch is not None:
            watch.prodded.set()

    async def healthy(self, worker: Worker, timeout: float) -> bool:
        """Waits until a worker was found well and asked what it is.

        False when that takes over `timeout` seconds, the worker was removed meanwhile, or `release` was called.
        """
        watch = self._watches.get(worker)
        if watch is not None and not self.released:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(watch.settled.wait(), timeout)
        return worker.health is Health.HEALTHY and not worker.removed

    def release(self) -> None:
        """Lets those go on who wait in `healthy`, now and later: there is no time to wait any more."""
        self.released = True
        for watch in self._watches.values():
            watch.settled.set()

    async def close(self) -> None:
        """Ends all checks."""
        watches = list(self._watches.values())
        for watch in watches:
            watch.end()
        await asyncio.gather(*(watch.task for watch in watches), return_exceptions=True)

    def _ended(self, worker: Worker, watch: _Watch) -> None:
        watch.settled.set()
        if self._watches.get(worker) is watch:
            del self._watches[worker]

    async def _run(self, worker: Worker, watch: _Watch) -> None:
        while not worker.removed and not watch.ended:
            watch.prodded.clear()
            well = True
            if worker.gone_silent or worker.health is not Health.HEALTHY:
                watch.met = False  # what comes back may serve something else
            if worker.spec.health.enabled:
                well = await self._check(worker)
            if worker.health is Health.HEALTHY and well and not watch.met:
                watch.met = True
                await self._introduce(worker)
            elif not well:
                watch.met = False
            if worker.health is Health.HEALTHY:
                watch.settled.set()
            if not worker.spec.health.enabled:
                return
            await self._pause(worker, watch, well)

    async def _pause(self, worker: Worker, watch: _Watch, well: bool) -> None:
        pause = worker.spec.health.interval
        if not well or worker.health is not Health.HEALTHY:
            pause = min(pause, self._unhealthy_interval)
        rest = min(_REST, pause)
        await asyncio.sleep(rest)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(watch.prodded.wait(), pause - rest)

    async def _check(self, worker: Worker) -> bool:
        rules = worker.spec.health
        error: str | None = None
        refused = False
        try:
            answer = await fetch(
                self._upstream, worker, b"GET", rules.endpoint.encode(), timeout=rules.timeout, most=1 << 20
            )
            if not answer.ok:
                error = f"GET {rules.endpoint} answered {answer.status}"
        except FetchError as exc:
            if exc.outcome is Outcome.STARVED:  # the router's own trouble says nothing of the worker
                return worker.health is Health.HEALTHY
            error = str(exc)
            refused = exc.outcome is Outcome.REFUSED
        except Exception as exc:  # a fault here must not end the checks: the worker would keep its state for ever
            log.exception("the health check of %s failed in the router", worker.url)
            error = f"The health check failed in the router: {exc.__class__.__name__}."
        self._fleet.probed(worker, error, self._clock(), refused=refused)
        return error is None

    async def _introduce(self, worker: Worker) -> None:
        if self._meet is not None:
            try:
                await self._meet(worker)
            except Exception:  # a fault here must not end the checks: what an engine tells of itself is an extra
                log.exception("asking %s what it is failed in the router", worker.url)
