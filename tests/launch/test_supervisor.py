"""The supervisor with real processes on a real event loop: the built-in engine, and a tiny engine for rare failures."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fleets import any_policy
from routers import free_port
from sglang_router.errors import ConfigError, Conflict
from sglang_router.launch.keeper import ReplicaTimeouts, SupervisedRouter, SupervisionRules
from sglang_router.launch.replica import EngineCommand, EngineReplica, ReplicaState
from sglang_router.launch.restarts import RestartRules
from sglang_router.launch.supervisor import Supervisor
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.events import Listener, Listeners, WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.health_checks import HealthChecks

WITHIN = 30.0
QUICK = RestartRules(initial_backoff=0.05, max_backoff=0.1, most=3, window=600.0)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's tables of sockets in /proc")
TINY = str(Path(__file__).with_name("tiny_engine.py"))


def builtin(port: int, *flags: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "sglang_router.engine", "--port", str(port), "--speed", "0", *flags)


def tiny(port: int, *flags: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", TINY, str(port), *flags)


def shell(script: str) -> Callable[[int], tuple[str, ...]]:
    return lambda port: ("sh", "-c", script)


class Story:
    """A reporter that records every report and wakes the test."""

    def __init__(self) -> None:
        self.states: list[tuple[int, ReplicaState]] = []
        self.lines: list[tuple[int, str]] = []
        self.news = asyncio.Event()

    def changed(self, replica: EngineReplica) -> None:
        self.states.append((replica.rank, replica.state))
        self.news.set()

    def line(self, replica: EngineReplica, text: str) -> None:
        self.lines.append((replica.rank, text))
        self.news.set()

    def of(self, rank: int) -> list[str]:
        """The states of one rank, in their order."""
        return [state.value for each, state in self.states if each == rank]


class Bench(Listener):
    """A fleet, health checks and the supervisor under test. `engine` says how a rank's engine is run on a port."""

    def __init__(self, engine: Callable[[int], tuple[str, ...]], **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        listeners = Listeners()
        self.changes: list[WorkerChanged] = []
        self.now_ahead = 0.0
        self.story = Story()
        self.engine = engine
        self.most = 8
        self.ranks: list[int | None] = [None]
        self.fleet = Fleet(listeners, lambda: "id", any_policy)
        self.pool = ConnectionPool(loop, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None)
        self.checks = HealthChecks(loop, self.fleet, self.pool, self.clock, unhealthy_interval=0.02)
        self.health = HealthRules(interval=0.05, timeout=0.5, failure_threshold=2, success_threshold=1)
        self._ports: dict[int, int] = {}
        rules = SupervisionRules(
            restarts=settings.pop("rules", QUICK),
            timeouts=ReplicaTimeouts(**{"stop": 10.0, "drain": 20.0, "hang": 20.0, "startup": 20.0, **settings}),
        )
        router = SupervisedRouter(loop=loop, clock=self.clock, fleet=self.fleet, checks=self.checks)
        self.supervisor = Supervisor(router, self.command, self.specs, self.story, rules)
        listeners.add(self)
        listeners.add(self.supervisor)

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.now_ahead

    def command(self, rank: int) -> EngineCommand:
        if rank >= self.most:
            raise ConfigError(f"no GPU for rank {rank}")
        port = self._ports.setdefault(rank, free_port())
        return EngineCommand(argv=self.engine(port), env={}, url=f"http://127.0.0.1:{port}", runtime="test")

    def specs(self, command: EngineCommand) -> list[WorkerSpec]:
        return [WorkerSpec(url=command.url, dp_rank=rank, health=self.health) for rank in self.ranks]

    def worker_changed(self, event: WorkerChanged) -> None:
        self.changes.append(event)
        if event.what == "added":
            self.pool.know(event.worker.target)
            self.checks.start(event.worker)
        self.story.news.set()

    # -- what tests ask for ------------------------------------------------------------------------------------------

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait until a condition holds; it is checked after each event, line and change of state."""
        while not holds():
            self.story.news.clear()
            await self.story.news.wait()

    async def soon(self, holds: Callable[[], object]) -> None:
        """Wait for a condition without an event; it is checked in each turn of the loop."""
        while not holds():  # noqa: ASYNC110  (there is no event)
            await asyncio.sleep(0)

    async def healthy(self, *ranks: int) -> None:
        await self.until(lambda: all(self.replica(rank).state is ReplicaState.HEALTHY for rank in ranks))

    async def start(self, count: int) -> list[EngineReplica]:
        """Start replicas and wait until they are healthy."""
        await self.supervisor.start(count)
        await self.healthy(*range(count))
        return self.supervisor.replicas

    def replica(self, rank: int) -> EngineReplica:
        return next(replica for replica in self.supervisor.replicas if replica.rank == rank)

    def worker(self, rank: int) -> Worker:
        worker = self.replica(rank).worker
        assert worker is not None
        return worker

    async def close(self) -> None:
        urgent = asyncio.Event()
        urgent.set()
        await self.supervisor.stop(urgent)
        assert not [replica.pid for replica in self.supervisor.replicas if replica.pid]
        await self.checks.close()
        await self.pool.close()


def run(
    scene: Callable[[Bench], Awaitable[None]], engine: Callable[[int], tuple[str, ...]] = tiny, **settings: Any
) -> None:
    """Run a test's coroutine on its own event loop; afterwards no process may be left."""

    async def play() -> None:
        bench = Bench(engine, **settings)
        try:
            await asyncio.wait_for(scene(bench), WITHIN)
        finally:
            await bench.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    with contextlib.closing(uvloop.new_event_loop()) as loop:
        loop.run_until_complete(play())


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- start, death, return ----------------------------------------------------------------------------------------------


def test_built_in_engines_come_up_die_and_come_back_at_the_same_rank() -> None:
    async def scene(at: Bench) -> None:
        first, second = await at.start(2)
        worker, pid = at.worker(1), second.pid
        assert at.story.of(1) == ["starting", "loading", "healthy"]
        assert worker.spec.labels == {"rank": "1"}
        assert at.supervisor.replica_of(worker) is second
        os.kill(pid, signal.SIGKILL)
        await at.until(lambda: worker.health is Health.STARTING)
        assert at.fleet.candidates(at.clock()) == (first.worker,)
        await at.until(lambda: second.state is ReplicaState.RESTARTING)
        told = at.supervisor.describe(worker)
        assert told is not None
        assert (told["rank"], told["pid"], told["last_exit"]) == (1, None, -9)
        assert (told["state"], told["reason"]) == ("restarting", "killed by SIGKILL")
        assert told["next_start_secs"] is not None
        await at.healthy(1)
        assert second.pid not in (0, pid)
        assert (second.restarts, first.restarts) == (1, 0)
        assert at.fleet.candidates(at.clock()) == (first.worker, worker)
        assert [change.what for change in at.changes if change.worker is worker].count("restarted") == 1
        assert at.supervisor.describe(worker) == {
            "rank": 1,
            "state": "healthy",
            "pid": second.pid,
            "restarts": 1,
            "reason": "",
            "in_state_secs": pytest.approx(0, abs=WITHIN),
            "next_start_secs": None,
            "last_exit": -9,
        }

    run(scene, builtin)


def test_an_engine_with_ranks_inside_is_one_replica_with_several_workers() -> None:
    async def scene(at: Bench) -> None:
        at.ranks = [0, 1]
        (replica,) = await at.start(1)
        workers = list(at.fleet)
        assert [worker.dp_rank for worker in workers] == [0, 1]
        assert [at.supervisor.replica_of(worker) for worker in workers] == [replica] * 2
        leases = [at.fleet.lease(worker) for worker in workers]
        restart = asyncio.ensure_future(at.supervisor.restart(replica))
        await at.until(lambda: all(worker.draining for worker in workers))
        leases[0].close(Outcome.SERVED, at.clock())
        await asyncio.sleep(0)
        assert replica.state is ReplicaState.HEALTHY
        leases[1].close(Outcome.SERVED, at.clock())
        await at.until(lambda: all(worker.health is Health.STARTING for worker in workers))
        assert await restart == ""
        assert {worker.health for worker in workers} <= {Health.HEALTHY, Health.STARTING}
        assert not any(worker.draining for worker in workers)
        await at.supervisor.remove(replica)
        assert not len(at.fleet)

    run(scene)


def test_a_worker_run_by_others_is_none_of_its_affairs() -> None:
    async def scene(at: Bench) -> None:
        other = at.fleet.add(WorkerSpec(url="http://127.0.0.1:1", health=HealthRules(enabled=False)), at.clock())
        assert at.supervisor.describe(other) is None
        assert at.supervisor.replica_of(other) is None
        with pytest.raises(Conflict, match="not run by this launcher"):
            at.supervisor.restart_worker(other)
        at.fleet.remove(other)

    run(scene)


def test_a_start_without_room_for_all_starts_none() -> None:
    async def scene(at: Bench) -> None:
        at.most = 1
        with pytest.raises(ConfigError, match="no GPU for rank 1"):
            await at.supervisor.start(2)
        assert not at.supervisor.replicas
        assert not len(at.fleet)

    run(scene)


def test_a_url_that_is_a_worker_already_is_a_mistake() -> None:
    async def scene(at: Bench) -> None:
        other = at.fleet.add(WorkerSpec(url=at.command(0).url, health=HealthRules(enabled=False)), at.clock())
        with pytest.raises(ConfigError, match="already exists"):
            await at.supervisor.start(1)
        at.fleet.remove(other)

    run(scene)


def test_engines_that_nobody_checks_are_healthy_as_soon_as_they_run() -> None:
    async def scene(at: Bench) -> None:
        at.health = HealthRules(enabled=False)
        (replica,) = await at.start(1)
        os.kill(replica.pid, signal.SIGKILL)
        await at.until(lambda: replica.restarts == 1)
        await at.healthy(0)
        assert at.worker(0).health is Health.HEALTHY

    run(scene)


# -- failure -----------------------------------------------------------------------------------------------------------


def test_when_none_was_ever_healthy_a_failure_is_final() -> None:
    async def scene(at: Bench) -> None:
        await at.supervisor.start(2)
        await asyncio.wait_for(at.supervisor.failed.wait(), WITHIN)
        for rank in (0, 1):
            replica = at.replica(rank)
            assert (replica.state, replica.restarts, replica.exit) == (ReplicaState.FAILED, 0, 3)
            assert replica.reason == "exited with status 3"
            assert list(replica.tail) == [f"line {n}" for n in range(6, 26)]  # the last twenty
            assert at.worker(rank).health is Health.DOWN

    run(scene, shell("for n in $(seq 25); do echo line $n; done; exit 3"))


def test_a_command_that_cannot_be_run_fails_with_a_line() -> None:
    async def scene(at: Bench) -> None:
        await at.supervisor.start(1)
        await asyncio.wait_for(at.supervisor.failed.wait(), WITHIN)
        assert at.replica(0).last_line == "cannot run no-such-engine: No such file or directory"

    run(scene, lambda port: ("no-such-engine",))


def test_a_command_that_the_system_refuses_fails_with_a_reason() -> None:
    async def scene(at: Bench) -> None:
        await at.supervisor.start(1)
        await asyncio.wait_for(at.supervisor.failed.wait(), WITHIN)
        assert at.replica(0).reason == "cannot be started: Argument list too long"

    run(scene, lambda port: ("echo", *["x" * 100_000] * 100))


def test_not_healthy_in_time_is_a_failure() -> None:
    async def scene(at: Bench) -> None:
        await at.supervisor.start(1)
        await asyncio.wait_for(at.supervisor.failed.wait(), WITHIN)
        assert at.replica(0).reason == "not healthy within 0.2 s"
        assert at.replica(0).exit == -9

    run(scene, shell("echo loading; exec sleep 1000"), startup=0.2)


def test_who_failed_first_gets_its_restarts_once_another_is_healthy_and_is_then_left_down(tmp_path: Path) -> None:
    model = tmp_path / "model"

    async def scene(at: Bench) -> None:
        at.engine = lambda port: tiny(port, str(model))
        await at.supervisor.start(1)
        await at.until(lambda: at.replica(0).state is ReplicaState.FAILED)
        at.engine = tiny
        assert at.supervisor.add_one() is not None
        await at.healthy(1)
        bad, worker = at.replica(0), at.worker(0)
        await at.until(lambda: bad.state is ReplicaState.FAILED and bad.restarts == QUICK.most)
        assert bad.reason == "left down after 3 restarts within 600 s: exited with status 3"
        assert worker.health is Health.DOWN
        assert worker.last_error == bad.reason
        assert at.fleet.candidates(at.clock()) == (at.worker(1),)
        model.touch()  # the operator repairs it and requests a restart
        assert await at.supervisor.restart(bad) == ""
        assert (bad.state, bad.reason, worker.health) == (ReplicaState.HEALTHY, "", Health.HEALTHY)
        os.kill(bad.pid, signal.SIGKILL)
        await at.until(lambda: bad.state is ReplicaState.RESTARTING)  # its earlier failures are forgotten

    run(scene)


def test_a_hanging_engine_is_killed_and_started_anew() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        pid = replica.pid
        os.kill(pid, signal.SIGSTOP)
        await at.until(lambda: replica.state is ReplicaState.RESTARTING)
        assert replica.reason == "hung: it failed its health checks and answered no request for 0.1 s"
        assert not exists(pid)
        await at.healthy(0)

    run(scene, builtin, hang=0.1)


def test_who_serves_though_its_health_check_fails_is_busy_and_does_not_hang() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        worker = at.worker(0)
        os.kill(replica.pid, signal.SIGSTOP)
        await at.until(lambda: worker.health is Health.UNHEALTHY)
        at.fleet.lease(worker).close(Outcome.SERVED, at.clock())
        at.now_ahead += 61.0
        at.supervisor.worker_changed(WorkerChanged(worker, "health", "", ""))  # makes the keeper check
        for _ in range(10):
            await asyncio.sleep(0)
        assert worker.health is Health.UNHEALTHY  # a lost one would be STARTING by now
        at.now_ahead += 61.0  # without a request answered in that time
        at.supervisor.worker_changed(WorkerChanged(worker, "health", "", ""))
        await at.until(lambda: replica.state is ReplicaState.RESTARTING)
        assert replica.reason == "hung: it failed its health checks and answered no request for 60 s"

    run(scene, hang=60.0, startup=1000.0)


def test_the_last_answer_of_a_process_that_ended_does_not_make_it_healthy() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        worker = at.worker(0)
        os.kill(replica.pid, signal.SIGKILL)
        await at.until(lambda: replica.state is ReplicaState.RESTARTING)
        at.fleet.probed(worker, None, at.clock())
        await at.until(lambda: worker.health is Health.STARTING)
        assert replica.state is ReplicaState.RESTARTING

    run(scene, rules=RestartRules(initial_backoff=1000.0, max_backoff=1000.0))


# -- strangers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stranger(at: Bench, rank: int) -> Iterator[int]:
    """Run a server of somebody else on the port of a rank; return its process id. It answers every request with 200."""
    port = at.command(rank).url.rpartition(":")[2]
    with subprocess.Popen(tiny(int(port)), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"listening on {port}\n".encode()
            yield process.pid
        finally:
            process.kill()


def never_healthy(at: Bench, rank: int) -> bool:
    return not [change for change in at.changes if change.worker is at.worker(rank) and change.new == "healthy"]


@LINUX
def test_another_program_on_its_port_does_not_make_an_engine_healthy() -> None:
    async def scene(at: Bench) -> None:
        with stranger(at, 0) as pid:
            await at.supervisor.start(1)
            await asyncio.wait_for(at.supervisor.failed.wait(), WITHIN)
            address = at.command(0).url.removeprefix("http://")
            wanted = rf"another program listens on {address}: python\S* \(process {pid}\)"
            assert re.fullmatch(wanted, at.replica(0).reason)
            assert never_healthy(at, 0)
            assert exists(pid)

    run(scene, shell("exec sleep 1000"))


@LINUX
def test_another_program_on_its_port_hears_nothing_not_even_a_health_check_with_the_key() -> None:
    async def scene(at: Bench) -> None:
        heard = []

        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(await reader.read(1000))
            writer.close()

        host, _, port = at.command(0).url.removeprefix("http://").rpartition(":")
        async with await asyncio.start_server(hear, host, int(port)):
            await at.supervisor.start(1)
            await asyncio.wait_for(at.supervisor.failed.wait(), WITHIN)
        assert not heard
        assert "another program listens on " in at.replica(0).reason

    run(scene, shell("exec sleep 1000"))


@LINUX
def test_a_program_that_takes_the_port_while_an_engine_is_down_is_not_taken_for_it_and_may_go_again(
    tmp_path: Path,
) -> None:
    loading = tmp_path / "loading"

    async def scene(at: Bench) -> None:
        await at.start(2)
        replica = at.replica(0)
        os.kill(replica.pid, signal.SIGKILL)
        await at.until(lambda: replica.state is ReplicaState.RESTARTING)
        at.changes.clear()
        loading.touch()
        with stranger(at, 0):
            assert "another program listens on " in await at.supervisor.restart(replica, wait_drain=False)
            assert never_healthy(at, 0)
            assert at.fleet.candidates(at.clock()) == (at.worker(1),)
        loading.unlink()
        assert await at.supervisor.restart(replica) == ""

    script = 'while [ -e "$0" ]; do sleep 0.05; done; exec "$@"'
    rules = RestartRules(initial_backoff=1000.0, max_backoff=1000.0)
    run(scene, lambda port: ("sh", "-c", script, str(loading), *tiny(port)), rules=rules)


# -- requested restarts ------------------------------------------------------------------------------------------------


def test_a_restart_waits_for_running_requests_and_ends_the_draining() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        worker, pid = at.worker(0), replica.pid
        lease = at.fleet.lease(worker)
        restart = asyncio.ensure_future(at.supervisor.restart(replica))
        await at.until(lambda: worker.draining)
        assert worker.returning
        with pytest.raises(Conflict, match="already"):
            await at.supervisor.restart(replica)
        with pytest.raises(Conflict, match="already"):
            at.supervisor.restart_worker(worker)
        with pytest.raises(Conflict, match="already"):
            await at.supervisor.remove(replica)
        assert replica.pid == pid
        lease.close(Outcome.SERVED, at.clock())
        assert await restart == ""
        assert replica.state is ReplicaState.HEALTHY
        assert replica.pid != pid
        assert at.story.of(0)[3:] == ["restarting", "starting", "loading", "healthy"]
        assert len(replica.tail) == 1  # without the lines of the process before
        assert not worker.draining
        assert not worker.returning

    run(scene)


def test_a_restart_waits_no_longer_than_it_may() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        at.fleet.lease(at.worker(0))
        assert await at.supervisor.restart(replica) == ""

    run(scene, drain=0.1)


def test_a_restart_need_not_wait_and_leaves_the_operators_draining_alone() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        worker = at.worker(0)
        at.fleet.set_draining(worker, True)
        at.fleet.lease(worker)
        assert await at.supervisor.restart(replica, wait_drain=False) == ""
        assert worker.draining
        assert not worker.returning

    run(scene)


def test_who_dies_while_it_drains_is_not_started_twice() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        lease = at.fleet.lease(at.worker(0))
        at.supervisor.restart_worker(at.worker(0))
        await at.until(lambda: at.worker(0).draining)
        os.kill(replica.pid, signal.SIGKILL)
        await at.until(lambda: replica.restarts == 1)
        lease.close(Outcome.CUT, at.clock())
        await at.until(lambda: not at.worker(0).draining)
        assert (replica.state, replica.restarts) == (ReplicaState.HEALTHY, 1)

    run(scene)


def test_who_asked_for_a_restart_may_leave() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        lease = at.fleet.lease(at.worker(0))
        asked = asyncio.ensure_future(at.supervisor.restart(replica))
        await at.until(lambda: at.worker(0).draining)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        lease.close(Outcome.SERVED, at.clock())
        await at.until(lambda: replica.restarts == 1)
        await at.until(lambda: replica.state is ReplicaState.HEALTHY and not at.worker(0).draining)

    run(scene)


def test_a_rolling_restart_takes_one_after_the_other() -> None:
    async def scene(at: Bench) -> None:
        replicas = await at.start(2)
        pids = [replica.pid for replica in replicas]
        assert at.supervisor.rolling["state"] == "idle"
        at.story.states.clear()
        at.supervisor.restart_all()
        with pytest.raises(Conflict, match="in progress"):
            at.supervisor.restart_all()
        running = {"state": "running", "done": 0, "total": 2, "current": 0, "reason": ""}
        await at.until(lambda: replicas[0].state is ReplicaState.RESTARTING)
        assert at.supervisor.rolling == running
        await at.until(lambda: replicas[1].state is ReplicaState.RESTARTING)
        assert at.supervisor.rolling == running | {"done": 1, "current": 1}
        await at.until(lambda: replicas[1].state is ReplicaState.HEALTHY and not at.worker(1).draining)
        await at.soon(lambda: at.supervisor.rolling["state"] != "running")
        assert at.supervisor.rolling == running | {"state": "done", "done": 2, "current": None}
        steps = ("restarting", "starting", "loading", "healthy")
        assert [(rank, state.value) for rank, state in at.story.states] == [(r, step) for r in (0, 1) for step in steps]
        assert not {replica.pid for replica in replicas} & set(pids)

    run(scene, builtin)


def test_a_rolling_restart_stops_at_the_first_that_does_not_come_back(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.touch()

    async def scene(at: Bench) -> None:
        await at.start(3)
        model.unlink()
        at.supervisor.restart_all()
        await at.soon(lambda: at.supervisor.rolling["state"] != "running")
        assert at.supervisor.rolling == {
            "state": "stopped",
            "done": 0,
            "total": 3,
            "current": None,
            "reason": "rank 0 did not become healthy: exited with status 3",
        }
        assert at.replica(1).restarts == 0

    run(scene, lambda port: tiny(port, str(model)))


def test_a_rolling_restart_does_not_take_the_last_one_that_serves() -> None:
    async def scene(at: Bench) -> None:
        await at.start(2)
        at.fleet.set_draining(at.worker(0), True)
        at.supervisor.restart_all()
        await at.soon(lambda: at.supervisor.rolling["state"] != "running")
        assert at.supervisor.rolling["reason"] == (
            "rank 1 is the only healthy replica: restart it alone if you want to"
        )
        assert at.supervisor.rolling["done"] == 1

    run(scene)


# -- scaling -----------------------------------------------------------------------------------------------------------


def test_replicas_are_added_at_the_lowest_free_rank_and_removed_after_draining() -> None:
    async def scene(at: Bench) -> None:
        at.most = 2
        first = (await at.start(1))[0]
        assert at.supervisor.add_one() is not None
        assert at.supervisor.add_one() is None
        assert at.supervisor.why_not == "no GPU for rank 2"
        await at.healthy(1)
        worker, pid = at.worker(0), first.pid
        lease = at.fleet.lease(worker)
        removal = asyncio.ensure_future(at.supervisor.remove(first))
        await at.until(lambda: worker.draining)
        assert exists(pid)
        lease.close(Outcome.SERVED, at.clock())
        await removal
        assert not exists(pid)
        assert first.state is ReplicaState.STOPPED
        assert worker.removed
        assert at.supervisor.describe(worker) is None
        with pytest.raises(Conflict, match="was removed"):
            await at.supervisor.restart(first)
        again = at.supervisor.add_one()
        assert again is not None
        assert again.rank == 0
        await at.healthy(0, 1)

    run(scene)


def test_the_engine_of_a_worker_that_the_operator_removed_is_ended() -> None:
    async def scene(at: Bench) -> None:
        first, second = await at.start(2)
        worker, pid = at.worker(0), first.pid
        lease = at.fleet.lease(worker)
        at.fleet.remove(worker)
        assert exists(pid)  # a request is still in flight
        lease.close(Outcome.SERVED, at.clock())
        await at.until(lambda: first.state is ReplicaState.STOPPED)
        assert not exists(pid)
        await at.soon(lambda: at.supervisor.replicas == [second])

    run(scene)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_stop_ends_all_in_order_and_nothing_starts_afterwards() -> None:
    async def scene(at: Bench) -> None:
        first, second = await at.start(2)
        at.supervisor.restart_all()
        await at.until(lambda: first.state is ReplicaState.RESTARTING)
        urgent = asyncio.Event()
        await asyncio.gather(at.supervisor.stop(urgent), at.supervisor.stop(urgent))
        assert (first.state, second.state) == (ReplicaState.STOPPED, ReplicaState.STOPPED)
        assert second.exit == 0  # it got SIGTERM and ended in time
        assert at.supervisor.rolling["reason"] == "the launcher is shutting down"
        assert at.supervisor.add_one() is None
        with pytest.raises(Conflict, match="shutting down"):
            at.supervisor.restart_worker(at.worker(0))
        with pytest.raises(Conflict, match="shutting down"):
            at.supervisor.restart_all()

    run(scene, builtin)


def test_a_stop_while_models_load() -> None:
    async def scene(at: Bench) -> None:
        await at.supervisor.start(2)
        await at.until(lambda: all(replica.state is ReplicaState.LOADING for replica in at.supervisor.replicas))
        await at.supervisor.stop(asyncio.Event())
        assert [replica.state for replica in at.supervisor.replicas] == [ReplicaState.STOPPED] * 2

    run(scene, lambda port: builtin(port, "--startup-delay", "1000"))


@pytest.mark.parametrize("turns", range(4))
def test_a_stop_in_the_first_moments(turns: int) -> None:
    async def scene(at: Bench) -> None:
        await at.supervisor.start(2)
        for _ in range(turns):
            await asyncio.sleep(0)
        await at.supervisor.stop(asyncio.Event())
        assert [replica.state for replica in at.supervisor.replicas] == [ReplicaState.STOPPED] * 2

    run(scene)


def test_a_stop_in_a_pause() -> None:
    async def scene(at: Bench) -> None:
        (replica,) = await at.start(1)
        os.kill(replica.pid, signal.SIGKILL)
        await at.until(lambda: replica.state is ReplicaState.RESTARTING)
        await at.supervisor.stop(asyncio.Event())
        assert (replica.state, replica.restarts) == (ReplicaState.STOPPED, 0)

    run(scene, rules=RestartRules(initial_backoff=1000.0, max_backoff=1000.0))


@pytest.mark.parametrize("hurried", [False, True])
def test_who_does_not_end_is_killed_after_the_grace_period_or_when_it_is_urgent(hurried: bool) -> None:
    async def scene(at: Bench) -> None:
        await at.supervisor.start(1)
        await at.until(lambda: at.replica(0).last_line == "up")
        urgent = asyncio.Event()
        stop = asyncio.ensure_future(at.supervisor.stop(urgent))
        if hurried:
            await at.until(lambda: at.replica(0).state is ReplicaState.STOPPING)
            urgent.set()
        await stop
        assert at.replica(0).exit == -9

    run(scene, shell("trap '' TERM; echo up; while true; do sleep 0.1; done"), stop=1000.0 if hurried else 0.1)
