"""Health checks: one small task per worker asks its health endpoint and reports the result to the fleet.

    start(worker) --> check --> pause --> check --> ...          until the worker is removed
                        |         |
                        |         '-- spec.health.interval while the worker is well, else `unhealthy_interval` if
                        |             that is shorter, growing with the time it fails; check_now(worker) ends the pause
                        '-- GET spec.health.endpoint with the worker's key; any status but 2xx is an error
                            --> fleet.probed(worker, error, now), which decides what follows

A worker that fails is checked again after a tenth of the time that it has failed, up to 10 to 15 s, and longer when
there are more than 250 such workers (`pause_of`). So one that was just lost is noticed at once when it returns, and any
number that is gone for good costs next to nothing. Only a replica that starts is always checked at
`unhealthy_interval`: its process is there.
The first failed check is logged with its reason, then once a minute while it lasts, and soon when the reason changes.
Some reasons do not heal by waiting (`_STRANGE`, `_ABSENT`): no request is queued for such a worker to start.

Workers that were found well at the same time, such as at the start, are not checked at the same time again: the first
pause of each is another part of the interval (`workers.rhythm`).

A check uses a kept connection, but now and then a new one, and always after a failed check: so it finds an engine that
serves old connections and takes no new ones, and an address that is gone.
An engine that the control plane has paused may answer late, or with an error: SGLang generates a token to tell its
health. That is no failure, as the worker gets no requests then; that nobody listens any more is one.
Exchanges call `check_now` when a worker refuses or breaks a connection: the check comes at once, once for all of them.
When a new process of a worker passes its first check, `introduce` asks it what it is (`workers.engine_survey`). One
that starts is asked first and becomes healthy then: which requests it may get depends on its model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Awaitable, Callable

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.source import Source
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.fetch import Fetched, FetchError, ask_once, fetch, head_of
from sglang_router.workers.health_answers import ITSELF, is_strange, wrong
from sglang_router.workers.rhythm import Alarm, pause_to_step

log = logging.getLogger("sglang_router.health")

_MIN_PAUSE = 0.05
"""Seconds between two checks of a worker, however often `check_now` is called: no tight loop on a dead one."""
_LONGEST_INTRODUCTION = 1.0
"""Seconds for which a worker that passed its first check is not healthy yet, because it does not say what it is."""
_NO_HOST = (Outcome.UNCONNECTED, Outcome.UNREACHABLE)
"""Outcomes of a check that say that the host does not answer; a slow answer is no such outcome."""
_MAX_BYTES = 1 << 20
"""Bytes of an answer to a health check."""
_SHARE = 0.1
"""Pause between two checks of a worker that fails, as a share of the time since it failed first."""
_LONGEST_PAUSE = 12.5
_MOST_CHECKS = 20.0
"""Checks a second of all workers together that fail for long: the longest pause grows with their number."""
_JITTER = 0.2
_LONG = 0.5
"""Share of the interval from which on a pause ends together with those of other workers."""
_FRESH_EVERY = 30.0
"""Seconds after which a check is made on a new connection."""
_TOLD_EVERY = 60.0
"""Seconds between two warnings about a worker that fails for the same reason."""
_TOLD_APART = 5.0
"""Seconds between two warnings about a worker that fails for another reason than before."""
_MOST_REASONS = 16
"""Reasons whose last warning is remembered for a worker."""

_STRANGE = {Outcome.UNREACHABLE, Outcome.INVALID}
"""TLS, a name that is unknown, a network that is not there; an answer that is no HTTP: no engine is there."""
_ABSENT = {Outcome.REFUSED, Outcome.BROKEN, Outcome.STALE}
"""Nobody listens, or only a proxy in front of the engine."""
_ENOUGH = 3
"""Checks in a row that find no engine, after which waiting for the worker ends."""


class _Watch:
    """The checks of one worker: their task, and what others set or wait for.

    due         check now
    settled     the worker was found well and introduced itself, was found to be no engine, or is no longer checked
    strange     checks in a row that found no engine: TLS, an unknown name, an answer that no engine gives
    introduced  this process of the worker was asked what it is
    ended       no more checks
    failing     since when the checks fail; None: the last one passed
    fresh_at    when the next check is made on a new connection
    in_turn     since a worker was found well, its checks are as far apart from those of others as they can be
    told        when each reason was logged; empty since the worker is healthy again
    told_at     when one was logged last
    """

    __slots__ = (
        "due",
        "ended",
        "failing",
        "fresh_at",
        "in_turn",
        "introduced",
        "settled",
        "strange",
        "task",
        "told",
        "told_at",
    )

    task: asyncio.Task[None]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.due = Alarm(loop)
        self.settled = asyncio.Event()
        self.introduced = False
        self.in_turn = False
        self.ended = False
        self.failing: float | None = None
        self.fresh_at = 0.0
        self.strange = 0
        self.told: dict[str, float] = {}
        self.told_at = -math.inf

    def end(self) -> None:
        """Stop checking the worker."""
        # Set the flag as well: up to Python 3.11 wait_for loses a cancellation that comes together with its result.
        self.ended = True
        self.due.set()
        self.task.cancel()


async def _no_introduction(worker: Worker) -> None:
    """Ask nothing."""


async def _no_impostor(worker: Worker) -> str:
    """Take each worker for what its URL says."""
    return ""


class HealthChecks:
    """The health checks of all workers; see the module.

    unhealthy_interval  seconds between checks of a worker that is not well
    introduce           asks a worker what it is; called once for each process, when it is found well
    impostor            asked before a worker is asked that is not healthy, and before it becomes so: who answers in its
                        place, as an error; "" if nobody does
    vanished            called with the name of an unhealthy worker when a check finds that its host does not answer
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
        rng: random.Random | None = None,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._pool = pool
        self._clock = clock
        self._unhealthy_interval = unhealthy_interval
        self._introduce = introduce
        self._rng = rng or random.Random()
        self._watches: dict[Worker, _Watch] = {}
        self._failing: set[_Watch] = set()
        self.impostor: Callable[[Worker], Awaitable[str]] = _no_impostor
        self.vanished: Callable[[str], None] = lambda name: None
        self.released = False

    def start(self, worker: Worker) -> None:
        """Check a worker from now on. Does nothing if it is being checked."""
        present = self._watches.get(worker)
        if present is not None and not present.ended:
            return
        watch = self._watches[worker] = _Watch(self._loop)
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

        False when that takes more than `timeout` seconds, the worker is removed meanwhile, or `release` was called; or
        `found_no_engine`.
        """
        watch = self._watches.get(worker)
        if watch is not None and not self.released:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(watch.settled.wait(), timeout)
        return worker.health is Health.HEALTHY and not worker.removed

    def found_no_engine(self, worker: Worker) -> bool:
        """Return whether its checks find that there is no engine, `_ENOUGH` in a row."""
        return worker in self._watches and self._watches[worker].strange >= _ENOUGH

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
        self._failing.discard(watch)
        if self._watches.get(worker) is watch:
            del self._watches[worker]

    async def _run(self, worker: Worker, watch: _Watch) -> None:
        while not worker.removed and not watch.ended:
            watch.due.clear()
            well = True
            if worker.gone_silent or worker.health is not Health.HEALTHY:
                watch.introduced = False  # the process that comes back may serve something else
            if worker.spec.health.enabled:
                well = await self._check(worker, watch)
            if worker.health is Health.HEALTHY and well and not watch.introduced:
                watch.introduced = True
                await self._ask_what_it_is(worker)
            elif not well:
                watch.introduced = False
            if worker.health is Health.HEALTHY or worker.last_error == ITSELF:
                watch.settled.set()
            if not worker.spec.health.enabled:
                return
            await self._pause(worker, watch, well)

    async def _pause(self, worker: Worker, watch: _Watch, well: bool) -> None:
        """Wait until the next check is due, or is asked for."""
        since = self._loop.time()
        pause = self._interval(worker, watch, well)
        await watch.due.wait(pause)
        if watch.due.ringing:
            await asyncio.sleep(max(0.0, since + min(_MIN_PAUSE, pause) - self._loop.time()))

    def _interval(self, worker: Worker, watch: _Watch, well: bool) -> float:
        """Return the seconds until the next check."""
        interval = worker.spec.health.interval
        if well and worker.health is Health.HEALTHY:
            pause, watch.in_turn = interval if watch.in_turn else interval * worker.phase, True
            return pause_to_step(self._loop.time(), pause, interval)
        shortest = min(interval, self._unhealthy_interval)
        if watch.failing is None or _is_being_launched(worker):
            return shortest
        grown = pause_of(self._clock() - watch.failing, len(self._failing))
        pause = max(shortest, grown * self._rng.uniform(1.0 - _JITTER, 1.0 + _JITTER))
        return pause if pause < _LONG * interval else pause_to_step(self._loop.time(), pause, interval)

    async def _check(self, worker: Worker, watch: _Watch) -> bool:
        """Make one check and report it to the fleet; whether the worker is well."""
        refused = absent = strange = False
        outcome = Outcome.SERVED
        try:
            error = await self._impostor(worker)  # before: the request bears the worker's key
            if error is None:
                answer = await self._ask(worker, watch)
                error, strange = wrong(answer, worker.spec), is_strange(answer)
                if error is None:
                    error = await self._impostor(worker)
        except FetchError as exc:
            if exc.outcome is Outcome.STARVED:  # the router's own trouble tells nothing about the worker
                return worker.health is Health.HEALTHY
            error = str(exc)
            outcome = exc.outcome
            refused, absent, strange = exc.outcome is Outcome.REFUSED, exc.outcome in _ABSENT, exc.outcome in _STRANGE
        except Exception as exc:  # a fault here must not end the checks: the worker would keep its state for ever
            log.exception("the health check of %s failed in the router", worker.url)
            error = f"The health check failed in the router: {exc.__class__.__name__}."
        alive = outcome in (Outcome.SERVED, Outcome.TIMEOUT) and not strange
        if error is not None and alive and worker.paused and worker.health is Health.HEALTHY:
            return True
        if error is None and worker.health is Health.STARTING and not (watch.introduced or worker.spec.dp_aware):
            watch.introduced = True  # ranks, in contrast, take over when one of them is healthy and was asked
            await self._introduce_first(worker, watch)
            return True
        lasting = strange or (absent and _absence_lasts(worker))
        watch.strange = watch.strange + 1 if strange else 0
        was, now = worker.health, self._clock()
        self._fleet.probed(worker, error, now, refused=refused, lasting=lasting)
        if outcome in _NO_HOST and worker.health is Health.UNHEALTHY:
            self.vanished(worker.target.name)
        if error is None:
            self._passed(worker, watch, was)
        elif not worker.removed:
            self._failed(worker, watch, now)
        return error is None

    async def _introduce_first(self, worker: Worker, watch: _Watch) -> None:
        """Report a passed check once the worker was asked what it is; an engine that does not answer is not awaited."""
        asking = self._loop.create_task(self._ask_what_it_is(worker))
        try:
            await asyncio.wait([asking], timeout=_LONGEST_INTRODUCTION)
            was, watch.strange = worker.health, 0
            self._fleet.probed(worker, None, self._clock())
            self._passed(worker, watch, was)
            await asking
        finally:
            asking.cancel()

    async def _impostor(self, worker: Worker) -> str | None:
        """Return who answers in place of a worker that is not healthy yet; None if nobody does."""
        return await self.impostor(worker) or None if worker.health is not Health.HEALTHY else None

    async def _ask(self, worker: Worker, watch: _Watch) -> Fetched:
        """Ask the health endpoint, now and then on a new connection. Raises: FetchError."""
        rules, pool, target, now = worker.spec.health, self._pool, worker.target, self._clock()
        path = rules.endpoint.encode()
        pool.refresh(target)
        if now < watch.fresh_at and watch.failing is None:
            return await fetch(pool, target, b"GET", path, timeout=rules.timeout, max_bytes=_MAX_BYTES)
        watch.fresh_at = now + _FRESH_EVERY
        head = head_of(pool, target, b"GET", path)
        return await ask_once(pool, target, head, b"", timeout=rules.timeout, max_bytes=_MAX_BYTES, fresh=True)

    def _failed(self, worker: Worker, watch: _Watch, now: float) -> None:
        """Note a failed check, and warn: the first time, when the reason changes, and once a minute."""
        if watch.failing is None:
            watch.failing = now
            watch.in_turn = False
            self._failing.add(watch)
        if watch.strange == _ENOUGH:
            watch.settled.set()
        if worker.health is Health.DOWN or (_is_being_launched(worker) and not worker.hopeless):
            return  # the launcher tells how far its replicas are
        if self.released and worker.spec.source is Source.REPLICAS:
            return  # the launcher ends them
        again = watch.told.get(worker.reason, -math.inf) + _TOLD_EVERY
        if now >= max(again, watch.told_at + _TOLD_APART):
            if len(watch.told) == _MOST_REASONS:
                watch.told.clear()
            watch.told[worker.reason] = watch.told_at = now
            fields = {"worker": worker.url, "error": worker.reason, "failing_seconds": round(now - watch.failing, 1)}
            log.warning("worker fails its health checks", extra={"fields": fields})

    def _passed(self, worker: Worker, watch: _Watch, was: Health) -> None:
        """Note a check that passed; tell it if the failed ones were told and the change of health does not."""
        if watch.failing is not None and watch.told and was is worker.health is Health.HEALTHY:
            log.info("worker passes its health checks again", extra={"fields": {"worker": worker.url}})
        if worker.health is Health.HEALTHY:
            watch.told.clear()
        watch.failing = None
        self._failing.discard(watch)

    async def _ask_what_it_is(self, worker: Worker) -> None:
        try:
            await self._introduce(worker)
        except Exception:  # a fault here must not end the checks: what an engine says of itself is an extra
            log.exception("asking %s what it is failed in the router", worker.url)


def pause_of(failing_for: float, failing: int) -> float:
    """Return the pause between two checks of a worker that fails, without its jitter.

    failing_for  seconds since its first failed check
    failing      number of workers that fail
    """
    return min(failing_for * _SHARE, max(_LONGEST_PAUSE, failing / _MOST_CHECKS))


def _is_being_launched(worker: Worker) -> bool:
    return worker.health is Health.STARTING and worker.spec.source is Source.REPLICAS


def _absence_lasts(worker: Worker) -> bool:
    """Return whether nobody listens for longer than a moment, although no process is known to be starting there."""
    return worker.health_failures > 0 and worker.spec.source is not Source.REPLICAS
