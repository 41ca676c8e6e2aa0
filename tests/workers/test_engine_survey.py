"""Asking engines, over real sockets: which questions, when, how often; and that no answer is no fault."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from engines import engine_processes
from fake_worker import CLOSE, HANG, FakeWorker, Gate, answer
from fleets import any_policy
from llama import llama_processes
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.engine_report import NOTHING, EngineReport
from sglang_router.routing.events import Listener
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.engine_survey import EngineSurvey
from stack import Stack, stack

MODELS, INFO, LOADS, GET_LOAD, METRICS = (
    f"GET {path}" for path in ("/v1/models", "/server_info", "/v1/loads", "/get_load", "/metrics")
)
NEVER = 3600.0


def loads(running: int, queued: int = 0) -> bytes:
    row = {"num_running_reqs": running, "num_waiting_reqs": queued, "num_used_tokens": 7, "num_total_tokens": 9}
    return answer(200, {"loads": [{"dp_rank": 0, **row, "max_total_num_tokens": 500}]})


SGLANG: dict[str, bytes | Gate] = {
    MODELS: answer(200, {"data": [{"id": "m", "max_model_len": 4096}]}),
    INFO: answer(200, {"version": "0.5.23", "dp_size": 1, "max_total_num_tokens": 500, "context_length": None}),
    LOADS: loads(2, 1),
}
VLLM_METRICS = b"""\
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m \\"q\\""} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
vllm:nonsense{{{ is not read
"""


class Bench:
    """One fake engine, a fleet, and the survey under test."""

    def __init__(self, fake: FakeWorker, interval: float) -> None:
        loop = asyncio.get_running_loop()
        self.fake = fake
        self.fleet = Fleet(Listener(), lambda: "id", any_policy)
        self.pool = ConnectionPool(loop, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None)
        self.survey = EngineSurvey(loop, self.fleet, self.pool, loop.time, interval)

    def add(self, *, health: Health = Health.HEALTHY, timeout: float = 10.0, key: str = "k3y") -> Worker:
        rules = HealthRules(interval=NEVER, timeout=timeout, enabled=health is not Health.HEALTHY)
        worker = self.fleet.add(WorkerSpec(url=self.fake.url, api_key=key, health=rules), 0.0)
        self.pool.know(worker.target)
        return worker

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let the loop run until the condition holds: a report is no event."""

        async def turning() -> None:
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0)

        await asyncio.wait_for(turning(), 10.0)

    def asked(self, *without: str) -> list[str]:
        return [seen.route for seen in self.fake.seen if seen.route not in without]


def run(
    test: Callable[[Bench], Awaitable[None]],
    script: Mapping[str, bytes | Gate] | None = None,
    interval: float = NEVER,
) -> None:
    """Runs a test on a loop of its own, against a fake engine that is up."""

    async def scene() -> None:
        fake = FakeWorker(script)
        await fake.start()
        bench = Bench(fake, interval)
        try:
            await test(bench)
        finally:
            await bench.survey.close()
            await bench.pool.close()
            await fake.stop()

    asyncio.run(scene())


# -- what an engine is -----------------------------------------------------------------------------------


def test_sglang_is_asked_what_it_is_with_its_key() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        assert worker.report == EngineReport(
            model="m",
            version="0.5.23",
            context_length=4096,
            capacity_tokens=500,
            ranks=1,
            running=2,
            queued=1,
            used_tokens=7,
            load_tokens=9,
        )
        assert bench.asked() == [MODELS, INFO, LOADS]
        assert {seen.headers["authorization"] for seen in bench.fake.seen} == {"Bearer k3y"}
        assert worker.model == "m"

    run(test, SGLANG)


def test_an_older_sglang_is_asked_by_its_older_names() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        assert worker.report == EngineReport(
            model="/m", version="0.4", capacity_tokens=9, running=3, queued=1, load_tokens=5
        )

    row = {"dp_rank": 0, "num_reqs": 4, "num_waiting_reqs": 1, "num_tokens": 5}
    run(
        test,
        {
            "GET /get_server_info": answer(200, {"version": "0.4", "max_total_num_tokens": 9}),
            "GET /get_model_info": answer(200, {"model_path": "/m"}),
            GET_LOAD: answer(200, [row]),
        },
    )


def test_vllm() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        assert worker.report == EngineReport(
            model="m",
            version="0.32.0",
            runtime="vllm",
            context_length=8192,
            ranks=1,
            capacity_tokens=1600,
            running=3,
            queued=1,
            used_tokens=800,
        )

    run(
        test,
        {
            MODELS: answer(200, {"data": [{"id": "m", "max_model_len": 8192}]}),
            "GET /version": answer(200, {"version": "0.32.0"}),
            METRICS: answer(200, VLLM_METRICS),
            "GET /load": answer(200, {"server_load": 55}),
        },
    )


def test_vllm_without_metrics_tells_its_load_another_way() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        assert worker.report == EngineReport(running=5)

    run(test, {METRICS: answer(404), "GET /load": answer(200, {"server_load": 5})})


def test_an_engine_that_tells_nothing_is_introduced_all_the_same() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        assert worker.report == NOTHING
        assert worker.model is None

    run(test)


ODD = [
    CLOSE,
    answer(500, {"loads": []}),
    answer(200, b"\xff\xfe{"),
    answer(200, b"[" * 100_000),
    answer(200, [1, None, "x"]),
    answer(200, {"loads": [{"num_running_reqs": -1}], "data": [{"id": ""}], "dp_size": 1e300}),
    answer(200, b'vllm:num_requests_running{engine="0" 3\n'),
    answer(200, b"vllm:num_requests_running nan\n"),
    b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_answers_say_nothing(odd: bytes) -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(timeout=0.5)
        await bench.survey.introduce(worker)
        assert worker.report.without_load() == NOTHING
        assert worker.report.running is None

    run(test, dict.fromkeys((MODELS, INFO, LOADS, GET_LOAD, METRICS), odd))


def test_what_came_in_time_counts_when_an_engine_hangs() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(timeout=0.3)
        await bench.survey.introduce(worker)
        assert worker.report.without_load() == EngineReport(model="m", context_length=4096, capacity_tokens=500)
        bench.fake.script[INFO] = SGLANG[INFO]
        bench.survey.start(worker)  # asks again what it could not tell
        await bench.until(lambda: worker.report.version == "0.5.23")

    run(test, {**SGLANG, INFO: HANG}, interval=0.01)


# -- how busy it is --------------------------------------------------------------------------------------


def test_the_load_is_asked_again_and_again_and_nothing_else() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        bench.survey.start(worker)
        bench.survey.start(worker)
        await bench.fake.asked(LOADS, 4)
        bench.fake.script[LOADS] = loads(77)
        await bench.until(lambda: worker.report.running == 77)
        assert worker.report.version == "0.5.23"
        assert set(bench.asked(LOADS)) == {MODELS, INFO}

    run(test, SGLANG, interval=0.01)


def test_what_is_not_told_any_more_is_not_kept() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        bench.fake.script[LOADS] = CLOSE
        bench.survey.start(worker)
        await bench.until(lambda: worker.report.running is None)
        assert worker.report == EngineReport(
            model="m", version="0.5.23", context_length=4096, capacity_tokens=500, ranks=1
        )

    run(test, SGLANG, interval=0.01)


def test_an_endpoint_that_is_not_there_is_asked_once_for_each_process() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        bench.survey.start(worker)
        await bench.fake.asked(METRICS, 5)
        assert [bench.fake.count(route) for route in (LOADS, GET_LOAD, "GET /load")] == [1, 1, 0]
        await bench.survey.introduce(worker)
        assert bench.fake.count(LOADS) == 2

    run(test, {LOADS: answer(501), METRICS: answer(200, b"llamacpp:requests_processing 2\n")}, interval=0.01)


def test_a_worker_that_is_not_healthy_is_left_alone_and_its_load_is_unknown() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add(health=Health.STARTING)
        bench.fleet.reported(worker, EngineReport(model="m", running=3))
        bench.survey.start(worker)
        await bench.until(lambda: worker.report == EngineReport(model="m"))
        assert bench.asked() == []
        bench.fleet.probed(worker, None, 1.0)
        await bench.until(lambda: worker.report.running == 2)

    run(test, SGLANG, interval=0.01)


def test_one_question_at_a_time() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        await bench.survey.introduce(worker)
        bench.fake.seen.clear()
        gate = bench.fake.script[LOADS] = Gate(loads(1))
        bench.survey.start(worker)
        await bench.fake.asked(LOADS)
        meeting = asyncio.ensure_future(bench.survey.introduce(worker))
        for _ in range(20):
            await asyncio.sleep(0)  # lets it ask, if it wanted to
        assert bench.asked() == [LOADS]
        gate.open.set()
        await asyncio.wait_for(meeting, 10.0)
        assert bench.asked()[:3] == [LOADS, MODELS, INFO]

    run(test, SGLANG, interval=0.01)


def test_an_interval_of_zero_asks_for_the_name_only() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        bench.survey.start(worker)
        await bench.survey.introduce(worker)
        assert bench.asked() == [MODELS]
        assert worker.model == "m"

    run(test, SGLANG, interval=0.0)


def test_questions_end_with_the_worker() -> None:
    async def test(bench: Bench) -> None:
        worker = bench.add()
        bench.survey.start(worker)
        await bench.fake.asked(LOADS, 2)
        bench.fleet.remove(worker)
        bench.survey.stop(worker)
        bench.survey.stop(worker)
        bench.pool.forget(worker.target)
        await bench.fake.hung_up()
        asked = len(bench.fake.seen)
        other = bench.add()  # a second one takes as long as three reports of the first would have
        bench.survey.start(other)
        await bench.fake.asked(LOADS, asked + 3)

    run(test, SGLANG, interval=0.01)


def test_workers_are_asked_one_after_the_other() -> None:
    """The first questions to many workers are spread over the interval by their order alone."""
    starts = sorted(order * 0.6180339887 % 1.0 for order in range(1, 1001))
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert max(gaps) < 0.003  # a thousand evenly would be 0.001


# -- real engines ----------------------------------------------------------------------------------------


def told(router: Stack, *fields: str) -> dict[str, Any]:
    """Return what the only engine says of itself, once it says these things: a busy engine may not do so at once."""
    deadline = time.monotonic() + 30.0
    while True:
        (worker,) = router.get("/workers").json()["workers"]
        engine: dict[str, Any] = worker["engine"]
        if engine.keys() >= set(fields):
            return engine
        assert time.monotonic() < deadline, engine


def test_the_built_in_engine() -> None:
    flags = ("--speed", "0", "--model", "tiny", "--capacity-tokens", "5000", "--context-length", "2048")
    with engine_processes(1, *flags) as (url,), stack(url, interval=0.05) as router:
        engine = told(router, "version", "context_length", "running", "load_tokens")
        assert engine.pop("version")
        assert engine == {
            "model": "tiny",
            "context_length": 2048,
            "capacity_tokens": 5000,
            "ranks": 1,
            "role": "regular",
            "window": 256,
            "running": 0,
            "queued": 0,
            "used_tokens": 0,
            "load_tokens": 0,
        }


def test_llama_cpp() -> None:
    with llama_processes(1) as (url,), stack(url, interval=0.05) as router:
        engine = told(router, "version", "context_length", "running")
        assert engine.pop("version")
        assert engine == {"model": "tiny", "context_length": 8192, "running": 0, "queued": 0}
