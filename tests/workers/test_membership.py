"""Membership: what begins with a worker ends with it, and a new key does not lose its connections."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from fake_worker import FakeWorker, answer
from fleets import any_policy
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.events import Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker
from sglang_router.workers.engine_survey import EngineSurvey
from sglang_router.workers.health_checks import HealthChecks
from sglang_router.workers.membership import Membership

HEALTH, LOADS = "GET /health", "GET /v1/loads"
NEVER = 3600.0


class Bench:
    """A fake worker, a fleet, and all that follows its workers."""

    def __init__(self, fake: FakeWorker) -> None:
        loop = asyncio.get_running_loop()
        self.fake = fake
        listeners = Listeners()
        self.fleet = Fleet(listeners, lambda: "id", any_policy)
        self.pool = ConnectionPool(loop, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None)
        self.survey = EngineSurvey(loop, self.fleet, self.pool, loop.time, 0.01)
        self.checks = HealthChecks(
            loop, self.fleet, self.pool, loop.time, unhealthy_interval=0.01, introduce=self.survey.introduce
        )
        self.membership = Membership(self.fleet, self.pool, self.checks, self.survey)
        listeners.add(self.membership)

    async def add(self) -> Worker:
        spec = WorkerSpec(url=self.fake.url, api_key="old", health=HealthRules(interval=NEVER))
        worker = self.fleet.add(spec, 0.0)
        assert await self.checks.until_healthy(worker, 10.0)
        return worker


def run(scene: Callable[[Bench], Awaitable[None]]) -> None:
    async def whole() -> None:
        fake = FakeWorker({LOADS: answer(200, {"loads": [{"num_running_reqs": 1}]})})
        await fake.start()
        bench = Bench(fake)
        try:
            await scene(bench)
        finally:
            await bench.checks.close()
            await bench.survey.close()
            await bench.pool.close()
            await fake.stop()

    asyncio.run(whole())


def test_a_worker_that_is_added_is_checked_asked_and_its_connections_are_kept() -> None:
    async def scene(bench: Bench) -> None:
        worker = await bench.add()
        await bench.fake.asked(LOADS, 3)
        assert worker.report.running == 1
        assert bench.pool.open == 1

    run(scene)


def test_with_a_worker_that_is_removed_all_of_it_ends() -> None:
    async def scene(bench: Bench) -> None:
        worker = await bench.add()
        await bench.fake.asked(LOADS, 2)
        bench.fleet.remove(worker)
        await bench.fake.hung_up()
        assert "0 targets" in repr(bench.pool)
        bench.checks.check_now(worker)  # nobody checks it any more
        assert bench.fake.count(HEALTH) == 1

    run(scene)


def test_a_new_key_is_used_at_once_and_on_the_same_connection() -> None:
    async def scene(bench: Bench) -> None:
        worker = await bench.add()
        bench.membership.amend(worker, msgspec.structs.replace(worker.spec, api_key="new"))
        bench.fake.seen.clear()
        bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH)
        (check,) = [seen for seen in bench.fake.seen if seen.route == HEALTH]
        assert check.headers["authorization"] == "Bearer new"
        assert (worker.target.key, worker.key) == (b"new", b"new")
        bench.fleet.remove(worker)
        await bench.fake.hung_up()  # connections of the old key, too

    run(scene)


def test_case_26_one_engine_under_two_urls_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """`localhost` and `127.0.0.1` were two workers of one engine, and it got the share of two."""

    async def scene(bench: Bench) -> None:
        port = bench.fake.port
        for url in (f"http://localhost:{port}", f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/e1"):
            bench.fleet.add(WorkerSpec(url=url, health=HealthRules(interval=NEVER)), 0.0)
        said = f"http://localhost:{port} and http://127.0.0.1:{port} seem to be one engine under two URLs: remove one"
        assert [record.message for record in caplog.records if record.name == "sglang_router.workers"] == [said]
        for worker in list(bench.fleet):
            bench.fleet.remove(worker)
        caplog.clear()
        await bench.add()
        assert not caplog.records

    run(scene)


def test_what_is_no_key_leaves_the_target_as_it_is() -> None:
    async def scene(bench: Bench) -> None:
        worker = await bench.add()
        before = worker.target
        bench.membership.amend(worker, msgspec.structs.replace(worker.spec, priority=7))
        assert worker.target == before
        assert worker.spec.priority == 7
        assert "1 targets" in repr(bench.pool)

    run(scene)
