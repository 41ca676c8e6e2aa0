"""The supervisor: all replicas that this launcher runs, and the operations on them.

    start(n)                 start ranks 0 to n-1: register each with the fleet at once, and give it a `ReplicaKeeper`
    restart_worker, restart  drain --> new process --> healthy --> gets requests again
    restart_all              the same for one replica after the other; stop at the first that does not become healthy
    add_one, remove          scaling: add the lowest free rank; drain, deregister and end a replica
    stop                     end all replicas, at any time, and leave no process

It runs on the router's own event loop and learns about health from the fleet's events, so that it and the fleet never
see each other's state half-changed. Each operation is a task of its own, so that its caller may be cancelled. A replica
has at most one operation at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from sglang_router.errors import ConfigError, Conflict
from sglang_router.launch.keeper import ReplicaKeeper, SupervisedRouter, SupervisionContext, SupervisionRules
from sglang_router.launch.replica import EngineCommand, EngineReplica, ReplicaReporter, ReplicaState
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker

log = logging.getLogger("sglang_router.launch")

_DRAIN_POLL = 0.05
"""Seconds between two checks whether a draining replica still has requests: the fleet has no event for their end."""


class RollingRestart(msgspec.Struct):
    """The progress of a rolling restart. `state` is idle, running, done or stopped; `current` is a rank."""

    state: str = "idle"
    done: int = 0
    total: int = 0
    current: int | None = None
    reason: str = ""


class Supervisor(Listener):
    """See the module.

    command  rank -> how to start its replica; called once per rank, so that a rank keeps its port and GPUs. Raises:
             ConfigError if there is no port or GPU for it
    specs    the workers that a replica is for the router: one, or one for each of its data-parallel ranks
    failed   set when every replica has failed and none was ever healthy: the configuration must be wrong
    why_not  why the last `add_one` failed
    """

    def __init__(
        self,
        router: SupervisedRouter,
        command: Callable[[int], EngineCommand],
        specs: Callable[[EngineCommand], Sequence[WorkerSpec]],
        reporter: ReplicaReporter,
        rules: SupervisionRules | None = None,
    ) -> None:
        self.failed = asyncio.Event()
        self.why_not = ""
        self._router = router
        self._command = command
        self._specs = specs
        self._reporter = reporter
        self._rules = rules or SupervisionRules()
        self._keepers: dict[int, ReplicaKeeper] = {}  # by rank
        self._keeper_of: dict[Worker, ReplicaKeeper] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # running operations
        self._rolling = RollingRestart()
        self._any_was_healthy = False
        self._ending = False
        router.checks.impostor = self.impostor
        self._context = SupervisionContext(
            router=router,
            reporter=reporter,
            rules=self._rules,
            any_was_healthy=lambda: self._any_was_healthy,
            changed=self._changed,
        )

    # -- the replicas ------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[EngineReplica]:
        """All replicas, in order of rank."""
        return [self._keepers[rank].replica for rank in sorted(self._keepers)]

    def replica_of(self, worker: Worker) -> EngineReplica | None:
        """Return the replica behind a worker; None if this launcher does not run it."""
        keeper = self._keeper_of.get(worker)
        return keeper.replica if keeper is not None else None

    async def impostor(self, worker: Worker) -> str:
        """Return who answers a worker's health check in place of its engine, in words; "" if nobody does."""
        keeper = self._keeper_of.get(worker)
        return await keeper.impostor() if keeper is not None else ""

    def describe(self, worker: Worker) -> dict[str, Any] | None:
        """Return what GET /workers shows about a worker's process; None if this launcher does not run it.

        Times are in seconds.
        """
        replica = self.replica_of(worker)
        if replica is None:
            return None
        now = self._router.clock()
        waiting = replica.state is ReplicaState.RESTARTING and replica.next_start > now
        return {
            "rank": replica.rank,
            "state": replica.state.value,
            "pid": replica.pid or None,
            "restarts": replica.restarts,
            "reason": replica.reason,
            "in_state_secs": round(now - replica.since, 1),
            "next_start_secs": round(replica.next_start - now, 1) if waiting else None,
            "last_exit": replica.exit,
        }

    def replica_metrics(self) -> list[tuple[str, int, bool]]:
        """Return for metrics, for each replica: URL, number of restarts, and whether it is healthy."""
        return [
            (keeper.workers[0].spec.url, keeper.replica.restarts, keeper.replica.state is ReplicaState.HEALTHY)
            for keeper in self._keepers.values()
        ]

    # -- start and stop ----------------------------------------------------------------------------------------------

    async def start(self, count: int) -> None:
        """Start `count` replicas. Returns at once, before they are healthy.

        Raises: ConfigError, before any is started, if there is no port or GPU for one of them.
        """
        commands = [self._command(rank) for rank in range(count)]
        for rank, command in enumerate(commands):
            self._add(rank, command)

    async def stop(self, urgent: asyncio.Event) -> None:
        """End all replicas: SIGTERM, then SIGKILL after the grace period or when `urgent` is set.

        It may be called at any time, and more than once. When it returns, no process is left, and none will be started.
        """
        self._ending = True
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.end(urgent=urgent.is_set())
        operations = list(self._tasks)
        for operation in operations:
            operation.cancel()
        killer = self._router.loop.create_task(_end_when_urgent(keepers, urgent))
        for task in (*operations, *(keeper.task for keeper in keepers)):
            await asyncio.wait({task})
        killer.cancel()
        await asyncio.gather(killer, return_exceptions=True)

    def _add(self, rank: int, command: EngineCommand) -> ReplicaKeeper:
        now = self._router.clock()
        replica = EngineReplica(rank, now)
        workers: list[Worker] = []
        try:
            for spec in self._specs(command):
                labelled: WorkerSpec = msgspec.structs.replace(spec, labels={"rank": str(rank), **spec.labels})
                workers.append(self._router.fleet.add(labelled, now))
        except Conflict as exc:
            for worker in workers:
                self._router.fleet.remove(worker)
            raise ConfigError(f"replica {rank} cannot be a worker: {exc}") from exc
        replica.worker = workers[0]
        keeper = self._keepers[rank] = ReplicaKeeper(self._context, replica, command, workers)
        self._keeper_of.update(dict.fromkeys(workers, keeper))
        return keeper

    # -- events ------------------------------------------------------------------------------------------------------

    def worker_changed(self, event: WorkerChanged) -> None:
        keeper = self._keeper_of.get(event.worker)
        if keeper is None:
            return
        if event.what == "health":
            keeper.health_changed()
        elif event.what == "removed" and not keeper.ending and all(worker.removed for worker in keeper.workers):
            self._deregistered(keeper)

    def _changed(self, keeper: ReplicaKeeper) -> None:
        """Handle a change of a replica's state."""
        if keeper.replica.state is ReplicaState.HEALTHY and not self._any_was_healthy:
            self._any_was_healthy = True
            for each in self._keepers.values():
                each.wake()  # replicas that had given up try again: the configuration works
        self._reporter.changed(keeper.replica)
        if not self._any_was_healthy and all(
            each.replica.state is ReplicaState.FAILED for each in self._keepers.values()
        ):
            self.failed.set()

    # -- restarts ----------------------------------------------------------------------------------------------------

    def restart_worker(self, worker: Worker) -> None:
        """Begin to drain and restart a worker's replica.

        Raises: Conflict if a restart or removal of it is in progress, or this launcher does not run the worker.
        """
        keeper = self._keeper_of.get(worker)
        if keeper is None:
            raise Conflict(f"Worker {worker.url} is not run by this launcher. Restart it where it runs.")
        self._begin_restart(keeper)

    async def restart(self, replica: EngineReplica, wait_drain: bool = True) -> str:
        """Drain and restart a replica, and wait until it is healthy. Return "", or why it did not become healthy.

        Raises: Conflict if a restart or removal of it is in progress.
        """
        return await asyncio.shield(self._begin_restart(self._keeper(replica), wait_drain))

    def restart_all(self) -> None:
        """Begin to restart all replicas, one after the other; those that have failed come last.

        Raises: Conflict if a rolling restart is in progress.
        """
        if self._rolling.state == "running":
            raise Conflict("A rolling restart is in progress already. GET /restart_workers shows its progress.")
        self._check_not_ending()
        keepers = [self._keepers[rank] for rank in sorted(self._keepers)]
        keepers.sort(key=lambda keeper: keeper.replica.state is ReplicaState.FAILED)
        self._rolling = RollingRestart("running", total=len(keepers))
        self._spawn(self._restart_in_turn(self._rolling, keepers))

    @property
    def rolling(self) -> dict[str, Any]:
        """The progress of the last rolling restart."""
        return msgspec.structs.asdict(self._rolling)

    def _begin_restart(self, keeper: ReplicaKeeper, wait_drain: bool = True) -> asyncio.Task[str]:
        return self._begin_operation(keeper, self._restart(keeper, wait_drain))

    async def _restart(self, keeper: ReplicaKeeper, wait_drain: bool) -> str:
        drained_before = [worker.draining for worker in keeper.workers]
        restarts = keeper.replica.restarts
        for worker in keeper.workers:
            self._router.fleet.set_draining(worker, True, returning=True)
        try:
            if wait_drain:
                await self._wait_drained(keeper)
            if keeper.replica.restarts == restarts:  # otherwise the process died meanwhile and was replaced already
                keeper.restart()
            healthy = await keeper.settled()
        finally:
            for worker, before in zip(keeper.workers, drained_before, strict=True):
                if not worker.removed:
                    self._router.fleet.set_draining(worker, before)
        replica = keeper.replica
        reason = replica.reason or replica.state.value
        return "" if healthy else f"rank {replica.rank} did not become healthy: {reason}"

    async def _restart_in_turn(self, rolling: RollingRestart, keepers: Sequence[ReplicaKeeper]) -> None:
        why = "interrupted"
        try:
            for keeper in keepers:
                rolling.current = keeper.replica.rank
                if why := await self._restart_next(keeper):
                    return
                rolling.done += 1
            why = ""
        except asyncio.CancelledError:
            why = "the launcher is shutting down"
            raise
        finally:
            rolling.current = None
            rolling.state = "stopped" if why else "done"
            rolling.reason = why

    async def _restart_next(self, keeper: ReplicaKeeper) -> str:
        """Restart one replica. Return why the rolling restart must stop, or ""."""
        if keeper.ending:
            return ""
        others = [each for each in self._keepers.values() if each is not keeper]
        if others and _is_serving(keeper) and not any(_is_serving(each) for each in others):
            return f"rank {keeper.replica.rank} is the only healthy replica: restart it alone if you want to"
        task = keeper.operation or self._begin_restart(keeper)
        await asyncio.wait({task})
        return "" if task.cancelled() else task.result()  # cancelled if its worker was deregistered meanwhile

    # -- scaling -----------------------------------------------------------------------------------------------------

    def add_one(self) -> EngineReplica | None:
        """Start one more replica, at the lowest free rank. Return None if that fails; `why_not` says why."""
        rank = next(rank for rank in itertools.count() if rank not in self._keepers)
        try:
            self._check_not_ending()
            keeper = self._add(rank, self._command(rank))
        except (ConfigError, Conflict) as exc:
            self.why_not = str(exc)
            return None
        return keeper.replica

    async def remove(self, replica: EngineReplica) -> None:
        """Drain, deregister and end a replica. Its rank is free afterwards.

        Raises: Conflict if a restart or removal of it is in progress.
        """
        keeper = self._keeper(replica)
        await asyncio.shield(self._begin_operation(keeper, self._remove(keeper)))

    async def _remove(self, keeper: ReplicaKeeper) -> str:
        for worker in keeper.workers:
            if not worker.removed:
                self._router.fleet.set_draining(worker, True)
        await self._wait_drained(keeper)
        keeper.end()
        for worker in keeper.workers:
            self._router.fleet.remove(worker)
        await asyncio.wait({keeper.task})
        for worker in keeper.workers:
            del self._keeper_of[worker]
        del self._keepers[keeper.replica.rank]
        return ""

    def _deregistered(self, keeper: ReplicaKeeper) -> None:
        """Remove a replica whose workers were deregistered: it would get no more requests."""
        if keeper.operation is not None:
            keeper.operation.cancel()
            keeper.operation = None
        if not self._ending:
            self._begin_operation(keeper, self._remove(keeper))

    # -- operations --------------------------------------------------------------------------------------------------

    def _begin_operation(self, keeper: ReplicaKeeper, work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
        """Run `work` on a replica as its operation. Raises: Conflict if it has one already."""
        try:
            self._check_not_ending()
            if keeper.operation is not None or keeper.ending:
                raise Conflict(f"A restart or removal of rank {keeper.replica.rank} is in progress already.")
        except Conflict:
            work.close()
            raise
        keeper.operation = task = self._spawn(work)

        def ended(_: asyncio.Task[str]) -> None:
            if keeper.operation is task:
                keeper.operation = None

        task.add_done_callback(ended)
        return task

    def _keeper(self, replica: EngineReplica) -> ReplicaKeeper:
        keeper = self._keepers.get(replica.rank)
        if keeper is None or keeper.replica is not replica:
            raise Conflict(f"The replica of rank {replica.rank} was removed.")
        return keeper

    def _check_not_ending(self) -> None:
        if self._ending:
            raise Conflict("The launcher is shutting down.")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._router.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._operation_ended)
        return task

    def _operation_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a restart or removal of a replica failed", exc_info=error)

    async def _wait_drained(self, keeper: ReplicaKeeper) -> None:
        """Wait until the replica has no requests in flight, at most for the drain timeout."""
        until = self._router.clock() + self._rules.timeouts.drain
        while keeper.load and self._router.clock() < until:  # noqa: ASYNC110  (see _DRAIN_POLL)
            await asyncio.sleep(_DRAIN_POLL)


async def _end_when_urgent(keepers: Sequence[ReplicaKeeper], urgent: asyncio.Event) -> None:
    """Kill all replicas once `urgent` is set."""
    await urgent.wait()
    for keeper in keepers:
        keeper.end(urgent=True)


def _is_serving(keeper: ReplicaKeeper) -> bool:
    return any(worker.in_rotation and worker.health is Health.HEALTHY for worker in keeper.workers)
