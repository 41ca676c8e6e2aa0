"""Health checks: one small task per worker asks its health endpoint and reports the result to the fleet.

    start(worker) --> check --> pause --> check --> ...          until the worker is removed
                        |         |
                        |         '-- spec.health.interval while the worker is well, else `unhealthy_interval` if
                        |             that is shorter; check_now(worker) ends the pause
                        '-- GET spec.health.endpoint with the worker's key; any status but 2xx is an error
                            --> fleet.probed(worker, error, now), which decides what follows

Exchanges call `check_now` when a worker refuses or breaks a connection, so that the check comes at once and not in ten
seconds. A hundred exchanges that meet the same dead worker cause one check, not a hundred.

When a new process of a worker passes its first check, `introduce` asks it what it is (`workers.engine_survey`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.fetch import FetchError, fetch

log = logging.getLogger("sglang_router.health")

_MIN_PAUSE = 0.05
"""Seconds between two checks of a worker, however often `check_now` is called: no tight loop on a dead one."""
_MAX_BYTES = 1 << 20
"""Bytes of an answer to a health check."""


class _Watch:
    """The checks of one worker: their task, and what others set or wait for.

    due         check now
    settled     the worker was found well and introduced itself, or is no longer checked
    introduced  this process of the worker was asked what it is
    ended       no more checks
    """

    __slots__ = ("due", "ended", "introduced", "settled", "task")

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.due = asyncio.Event()
        self.settled = asyncio.Event()
        self.introduced = False
        self.ended = False

    def end(self) -> None:
        """Stop checking the worker."""
        # Set the flag as well: up to Python 3.11 wait_for loses a cancellation that comes together with its result.
        self.ended = True
        self.due.set()
        self.task.cancel()


async def _no_introduction(worker: Worker) -> None:
    """Ask nothing."""


class HealthChecks:
    """The health checks of all workers; see the module.

    unhealthy_interval  seconds between checks of a worker that is not well
    introduce           asks a worker what it is; called once for each process, when it is found well
    released            `release` was called
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fleet: Fleet,
        pool: ConnectionPool,
        clock: Callable[[], float],
        *,
        unhealthy_interval: float,
        introduce: Callable[[Worker], Awaitable[None]] = _no_introduction,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._pool = pool
        self._clock = clock
        self._unhealthy_interval = unhealthy_interval
        self._introduce = introduce
        self._watches: dict[Worker, _Watch] = {}
        self.released = False

    def start(self, worker: Worker) -> None:
        """Check a worker from now on. Does nothing if it is being checked."""
        present = self._watches.get(worker)
        if present is not None and not present.ended:
            return
        watch = self._watches[worker] = _Watch()
        watch.task = self._loop.create_task(self._run(worker, watch))
        watch.task.add_done_callback(lambda _: self._ended(worker, watch))

    def stop(self, worker: Worker) -> None:
        """End the checks of a worker at once. Those of a removed worker also end by themselves, but later."""
        watch = self._watches.get(worker)
        if watch is not None:
            watch.end()

    def check_now(self, worker: Worker) -> None:
        """Check a worker at once; many calls before the check cause one."""
        watch = self._watches.get(worker)
        if watch is not None:
            watch.due.set()

    async def until_healthy(self, worker: Worker, timeout: float) -> bool:
        """Wait until a worker was found well and asked what it is.

        False when that takes more than `timeout` seconds, the worker is removed meanwhile, or `release` was called.
        """
        watch = self._watches.get(worker)
        if watch is not None and not self.released:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(watch.settled.wait(), timeout)
        return worker.health is Health.HEALTHY and not worker.removed

    def release(self) -> None:
        """End every wait in `until_healthy`, now and later: the router stops."""
        self.released = True
        for watch in self._watches.values():
            watch.settled.set()

    async def close(self) -> None:
        """End all checks."""
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
            watch.due.clear()
            well = True
            if worker.gone_silent or worker.health is not Health.HEALTHY:
                watch.introduced = False  # the process that comes back may serve something else
            if worker.spec.health.enabled:
                well = await self._check(worker)
            if worker.health is Health.HEALTHY and well and not watch.introduced:
                watch.introduced = True
                await self._ask_what_it_is(worker)
            elif not well:
                watch.introduced = False
            if worker.health is Health.HEALTHY:
                watch.settled.set()
            if not worker.spec.health.enabled:
                return
            await self._pause(worker, watch, well)

    async def _pause(self, worker: Worker, watch: _Watch, well: bool) -> None:
        pause = worker.spec.health.interval
        if not well or worker.health is not Health.HEALTHY:
            pause = min(pause, self._unhealthy_interval)
        least = min(_MIN_PAUSE, pause)
        await asyncio.sleep(least)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(watch.due.wait(), pause - least)

    async def _check(self, worker: Worker) -> bool:
        """Make one check and report it to the fleet; whether the worker is well."""
        refused = False
        try:
            error = await self._problem(worker)
        except FetchError as exc:
            if exc.outcome is Outcome.STARVED:  # the router's own trouble tells nothing about the worker
                return worker.health is Health.HEALTHY
            error = str(exc)
            refused = exc.outcome is Outcome.REFUSED
        except Exception as exc:  # a fault here must not end the checks: the worker would keep its state for ever
            log.exception("the health check of %s failed in the router", worker.url)
            error = f"The health check failed in the router: {exc.__class__.__name__}."
        self._fleet.probed(worker, error, self._clock(), refused=refused)
        return error is None

    async def _problem(self, worker: Worker) -> str | None:
        """Ask the health endpoint; what is wrong with its answer, if anything. Raises: FetchError."""
        rules = worker.spec.health
        path = rules.endpoint.encode()
        answer = await fetch(self._pool, worker.target, b"GET", path, timeout=rules.timeout, max_bytes=_MAX_BYTES)
        return None if answer.ok else f"GET {rules.endpoint} answered {answer.status}"

    async def _ask_what_it_is(self, worker: Worker) -> None:
        try:
            await self._introduce(worker)
        except Exception:  # a fault here must not end the checks: what an engine says of itself is an extra
            log.exception("asking %s what it is failed in the router", worker.url)
