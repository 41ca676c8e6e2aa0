"""The supervisor: all replicas that this launcher runs, and what is done with them by order.

    start(n)                 ranks 0 to n-1, each registered with the fleet at once and watched by its `Keeper`
    restart_worker, restart  drain --> another process --> healthy --> requests again
    restart_all              the same for one after the other; stops at the first that does not come back
    add_one, remove          scaling: the lowest free rank; drain, deregister, end
    stop                     ends all, at any moment, and leaves nothing

It runs on the router's own event loop: it hears of health through the fleet's events, and everything here happens
between two turns of that loop. Orders are tasks of their own, so that who asked may leave; one at a time for a replica.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_router.core.events import Listener, WorkerChanged
from sglang_router.core.worker import Health
from sglang_router.errors import ConfigError, Conflict
from sglang_router.launch.keeper import Keeper, Surroundings, Timeouts
from sglang_router.launch.replica import Command, Replica, State
from sglang_router.launch.restarts import RestartRules

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from sglang_router.core.fleet import Fleet
    from sglang_router.core.worker import Worker, WorkerSpec
    from sglang_router.launch.replica import Reporter
    from sglang_router.net.probe import Prober

log = logging.getLogger("sglang_router.launch")

_LOOK = 0.05
"""Seconds between two looks whether a draining replica still has requests: the end of one is no event of the fleet."""


class Rolling(msgspec.Struct):
    """How far a rolling restart is. `state` is idle, running, done or stopped; `current` is a rank."""

    state: str = "idle"
    done: int = 0
    total: int = 0
    current: int | None = None
    reason: str = ""


class Supervisor(Listener):
    """See the module.

    command  how the replica of a rank is started; asked once, so a rank keeps its port and GPUs. Raises: ConfigError,
             when there is no port or GPU for it
    specs    what a replica is to the router: one worker, or one for each of its data-parallel ranks
    failed   set when every replica failed and none was ever healthy: the mistake is in the configuration
    why_not  why `add_one` could not
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        fleet: Fleet,
        prober: Prober,
        command: Callable[[int], Command],
        specs: Callable[[Command], Sequence[WorkerSpec]],
        reporter: Reporter,
        rules: RestartRules | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.failed = asyncio.Event()
        self.why_not = ""
        self._loop = loop
        self._clock = clock
        self._fleet = fleet
        self._command = command
        self._specs = specs
        self._reporter = reporter
        self._timeouts = timeouts or Timeouts()
        self._keepers: dict[int, Keeper] = {}  # by rank
        self._of: dict[Worker, Keeper] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # orders under way
        self._rolling = Rolling()
        self._proven = False
        self._ending = False
        self._around = Surroundings(
            loop=loop,
            clock=clock,
            fleet=fleet,
            prober=prober,
            reporter=reporter,
            rules=rules or RestartRules(),
            timeouts=self._timeouts,
            proven=lambda: self._proven,
            changed=self._changed,
        )

    # -- who there is ------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[Replica]:
        """All there are, by rank."""
        return [self._keepers[rank].replica for rank in sorted(self._keepers)]

    def replica_of(self, worker: Worker) -> Replica | None:
        """The replica behind a worker; None when it is run by somebody else."""
        keeper = self._of.get(worker)
        return keeper.replica if keeper is not None else None

    def describe(self, worker: Worker) -> dict[str, Any] | None:
        """What GET /workers shows of a worker's process; None when it is run by somebody else. Times in seconds."""
        replica = self.replica_of(worker)
        if replica is None:
            return None
        now = self._clock()
        waiting = replica.state is State.RESTARTING and replica.next_start > now
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

    def tell(self) -> list[tuple[str, int, bool]]:
        """For metrics: URL, restarts and whether it is up, of each replica."""
        return [
            (keeper.workers[0].spec.url, keeper.replica.restarts, keeper.replica.state is State.HEALTHY)
            for keeper in self._keepers.values()
        ]

    # -- start and stop ----------------------------------------------------------------------------------------------

    async def start(self, count: int) -> None:
        """Starts that many replicas. Returns at once; they are healthy when they are.

        Raises: ConfigError, before anything was started, when there is no port or GPU for one of them.
        """
        commands = [self._command(rank) for rank in range(count)]
        for rank, command in enumerate(commands):
            self._add(rank, command)

    async def stop(self, urgent: asyncio.Event) -> None:
        """Ends all replicas: SIGTERM, and SIGKILL after the grace period or when `urgent` is set.

        May be called at any moment, and more than once. When it returns, nothing is left and nothing starts any more.
        """
        self._ending = True
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.end(urgent=urgent.is_set())
        orders = list(self._tasks)
        for order in orders:
            order.cancel()
        hurry = self._loop.create_task(_hurry(keepers, urgent))
        for task in (*orders, *(keeper.task for keeper in keepers)):
            await asyncio.wait({task})
        hurry.cancel()
        await asyncio.gather(hurry, return_exceptions=True)

    def _add(self, rank: int, command: Command) -> Keeper:
        now = self._clock()
        replica = Replica(rank, now)
        workers: list[Worker] = []
        try:
            for spec in self._specs(command):
                labelled: WorkerSpec = msgspec.structs.replace(spec, labels={"rank": str(rank), **spec.labels})
                workers.append(self._fleet.add(labelled, now))
        except Conflict as exc:
            for worker in workers:
                self._fleet.remove(worker)
            raise ConfigError(f"replica {rank} cannot be a worker: {exc}") from exc
        replica.worker = workers[0]
        keeper = self._keepers[rank] = Keeper(self._around, replica, command, workers)
        self._of.update(dict.fromkeys(workers, keeper))
        return keeper

    # -- what is heard -----------------------------------------------------------------------------------------------

    def worker_changed(self, event: WorkerChanged) -> None:
        keeper = self._of.get(event.worker)
        if keeper is None:
            return
        if event.what == "health":
            keeper.health_changed()
        elif event.what == "removed" and not keeper.ending and all(worker.removed for worker in keeper.workers):
            self._dismissed(keeper)

    def _changed(self, keeper: Keeper) -> None:
        """A replica is in another state."""
        if keeper.replica.state is State.HEALTHY and not self._proven:
            self._proven = True
            for each in self._keepers.values():
                each.wake()
        self._reporter.changed(keeper.replica)
        if not self._proven and all(each.replica.state is State.FAILED for each in self._keepers.values()):
            self.failed.set()

    # -- restarts ----------------------------------------------------------------------------------------------------

    def restart_worker(self, worker: Worker) -> None:
        """Begins to drain and restart a worker's replica.

        Raises: Conflict when that is under way already, or the worker is run by somebody else.
        """
        keeper = self._of.get(worker)
        if keeper is None:
            raise Conflict(f"Worker {worker.url} is not run by this launcher: restart it where it runs.")
        self._begin_restart(keeper)

    async def restart(self, replica: Replica, wait_drain: bool = True) -> str:
        """Drains a replica, starts it anew and waits until it is healthy. Returns why it is not, or "".

        Raises: Conflict when a restart of it is under way already.
        """
        return await asyncio.shield(self._begin_restart(self._keeper(replica), wait_drain))

    def restart_all(self) -> None:
        """Begins to restart all replicas, one after the other; those that failed come last.

        Raises: Conflict when that is under way already.
        """
        if self._rolling.state == "running":
            raise Conflict("A rolling restart is under way: GET /restart_workers shows how far it is.")
        self._refuse_when_ending()
        keepers = [self._keepers[rank] for rank in sorted(self._keepers)]
        keepers.sort(key=lambda keeper: keeper.replica.state is State.FAILED)
        self._rolling = Rolling("running", total=len(keepers))
        self._spawn(self._roll(self._rolling, keepers))

    @property
    def rolling(self) -> dict[str, Any]:
        """How far the last rolling restart is."""
        return msgspec.structs.asdict(self._rolling)

    def _begin_restart(self, keeper: Keeper, wait_drain: bool = True) -> asyncio.Task[str]:
        return self._order(keeper, self._restart(keeper, wait_drain))

    async def _restart(self, keeper: Keeper, wait_drain: bool) -> str:
        drained_before = [worker.draining for worker in keeper.workers]
        restarts = keeper.replica.restarts
        for worker in keeper.workers:
            self._fleet.set_draining(worker, True, returning=True)
        try:
            if wait_drain:
                await self._drained(keeper)
            if keeper.replica.restarts == restarts:  # else it died meanwhile, and is another process already
                keeper.renew()
            well = await keeper.verdict()
        finally:
            for worker, before in zip(keeper.workers, drained_before, strict=True):
                if not worker.removed:
                    self._fleet.set_draining(worker, before)
        replica = keeper.replica
        return "" if well else f"rank {replica.rank} did not come back: {replica.reason or replica.state.value}"

    async def _roll(self, rolling: Rolling, keepers: Sequence[Keeper]) -> None:
        why = "interrupted"
        try:
            for keeper in keepers:
                rolling.current = keeper.replica.rank
                if why := await self._roll_one(keeper):
                    return
                rolling.done += 1
            why = ""
        except asyncio.CancelledError:
            why = "the launcher is ending"
            raise
        finally:
            rolling.current = None
            rolling.state = "stopped" if why else "done"
            rolling.reason = why

    async def _roll_one(self, keeper: Keeper) -> str:
        """Why the rolling restart must not go on, or ""."""
        if keeper.ending:
            return ""
        others = [each for each in self._keepers.values() if each is not keeper]
        if others and _serves(keeper) and not any(_serves(each) for each in others):
            return f"rank {keeper.replica.rank} is the only one that serves: restart it alone if that is meant"
        task = keeper.busy or self._begin_restart(keeper)
        await asyncio.wait({task})
        return "" if task.cancelled() else task.result()  # cancelled: it was deregistered meanwhile

    # -- scaling -----------------------------------------------------------------------------------------------------

    def add_one(self) -> Replica | None:
        """Starts one more replica, at the lowest free rank. None when that cannot be; `why_not` says why."""
        rank = next(rank for rank in itertools.count() if rank not in self._keepers)
        try:
            self._refuse_when_ending()
            keeper = self._add(rank, self._command(rank))
        except (ConfigError, Conflict) as exc:
            self.why_not = str(exc)
            return None
        return keeper.replica

    async def remove(self, replica: Replica) -> None:
        """Takes a replica out: drains it, deregisters it, ends it. Its rank is free then.

        Raises: Conflict when it is being restarted or removed.
        """
        keeper = self._keeper(replica)
        await asyncio.shield(self._order(keeper, self._remove(keeper)))

    async def _remove(self, keeper: Keeper) -> str:
        for worker in keeper.workers:
            if not worker.removed:
                self._fleet.set_draining(worker, True)
        await self._drained(keeper)
        keeper.end()
        for worker in keeper.workers:
            self._fleet.remove(worker)
        await asyncio.wait({keeper.task})
        for worker in keeper.workers:
            del self._of[worker]
        del self._keepers[keeper.replica.rank]
        return ""

    def _dismissed(self, keeper: Keeper) -> None:
        """Somebody deregistered its workers: nobody would ever use it again."""
        if keeper.busy is not None:
            keeper.busy.cancel()
            keeper.busy = None
        if not self._ending:
            self._order(keeper, self._remove(keeper))

    # -- orders ------------------------------------------------------------------------------------------------------

    def _order(self, keeper: Keeper, work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
        """Has something done with a replica, if nothing else is."""
        try:
            self._refuse_when_ending()
            if keeper.busy is not None or keeper.ending:
                raise Conflict(f"Rank {keeper.replica.rank} is being restarted or removed already.")
        except Conflict:
            work.close()
            raise
        keeper.busy = task = self._spawn(work)

        def over(_: asyncio.Task[str]) -> None:
            if keeper.busy is task:
                keeper.busy = None

        task.add_done_callback(over)
        return task

    def _keeper(self, replica: Replica) -> Keeper:
        keeper = self._keepers.get(replica.rank)
        if keeper is None or keeper.replica is not replica:
            raise Conflict(f"Rank {replica.rank} is not run any more.")
        return keeper

    def _refuse_when_ending(self) -> None:
        if self._ending:
            raise Conflict("The launcher is ending.")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an order to the supervisor failed", exc_info=error)

    async def _drained(self, keeper: Keeper) -> None:
        """Waits until no request runs there, or for as long as it is allowed to take."""
        until = self._clock() + self._timeouts.drain
        while keeper.load and self._clock() < until:  # noqa: ASYNC110  (the end of a request sets no event)
            await asyncio.sleep(_LOOK)


async def _hurry(keepers: Sequence[Keeper], urgent: asyncio.Event) -> None:
    await urgent.wait()
    for keeper in keepers:
        keeper.end(urgent=True)


def _serves(keeper: Keeper) -> bool:
    return any(worker.in_rotation and worker.health is Health.HEALTHY for worker in keeper.workers)
