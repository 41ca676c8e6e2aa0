"""Health checks, over real sockets: what counts as well, when the next check comes, when checks end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping

import pytest

from fake_worker import CLOSE, HANG, FakeWorker, Gate, answer
from fleets import any_policy
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.engine_survey import EngineSurvey
from sglang_router.workers.health_checks import HealthChecks

HEALTH = "GET /health"
NEVER = 3600.0  # an interval that no test lives to see the end of


class Changes(Listener):
    """A listener that lets a test wait for what becomes of a worker."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._news = asyncio.Event()

    def worker_changed(self, event: WorkerChanged) -> None:
        self.seen.append(f"{event.what} {event.new}".rstrip())
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async def holds() -> None:
            while not condition():
                self._news.clear()
                await self._news.wait()

        await asyncio.wait_for(holds(), 10.0)


class Bench:
    """One fake worker, a fleet, and the health checks under test."""

    def __init__(self, fake: FakeWorker, unhealthy_interval: float) -> None:
        loop = asyncio.get_running_loop()
        self.fake = fake
        self.changes = Changes()
        self.fleet = Fleet(self.changes, lambda: "id", any_policy)
        self.pool = ConnectionPool(loop, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None)
        survey = EngineSurvey(loop, self.fleet, self.pool, loop.time, interval=0.0)
        self.checks = HealthChecks(
            loop,
            self.fleet,
            self.pool,
            loop.time,
            unhealthy_interval=unhealthy_interval,
            introduce=survey.introduce,
        )

    def add(self, **rules: object) -> Worker:
        """Registers the fake worker and has it checked."""
        health = HealthRules(**{"interval": NEVER, **rules})  # type: ignore[arg-type]
        worker = self.fleet.add(WorkerSpec(url=self.fake.url, api_key="k3y", health=health), self.now)
        self.pool.know(worker.target)
        self.checks.start(worker)
        return worker

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()


def run(
    test: Callable[[Bench], Awaitable[None]],
    script: Mapping[str, bytes] | None = None,
    unhealthy_interval: float = 0.01,
) -> None:
    """Runs a test on a loop of its own, against a fake worker that is up."""

    async def scene() -> None:
        fake = FakeWorker(script)
        await fake.start()
        bench = Bench(fake, unhealthy_interval)
        try:
            await test(bench)
        finally:
            await bench.checks.close()
            await bench.pool.close()
            await fake.stop()

    asyncio.run(scene())


@pytest.mark.parametrize("stops", [False, True])
def test_case_13_engines_that_the_launcher_ends_are_no_warning(stops: bool, caplog: pytest.LogCaptureFixture) -> None:
    """At the end of `launch_server`, its last line warned that the engines refuse connections."""

    async def test(bench: Bench) -> None:
        health = HealthRules(interval=NEVER, failure_threshold=1)
        worker = bench.fleet.add(WorkerSpec(url=bench.fake.url, source=Source.REPLICAS, health=health), bench.now)
        bench.pool.know(worker.target)
        bench.checks.start(worker)
        assert await bench.checks.until_healthy(worker, 10.0)
        if stops:
            bench.checks.release()
        bench.fake.script[HEALTH] = answer(500)
        bench.checks.check_now(worker)
        await bench.changes.until(lambda: worker.health is Health.UNHEALTHY)
        assert ("worker fails its health checks" in caplog.messages) is not stops

    run(test)


def test_a_well_worker_is_healthy_after_one_check_and_asked_with_its_key() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(endpoint="/health?deep=1")
        bench.fake.script["GET /health?deep=1"] = answer(204)
        assert await bench.checks.until_healthy(worker, 10.0)
        (check, *_) = bench.fake.seen
        assert check.route == "GET /health?deep=1"
        assert check.headers["authorization"] == "Bearer k3y"
        assert bench.changes.seen == ["added starting", "health healthy"]

    run(test)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (answer(503), "GET /health answered 503"),
        (answer(404), "GET /health answered 404"),
        (CLOSE, "The worker closed the connection without an answer."),
        (b"nonsense\r\n\r\n", "The worker's answer is not well-formed HTTP."),
    ],
)
def test_what_is_not_a_2xx_answer_is_an_error_that_is_told(reply: bytes, said: str) -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.fake.asked(HEALTH, 2)  # the first check has been told by then
        assert worker.last_error == said
        assert worker.health is Health.STARTING
        bench.fake.script[HEALTH] = answer(200)  # an engine that is done with starting
        assert await bench.checks.until_healthy(worker, 10.0)
        assert worker.last_error == ""

    run(test, {HEALTH: reply})


def test_a_check_that_hangs_ends_after_its_timeout() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(timeout=0.02)
        await bench.fake.asked(HEALTH, 2)
        assert worker.last_error == "No answer within 0.02 s."

    run(test, {HEALTH: HANG})


def test_a_healthy_worker_that_fails_is_checked_often_and_given_up_at_the_threshold() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(failure_threshold=3, success_threshold=2)
        assert await bench.checks.until_healthy(worker, 10.0)
        bench.fake.script[HEALTH] = answer(500)
        bench.checks.check_now(worker)  # the interval is an hour: only the first bad check must be asked for
        await bench.changes.until(lambda: worker.health is Health.UNHEALTHY)
        assert bench.fake.count(HEALTH) == 1 + 3
        bench.fake.script[HEALTH] = answer(200)
        await bench.changes.until(lambda: worker.health is Health.HEALTHY)
        assert bench.fake.count(HEALTH) == 1 + 3 + 2

    run(test)


@pytest.mark.parametrize("late", [answer(503), HANG])
def test_a_paused_engine_may_be_late_with_its_health_but_it_must_be_there(late: bytes) -> None:
    """SGLang generates a token to tell its health: while it is paused, or loads weights, it cannot."""

    async def test(bench: Bench) -> None:
        worker = bench.add(failure_threshold=1, timeout=0.05)
        assert await bench.checks.until_healthy(worker, 10.0)
        bench.fleet.set_paused(worker, ("generation",))
        bench.fake.script[HEALTH] = late
        bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH, 2)
        bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH, 3)
        assert worker.health is Health.HEALTHY
        bench.fake.script[HEALTH] = answer(200)
        bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH, 4)
        await bench.fake.stop()
        bench.checks.check_now(worker)
        await bench.changes.until(lambda: worker.health is Health.UNHEALTHY)
        await bench.fake.start()
        await bench.changes.until(lambda: worker.health is Health.HEALTHY)
        assert list(worker.paused) == []  # another process

    run(test)


def test_an_engine_that_continues_must_tell_its_health_again() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(failure_threshold=1, timeout=0.05)
        assert await bench.checks.until_healthy(worker, 10.0)
        bench.fleet.set_paused(worker, ("generation",))
        bench.fake.script[HEALTH] = answer(503)
        bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH, 2)
        bench.fleet.set_paused(worker, ())
        bench.checks.check_now(worker)
        await bench.changes.until(lambda: worker.health is Health.UNHEALTHY)

    run(test)


def test_while_all_is_well_the_interval_is_kept() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(interval=0.1)
        assert await bench.checks.until_healthy(worker, 10.0)
        await bench.fake.asked(HEALTH, 2)  # the first pause is shorter, so that not all workers are checked at once
        start = bench.now
        await bench.fake.asked(HEALTH, 4)
        assert bench.now - start >= 0.2 - 0.02

    run(test, unhealthy_interval=0.0)


def test_many_calls_make_one_check() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        assert await bench.checks.until_healthy(worker, 10.0)
        for _ in range(100):
            bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH, 2)
        bench.checks.check_now(
            worker
        )  # came during or after that check: one more, and by then all hundred are dealt with
        await bench.fake.asked(HEALTH, 3)
        assert bench.fake.count(HEALTH) == 3

    run(test)


def test_a_listener_that_was_gone_is_another_process_when_it_is_back() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(failure_threshold=1)
        assert await bench.checks.until_healthy(worker, 10.0)
        await bench.fake.stop()
        bench.checks.check_now(worker)
        await bench.changes.until(lambda: worker.health is Health.UNHEALTHY)
        assert worker.last_error == "The worker refuses connections."
        assert worker.gone_silent
        await bench.fake.start()
        await bench.changes.until(lambda: worker.health is Health.HEALTHY)
        assert bench.changes.seen[2:] == ["health unhealthy", "restarted", "health healthy"]

    run(test)


def test_a_good_check_closes_the_breaker_that_broken_connections_opened() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        assert await bench.checks.until_healthy(worker, 10.0)
        for _ in range(bench.fleet.rules.breaker.threshold):
            bench.fleet.lease(worker).close(Outcome.BROKEN, bench.now)
        assert worker.breaker is Breaker.OPEN
        bench.checks.check_now(worker)
        await bench.changes.until(lambda: worker.breaker is Breaker.CLOSED)

    run(test)


MODELS = "GET /v1/models"


def test_the_name_of_the_model_is_learnt_once() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        assert await bench.checks.until_healthy(worker, 10.0)
        assert worker.model == "tiny"
        bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH, 2)
        bench.checks.check_now(worker)
        await bench.fake.asked(HEALTH, 3)
        assert bench.fake.count(MODELS) == 1

    run(test, {MODELS: answer(200, {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})})


@pytest.mark.parametrize(
    "reply",
    [
        CLOSE,
        answer(500, {"data": [{"id": "x"}]}),
        answer(200, b"\xff\xfe{"),
        answer(200, {"data": []}),
        answer(200, [1]),
    ],
)
def test_a_worker_that_does_not_tell_its_model_is_healthy_all_the_same(reply: bytes) -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        assert await bench.checks.until_healthy(worker, 10.0)
        assert worker.model is None
        assert bench.fake.count(MODELS) >= 1  # a kept connection that closes is not taken for an answer

    run(test, {MODELS: reply})


def test_a_name_that_was_given_stays() -> None:
    async def test(bench: Bench) -> None:
        spec = WorkerSpec(url=bench.fake.url, model_id="given", health=HealthRules(interval=NEVER))
        worker = bench.fleet.add(spec, bench.now)
        bench.checks.start(worker)
        assert await bench.checks.until_healthy(worker, 10.0)
        assert (worker.model, worker.report.model) == ("given", "tiny")

    run(test, {MODELS: answer(200, {"data": [{"id": "tiny"}]})})


def test_without_health_checks_only_the_model_is_asked_for() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(enabled=False)
        assert await bench.checks.until_healthy(worker, 10.0)
        assert worker.model == "tiny"
        assert bench.fake.count(HEALTH) == 0

    run(test, {MODELS: answer(200, {"data": [{"id": "tiny"}]})})


def test_waiting_for_a_worker_ends_with_the_time_or_with_the_worker() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        assert not await bench.checks.until_healthy(worker, 0.02)
        waiting = asyncio.ensure_future(bench.checks.until_healthy(worker, 60.0))
        await bench.fake.asked(HEALTH, bench.fake.count(HEALTH) + 1)
        bench.fleet.remove(worker)
        bench.checks.stop(worker)
        assert not await asyncio.wait_for(waiting, 10.0)

    run(test, {HEALTH: answer(503)})


def test_the_checks_of_a_removed_worker_end_by_themselves() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.fake.asked(HEALTH, 2)
        waiting = asyncio.ensure_future(bench.checks.until_healthy(worker, 60.0))
        await asyncio.sleep(0)  # lets it begin to wait
        bench.fleet.remove(worker)
        assert not await asyncio.wait_for(waiting, 10.0)  # it ends with the checks
        asked = bench.fake.count(HEALTH)
        bench.checks.check_now(worker)  # does nothing any more
        assert bench.fake.count(HEALTH) == asked

    run(test, {HEALTH: answer(503)})


def test_start_is_done_once() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        bench.checks.start(worker)
        assert await bench.checks.until_healthy(worker, 10.0)
        assert bench.fake.count(HEALTH) == 1

    run(test)


def test_case_23_a_worker_is_asked_for_its_model_before_it_gets_requests() -> None:
    """Else the requests that wait for the first worker would go to it, whatever their model."""

    async def test(bench: Bench) -> None:
        gate = bench.fake.script[MODELS] = Gate(answer(200, {"data": [{"id": "tiny"}]}))
        worker = bench.add()
        await bench.fake.asked(MODELS, 1)
        assert worker.health is Health.STARTING
        gate.open.set()
        assert await bench.checks.until_healthy(worker, 10.0)
        assert worker.model == "tiny"

    run(test)


def test_a_worker_that_does_not_answer_what_it_is_becomes_healthy_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sglang_router.workers.health_checks._LONGEST_INTRODUCTION", 0.01)

    async def test(bench: Bench) -> None:
        worker = bench.add(timeout=NEVER)
        await bench.changes.until(lambda: worker.health is Health.HEALTHY)
        assert worker.model is None

    run(test, {MODELS: HANG})


def test_case_8_a_host_that_does_not_answer_is_told_from_an_engine_that_is_slow() -> None:
    """Only the first takes requests back: the second may be computing."""

    async def test(bench: Bench) -> None:
        gone: list[str] = []
        bench.checks.vanished = gone.append
        slow = bench.add(timeout=0.05, failure_threshold=1)
        await bench.changes.until(lambda: slow.health is Health.HEALTHY)
        bench.fake.script[HEALTH] = HANG
        bench.checks.check_now(slow)
        await bench.changes.until(lambda: slow.health is Health.UNHEALTHY)
        assert not gone
        with full_backlog() as port:
            url = f"http://127.0.0.1:{port}"
            health = HealthRules(interval=NEVER, timeout=0.05, failure_threshold=1)
            far = bench.fleet.add(WorkerSpec(url=url, health=health), bench.now)
            bench.fleet.probed(far, None, bench.now)
            bench.checks.start(far)
            await bench.changes.until(lambda: far.health is Health.UNHEALTHY)
            assert gone == [url]
            assert far.last_error == "No connection to the worker within 0.05 s."

    run(test, unhealthy_interval=NEVER)


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """Yield a port whose host does not answer: it listens, and drops what asks for a connection."""
    with socket.socket() as listener, contextlib.ExitStack() as clients:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
