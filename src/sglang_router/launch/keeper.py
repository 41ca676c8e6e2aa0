"""The keeper of one replica: one task that starts its process, watches it until it ends, and starts the next.

    run:  start --> watch --> end its remaining processes --> pause --> start --> ...
                      |                                         |
                      '- the process ended                      '- no pause after `restart`
                      '- not healthy within `startup`           '- FAILED after too many restarts; also if no replica of
                      '- unhealthy for `hang`, and                 this launcher was ever healthy: then the
                         answered no request meanwhile             configuration is wrong, and a restart would not help
                      '- another program has its port
                      '- `restart` or `end`

Events (the end of the process, a worker's health, an order) only wake the task. The task then checks the state itself,
so all actions are in one place. The workers stay registered while their process is replaced; `Fleet.lost` and
`Fleet.down` tell the fleet about the process. An engine with data-parallel ranks is one replica with several workers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from sglang_router.launch.listeners import stranger_at
from sglang_router.launch.process import EngineProcess
from sglang_router.launch.replica import EngineCommand, EngineReplica, ReplicaReporter, ReplicaState
from sglang_router.launch.restarts import RestartHistory, RestartRules
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.words import counted
from sglang_router.workers.health_checks import HealthChecks

log = logging.getLogger("sglang_router.launch")

_NOT_RUNNING = "its process does not run"


class ReplicaTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait for a replica, in seconds.

    startup  for it to become healthy after its start
    hang     for it to answer a health check or a request, once it is unhealthy
    stop     between SIGTERM and SIGKILL
    drain    for its requests to finish, before it is restarted or removed
    """

    startup: float = 1800.0
    hang: float = 60.0
    stop: float = 10.0
    drain: float = 180.0


class SupervisionRules(msgspec.Struct, frozen=True, kw_only=True):
    """When to restart and when to give up."""

    restarts: RestartRules = RestartRules()
    timeouts: ReplicaTimeouts = ReplicaTimeouts()


class SupervisedRouter(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of the router that the supervision uses. It runs on the router's event loop."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    fleet: Fleet
    checks: HealthChecks


class SupervisionContext(msgspec.Struct, frozen=True, kw_only=True):
    """What all keepers of a launcher share.

    any_was_healthy  says whether any replica of this launcher was ever healthy
    changed          is called when a replica has changed its state
    """

    router: SupervisedRouter
    reporter: ReplicaReporter
    rules: SupervisionRules
    any_was_healthy: Callable[[], bool]
    changed: Callable[[ReplicaKeeper], None]


class ReplicaKeeper:
    """See the module.

    workers    the workers that this replica is for the router
    operation  the restart or removal that runs now; its result says what went wrong, or is ""
    ending     `end` was called: no further process will be started
    task       done when the replica has ended for good
    """

    def __init__(
        self, context: SupervisionContext, replica: EngineReplica, command: EngineCommand, workers: Sequence[Worker]
    ) -> None:
        self.replica = replica
        self.command = command
        self.workers = tuple(workers)
        self.ending = False
        self.operation: asyncio.Task[str] | None = None
        self._context = context
        self._router = context.router
        self._timeouts = context.rules.timeouts
        self._restarts = RestartHistory(context.rules.restarts)
        self._wakeup = asyncio.Event()
        self._restart_wanted = False
        self._kill_now = False
        self._waiters: list[asyncio.Future[bool]] = []
        # of the current process
        self._process: EngineProcess | None = None
        self._running = False  # false as soon as the end of the process is known
        self._was_healthy = False  # it was healthy at least once
        self._stranger = ""  # who has its port, see `impostor`
        self._unhealthy_since: float | None = None
        self._served_then = 0  # requests processed when it became unhealthy
        self.task = self._router.loop.create_task(self.run())

    # -- orders and events -------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Make the task check whether there is something to do."""
        self._wakeup.set()

    def restart(self) -> None:
        """Replace the process soon: without a pause, and without regard to the number of restarts."""
        self._restart_wanted = True
        self._restarts.forget()
        self._set(ReplicaState.RESTARTING, "a restart was requested")
        self.wake()

    def end(self, *, urgent: bool = False) -> None:
        """End the replica for good; `task` is done when it has ended. `urgent`: without a grace period."""
        if not self.ending:
            self.ending = True
            self._set(ReplicaState.STOPPING)
        if urgent:
            self._kill_now = True
            if self._process is not None:
                self._process.kill()
        self.wake()

    async def settled(self) -> bool:
        """Wait until the replica is healthy (True), or its process ended before it became healthy (False)."""
        if self.replica.state in (ReplicaState.HEALTHY, ReplicaState.FAILED, ReplicaState.STOPPED):
            return self.replica.state is ReplicaState.HEALTHY
        waiter = self._router.loop.create_future()
        self._waiters.append(waiter)
        return bool(await waiter)

    def health_changed(self) -> None:
        """Handle a change of the health of one of the workers."""
        healths = {worker.health for worker in self.workers}
        if Health.HEALTHY in healths:
            if self._running:
                self._became_healthy()
            else:
                # The check was answered by a process that has ended since: mark the worker lost again. Not in this
                # call, because other listeners still receive the current event.
                self._router.loop.call_soon(self._mark_lost_again)
        elif Health.UNHEALTHY in healths and self._unhealthy_since is None:
            self._unhealthy_since = self._router.clock()
            self._served_then = self._processed
        self.wake()

    async def impostor(self) -> str:
        """Return who answers in place of the engine, as the error of a health check; "" if it is the engine.

        A process whose port another program has is ended: it could not listen there. Two looks must find one, for
        programs that look for a free port listen there for a moment.
        """
        process = self._process
        if process is None:
            return _NOT_RUNNING
        look = self._router.loop.run_in_executor
        there = partial(stranger_at, self.command.url, process.warden_pid)
        stranger = await look(None, there) and await look(None, there)
        if process is not self._process or not self._running:
            return _NOT_RUNNING
        if stranger:
            self._stranger = stranger
            self.wake()
        return stranger

    @property
    def load(self) -> int:
        """Requests in flight at this replica."""
        return sum(worker.own_load for worker in self.workers)

    # -- processes ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run one process after the other until `end` is called."""
        try:
            while not self.ending:
                why = await self._run_process()
                if not self.ending:
                    await self._pause(why)
        except Exception as exc:  # after any bug here, the engine must not keep running without supervision
            log.exception("the supervision of rank %d failed", self.replica.rank)
            if self._process is not None:
                await self._process.stop(0.0)
            self._give_up(f"its supervision failed: {exc.__class__.__name__}")
            return
        self._set(ReplicaState.STOPPED)

    async def _run_process(self) -> str:
        """Start a process and watch it until it has ended. Return why it ended; "" if by an order."""
        replica = self.replica
        self._begin()
        try:
            self._process = process = await EngineProcess.start(self._router.loop, self.command, self._on_line)
        except OSError as exc:
            return f"cannot be started: {exc.strerror}"
        replica.pid = process.pid
        self._running = True
        process.exited.add_done_callback(lambda _: self.wake())
        self._start_checks()
        why = await self._watch(process)
        if why:
            replica.pid = 0
            self._mark_lost()
            if not process.exited.done():
                process.kill()
        replica.exit = await process.stop(0.0 if self._kill_now else self._timeouts.stop)
        replica.pid = 0
        self._process = None
        if not why and not self.ending:
            self._mark_lost()
        return why

    def _begin(self) -> None:
        replica = self.replica
        self._was_healthy = False
        self._stranger = ""
        self._unhealthy_since = None
        self._restart_wanted = False
        replica.tail.clear()
        replica.started_at = self._router.clock()
        for worker in self.workers:
            if worker.health is Health.DOWN:
                self._router.fleet.lost(worker, replica.started_at)
        self._set(ReplicaState.STARTING)

    def _start_checks(self) -> None:
        """Start the health checks of the new process. Without health checks, its workers are healthy at once."""
        for worker in self.workers:
            self._router.checks.start(worker)
            self._router.checks.check_now(worker)
            if not worker.spec.health.enabled:
                self._router.fleet.probed(worker, None, self._router.clock())
        self.health_changed()

    async def _watch(self, process: EngineProcess) -> str:
        """Wait until the process has ended or must be ended. Return why; "" if by an order."""
        while True:
            self._wakeup.clear()
            if self._must_stop:
                return ""
            if process.exited.done():
                return _describe_exit(process.exited.result())
            if self._stranger:
                return self._stranger
            deadline, why = self._deadline()
            left = deadline - self._router.clock()
            if left <= 0:
                return why
            await self._wait(left)

    def _deadline(self) -> tuple[float, str]:
        """Return when to end the current process if nothing changes, and the reason to give then."""
        timeouts = self._timeouts
        if not self._was_healthy:
            return self.replica.started_at + timeouts.startup, f"not healthy within {timeouts.startup:g} s"
        if self._unhealthy_since is None:
            return math.inf, ""
        if self._served_then != self._processed:  # it still answers requests: busy, not hung
            self._served_then = self._processed
            self._unhealthy_since = self._router.clock()
        reason = f"hung: it failed its health checks and answered no request for {timeouts.hang:g} s"
        return self._unhealthy_since + timeouts.hang, reason

    async def _pause(self, why: str) -> None:
        """Wait between two processes: for the pause, or until there is a reason to try again."""
        context = self._context
        if not context.any_was_healthy() and not self._must_stop:
            self._give_up(why)
            while not (context.any_was_healthy() or self._must_stop):
                self._wakeup.clear()
                await self._wakeup.wait()
        if not self._must_stop:
            await self._sleep_until(self._next_start(why))
        self.replica.restarts += not self.ending

    def _next_start(self, why: str) -> float:
        """Return when to start the next process; infinity if there were too many restarts."""
        now = self._router.clock()
        pause = self._restarts.pause(now)
        if pause is None:
            rules = self._context.rules.restarts
            self._give_up(f"left down after {counted(rules.most, 'restart')} within {rules.window:g} s: {why}")
            return math.inf
        self.replica.next_start = now + pause
        self._set(ReplicaState.RESTARTING, why)
        return now + pause

    async def _sleep_until(self, moment: float) -> None:
        """Wait until then, or until an order comes."""
        while not self._must_stop and (left := moment - self._router.clock()) > 0:
            self._wakeup.clear()
            await self._wait(left)

    async def _wait(self, seconds: float) -> None:
        """Wait to be woken, but not longer than that."""
        timer = self._router.loop.call_later(seconds, self._wakeup.set) if seconds < math.inf else None
        await self._wakeup.wait()
        if timer is not None:
            timer.cancel()

    # -- state -------------------------------------------------------------------------------------------------------

    def _set(self, state: ReplicaState, reason: str = "") -> None:
        replica = self.replica
        replica.state = state
        replica.reason = reason
        replica.since = self._router.clock()
        if state not in (ReplicaState.STARTING, ReplicaState.LOADING):
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():  # done if the caller was cancelled
                    waiter.set_result(state is ReplicaState.HEALTHY)
        self._context.changed(self)

    def _on_line(self, text: str) -> None:
        self.replica.tail.append(text)
        if self.replica.state is ReplicaState.STARTING:
            self._set(ReplicaState.LOADING)
        self._context.reporter.line(self.replica, text)

    def _became_healthy(self) -> None:
        self._unhealthy_since = None
        if not self._was_healthy and not self._must_stop:
            self._was_healthy = True
            self._set(ReplicaState.HEALTHY)

    def _mark_lost(self) -> None:
        self._running = False
        for worker in self.workers:
            if worker.health is not Health.DOWN:
                self._router.fleet.lost(worker, self._router.clock())

    def _mark_lost_again(self) -> None:
        if not (self._running or self.ending):
            self._mark_lost()

    def _give_up(self, why: str) -> None:
        for worker in self.workers:
            self._router.fleet.down(worker, why)
            self._router.checks.stop(worker)
        self._set(ReplicaState.FAILED, why)

    @property
    def _must_stop(self) -> bool:
        """Whether an order ends the current process."""
        return self.ending or self._restart_wanted

    @property
    def _processed(self) -> int:
        return sum(worker.processed for worker in self.workers)


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # real-time signals have numbers but no names
        return f"killed by signal {-status}"
