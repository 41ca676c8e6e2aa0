"""The keeper of one replica: one task that starts its process, stays with it to its end, and starts the next.

    run:  start --> watch --> end what is left of it --> pause --> start --> ...
                      |                                    |
                      '- the process ended                 '- none after `renew`
                      '- not healthy within `startup`      '- FAILED when the rules give up; also when no replica of
                      '- UNHEALTHY for `hang`, and            this run ever was healthy: it is the configuration then,
                         nothing served meanwhile             and a restart would repeat it
                      '- `renew` or `end`

What is heard (the end of the process, a worker's health, an order) only wakes the task, which then looks for itself:
there is one place that acts. The workers stay registered all along; `Fleet.lost` and `Fleet.down` say what became of
them. An engine with data-parallel ranks is one replica with several workers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from typing import TYPE_CHECKING

import msgspec

from sglang_router.core.worker import Health
from sglang_router.launch.process import Process
from sglang_router.launch.replica import Command, Replica, State
from sglang_router.launch.restarts import RestartRules, Restarts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang_router.core.fleet import Fleet
    from sglang_router.core.worker import Worker
    from sglang_router.launch.replica import Reporter
    from sglang_router.net.probe import Prober

log = logging.getLogger("sglang_router.launch")


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds.

    startup  from its start until a replica must be healthy
    hang     that a replica may be unhealthy and serve nothing
    stop     between SIGTERM and SIGKILL
    drain    that running requests are waited for before a restart or the end of a replica
    """

    startup: float = 1800.0
    hang: float = 60.0
    stop: float = 10.0
    drain: float = 180.0


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What all keepers of a run share.

    proven   says whether any replica of this run was healthy once
    changed  hears that a replica is in another state
    """

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    fleet: Fleet
    prober: Prober
    reporter: Reporter
    rules: RestartRules
    timeouts: Timeouts
    proven: Callable[[], bool]
    changed: Callable[[Keeper], None]


class Keeper:
    """See the module.

    workers  what the replica is to the router
    busy     what is being done with it by order: a restart or its removal, whose result is what went wrong, or ""
    """

    def __init__(self, around: Surroundings, replica: Replica, command: Command, workers: Sequence[Worker]) -> None:
        self.replica = replica
        self.command = command
        self.workers = tuple(workers)
        self.ending = False
        self.busy: asyncio.Task[str] | None = None
        self._around = around
        self._restarts = Restarts(around.rules)
        self._news = asyncio.Event()
        self._renew = False
        self._urgent = False
        self._verdicts: list[asyncio.Future[bool]] = []
        # of the present process
        self._process: Process | None = None
        self._up = False  # false as soon as it is known to have ended
        self._well = False  # it was healthy once
        self._sick_since: float | None = None
        self._served = 0  # then
        self.task = around.loop.create_task(self.run())

    # -- what others ask of it ---------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Has it look whether there is something to do."""
        self._news.set()

    def renew(self) -> None:
        """Another process in place of the present one, soon: without a pause, and whatever the rules say."""
        self._renew = True
        self._restarts.forget()
        self._set(State.RESTARTING, "a restart was asked for")
        self.wake()

    def end(self, *, urgent: bool = False) -> None:
        """Ends it for good: `task` is done then. `urgent`: without a grace period."""
        if not self.ending:
            self.ending = True
            self._set(State.STOPPING)
        if urgent:
            self._urgent = True
            if self._process is not None:
                self._process.kill()
        self.wake()

    async def verdict(self) -> bool:
        """Waits until it is healthy, True, or a process of it ended before that, False."""
        if self.replica.state in (State.HEALTHY, State.FAILED, State.STOPPED):
            return self.replica.state is State.HEALTHY
        verdict = self._around.loop.create_future()
        self._verdicts.append(verdict)
        return bool(await verdict)

    def health_changed(self) -> None:
        """The health of one of its workers is another one."""
        healths = {worker.health for worker in self.workers}
        if Health.HEALTHY in healths:
            if self._up:
                self._found_well()
            else:  # the last answer of a process that has ended since; not at once, as others hear of it yet
                self._around.loop.call_soon(self._lose_again)
        elif Health.UNHEALTHY in healths and self._sick_since is None:
            self._sick_since = self._around.clock()
            self._served = self._processed
        self.wake()

    @property
    def load(self) -> int:
        """Requests running there."""
        return sum(worker.load for worker in self.workers)

    # -- its life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            while not self.ending:
                why = await self._live()
                if not self.ending:
                    await self._rest(why)
        except Exception as exc:  # a fault here must leave no engine that nobody watches
            log.exception("the supervision of rank %d failed", self.replica.rank)
            if self._process is not None:
                await self._process.stop(0.0)
            self._give_up(f"its supervision failed: {exc.__class__.__name__}")
            return
        self._set(State.STOPPED)

    async def _live(self) -> str:
        """Starts a process and sees it to its end. Returns why that came: "" if by order."""
        around, replica = self._around, self.replica
        self._begin()
        try:
            self._process = process = await Process.start(around.loop, self.command, self._line)
        except OSError as exc:
            return f"cannot be started: {exc.strerror}"
        replica.pid = process.pid
        self._up = True
        process.exited.add_done_callback(lambda _: self.wake())
        self._check()
        why = await self._watch(process)
        if why:
            replica.pid = 0
            self._lose()
            if not process.exited.done():
                process.kill()
        grace = 0.0 if self._urgent else around.timeouts.stop
        replica.exit = await process.stop(grace)
        replica.pid = 0
        self._process = None
        if not why and not self.ending:
            self._lose()
        return why

    def _begin(self) -> None:
        replica, around = self.replica, self._around
        self._well = False
        self._sick_since = None
        self._renew = False
        replica.tail.clear()
        replica.started_at = around.clock()
        for worker in self.workers:
            if worker.health is Health.DOWN:
                around.fleet.lost(worker, replica.started_at)
        self._set(State.STARTING)

    def _check(self) -> None:
        """Has the workers checked, as there is a process now. Those that nobody checks are well as soon as they run."""
        for worker in self.workers:
            self._around.prober.start(worker)
            self._around.prober.prod(worker)
            if not worker.spec.health.enabled:
                self._around.fleet.probed(worker, None, self._around.clock())
        self.health_changed()

    async def _watch(self, process: Process) -> str:
        """Waits until a process has ended or must; why, "" if by order."""
        while True:
            self._news.clear()
            if self._ordered:
                return ""
            if process.exited.done():
                return _how_it_ended(process.exited.result())
            deadline, why = self._deadline()
            left = deadline - self._around.clock()
            if left <= 0:
                return why
            await self._wait(left)

    def _deadline(self) -> tuple[float, str]:
        """When the present process is given up if nothing happens, and why then."""
        timeouts = self._around.timeouts
        if not self._well:
            return self.replica.started_at + timeouts.startup, f"not healthy within {timeouts.startup:g} s"
        if self._sick_since is None:
            return math.inf, ""
        if self._served != self._processed:  # busy, not hung
            self._served = self._processed
            self._sick_since = self._around.clock()
        return self._sick_since + timeouts.hang, f"hung: no healthy answer for {timeouts.hang:g} s"

    async def _rest(self, why: str) -> None:
        """Between two processes: a pause, or for as long as there is no hope."""
        around = self._around
        if not around.proven() and not self._ordered:
            self._give_up(why)
            while not (around.proven() or self._ordered):
                self._news.clear()
                await self._news.wait()
        if not self._ordered:
            now = around.clock()
            pause = self._restarts.pause(now)
            if pause is None:
                most, window = around.rules.most, around.rules.window
                self._give_up(f"left down after {most} restarts within {window:g} s: {why}")
                pause = math.inf
            else:
                self.replica.next_start = now + pause
                self._set(State.RESTARTING, why)
            await self._until(now + pause)
        self.replica.restarts += not self.ending

    async def _until(self, moment: float) -> None:
        """Waits, unless there is an order."""
        while not self._ordered and (left := moment - self._around.clock()) > 0:
            self._news.clear()
            await self._wait(left)

    async def _wait(self, seconds: float) -> None:
        """Waits for news, no longer than that."""
        timer = self._around.loop.call_later(seconds, self._news.set) if seconds < math.inf else None
        await self._news.wait()
        if timer is not None:
            timer.cancel()

    # -- its state ---------------------------------------------------------------------------------------------------

    def _set(self, state: State, reason: str = "") -> None:
        replica = self.replica
        replica.state = state
        replica.reason = reason
        replica.since = self._around.clock()
        if state not in (State.STARTING, State.LOADING):
            verdicts, self._verdicts = self._verdicts, []
            for verdict in verdicts:
                if not verdict.done():  # whoever waited may have been cancelled
                    verdict.set_result(state is State.HEALTHY)
        self._around.changed(self)

    def _line(self, text: str) -> None:
        self.replica.tail.append(text)
        if self.replica.state is State.STARTING:
            self._set(State.LOADING)
        self._around.reporter.line(self.replica, text)

    def _found_well(self) -> None:
        self._sick_since = None
        if not self._well and not self._ordered:
            self._well = True
            self._set(State.HEALTHY)

    def _lose(self) -> None:
        self._up = False
        for worker in self.workers:
            if worker.health is not Health.DOWN:
                self._around.fleet.lost(worker, self._around.clock())

    def _lose_again(self) -> None:
        if not (self._up or self.ending):
            self._lose()

    def _give_up(self, why: str) -> None:
        for worker in self.workers:
            self._around.fleet.down(worker, why)
            self._around.prober.stop(worker)
        self._set(State.FAILED, why)

    @property
    def _ordered(self) -> bool:
        """Whether the present process must end because somebody said so."""
        return self.ending or self._renew

    @property
    def _processed(self) -> int:
        return sum(worker.processed for worker in self.workers)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has a number only
        return f"killed by signal {-status}"
