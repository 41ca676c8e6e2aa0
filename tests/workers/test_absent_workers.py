"""Workers that are not there, in played time: how often they are checked, what is told of them, who waits for them."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fleets import any_policy
from sglang_router.errors import Unavailable, WorkersStarting
from sglang_router.relay.origin import Origin, origin_of
from sglang_router.relay.upstream import Sink
from sglang_router.routing.events import Listener
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import Source
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.wire.framing import Framing
from sglang_router.wire.response import framing_of, parse_head
from sglang_router.workers.health_checks import HealthChecks, pause_of

REFUSED = (Outcome.REFUSED, "The worker refuses connections.")
TLS = (Outcome.UNREACHABLE, "The worker could not be reached: the worker's certificate is not accepted.")
NO_NAME = (Outcome.UNREACHABLE, "The worker could not be reached: the look-up of its name failed.")
NO_HTTP = (Outcome.INVALID, "The worker's answer is not well-formed HTTP.")
CLOSED = (Outcome.BROKEN, "The worker closed the connection without an answer.")
SILENT = (Outcome.UNCONNECTED, "No connection to the worker within 10 s.")
Answer = int | tuple[Outcome, str]


class PlayedLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: its clock goes on to the next timer at once."""

    def __init__(self) -> None:
        super().__init__(_NoWait(self))
        self.played = 1000.0

    def time(self) -> float:
        return self.played


class _NoWait(selectors.SelectSelector):
    def __init__(self, loop: PlayedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.played += timeout or 0.0
        return super().select(0)


class PlayedPool:
    """A pool without sockets: each worker gives the answer of the script, 200 if there is none."""

    mark = b""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.script: dict[str, Answer] = {}
        self.asked: list[tuple[float, str, bool]] = []
        self._clock = clock

    def origin(self, target: Target) -> Origin:
        return origin_of(target.url)

    def refresh(self, target: Target) -> None:
        """Do nothing: there are no names."""

    def send(self, target: Target, sink: Sink, head: bytes, body: bytes, *, fresh: bool = False) -> None:
        self.asked.append((self._clock(), target.url, fresh))
        answer = self.script.get(target.url, 200)
        if isinstance(answer, int):
            said = parse_head(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % answer, 0)
            assert said is not None
            framing: Framing = framing_of(said)
            sink.begin(said, framing, b"", True)
        else:
            sink.broken(*answer)


class Bench:
    """A fleet, its health checks, and the played time."""

    def __init__(self, loop: PlayedLoop) -> None:
        self.fleet = Fleet(Listener(), lambda: "id", any_policy)
        self.pool = PlayedPool(loop.time)
        pool: Any = self.pool  # in place of a ConnectionPool
        self.checks = HealthChecks(loop, self.fleet, pool, loop.time, unhealthy_interval=1.0)
        self.now = loop.time

    def add(self, url: str, answer: Answer, **spec: Any) -> Worker:
        self.pool.script[url] = answer
        worker = self.fleet.add(WorkerSpec(url=url, health=HealthRules(), **spec), self.now())
        self.checks.start(worker)
        return worker

    def gaps(self, url: str, since: float = 0.0) -> list[float]:
        """The pauses between the checks of a worker."""
        times = [moment for moment, asked, _ in self.pool.asked if asked == url and moment >= since]
        return [after - before for before, after in itertools.pairwise(times)]


def play(scene: Callable[[Bench], Awaitable[None]]) -> None:
    async def whole() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, PlayedLoop)
        bench = Bench(loop)
        await scene(bench)
        await bench.checks.close()

    loop = PlayedLoop()
    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


E = "http://10.0.0.7:8000"


# -- how often ---------------------------------------------------------------------------------------------------------


def test_f33_checks_of_workers_that_are_gone_for_good_back_off_with_jitter() -> None:
    """Each dead worker was checked once a second for ever."""

    async def scene(bench: Bench) -> None:
        urls = [f"http://10.0.1.{number}" for number in range(20)]
        for url in urls:
            bench.add(url, REFUSED)
        begun = bench.now()
        await asyncio.sleep(10.0)
        assert all(gap <= 1.2 for url in urls for gap in bench.gaps(url))
        await asyncio.sleep(890.0)
        late = [gap for url in urls for gap in bench.gaps(url, begun + 300.0)]
        assert min(late) >= 10.0
        assert max(late) <= 15.0 + 10.0 / 40, "a pause ends with a step of the interval"
        moments = Counter(round(moment, 3) for moment, *_ in bench.pool.asked if moment >= begun + 300.0)
        assert max(moments.values()) <= len(urls) / 4, "not all at the same moment"
        assert len(bench.pool.asked) / len(urls) < 110

    play(scene)


def test_f33_the_checks_of_any_number_of_dead_workers_together_have_a_limit() -> None:
    assert [pause_of(seconds, 1) for seconds in (0.0, 10.0, 60.0, 125.0, 1e6)] == [0.0, 1.0, 6.0, 12.5, 12.5]
    assert [pause_of(1e6, failing) for failing in (250, 400, 4000)] == [12.5, 20.0, 200.0]
    assert pause_of(60.0, 4000) == 6.0


@pytest.mark.parametrize("outage", [3.0, 20.0, 60.0])
def test_f33_a_worker_that_was_lost_is_noticed_soon_when_it_returns(outage: float) -> None:
    async def scene(bench: Bench) -> None:
        worker = bench.add(E, 200)
        await asyncio.sleep(25.0)
        bench.pool.script[E] = REFUSED
        bench.checks.check_now(worker)  # a request met the dead worker
        await asyncio.sleep(outage)
        assert repr(worker) == f"<Worker {E}: unhealthy, breaker closed, load 0>"
        bench.pool.script[E] = 200
        await asyncio.sleep(2.0 + outage * 0.12)  # two checks must pass
        assert repr(worker) == f"<Worker {E}: healthy, breaker closed, load 0>"

    play(scene)


def test_f33_a_check_that_is_asked_for_comes_at_once() -> None:
    async def scene(bench: Bench) -> None:
        worker = bench.add(E, REFUSED)
        await asyncio.sleep(600.0)
        bench.pool.script[E] = 200
        bench.checks.check_now(worker)
        await asyncio.sleep(0.1)
        assert worker.health is Health.HEALTHY

    play(scene)


def test_f33_a_replica_that_starts_is_checked_all_the_time() -> None:
    """Its process is there, and the first answer should not come ten seconds late."""

    async def scene(bench: Bench) -> None:
        worker = bench.add(E, REFUSED, source=Source.REPLICAS)
        await asyncio.sleep(600.0)
        assert max(bench.gaps(E)) <= 1.0
        assert isinstance(bench.fleet.unavailable(bench.now()), WorkersStarting)
        assert not worker.hopeless

    play(scene)


def test_case_7_a_check_is_made_on_a_new_connection_now_and_then_and_while_checks_fail() -> None:
    """A kept connection says nothing of who listens now."""

    async def scene(bench: Bench) -> None:
        bench.add(E, 200)
        await asyncio.sleep(70.0)  # the first pause is shorter than the others
        assert [fresh for *_, fresh in bench.pool.asked] == [True, False, False, False, True, False, False, True]
        bench.pool.asked.clear()
        bench.pool.script[E] = CLOSED
        await asyncio.sleep(20.0)
        assert [fresh for *_, fresh in bench.pool.asked][1:] == [True] * (len(bench.pool.asked) - 1)

    play(scene)


# -- what is told ------------------------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and error of each line about checks."""
    found = []
    for record in caplog.records:
        fields: dict[str, str] = record.__dict__["fields"]
        assert fields["worker"].startswith("http")
        found.append((record.levelname, fields.get("error", "")))
    return found


@pytest.mark.parametrize("answer", [REFUSED, TLS, NO_NAME, 404, 503], ids=str)
def test_case_13_the_first_failed_check_is_warned_of_then_each_minute(
    caplog: pytest.LogCaptureFixture, answer: Answer
) -> None:
    """Not one line was logged of a worker that never got healthy."""
    caplog.set_level("INFO", "sglang_router.health")

    async def scene(bench: Bench) -> None:
        bench.add(E, answer)
        await asyncio.sleep(0.5)
        said = f"GET /health answered {answer}" if isinstance(answer, int) else answer[1]
        assert told(caplog) == [("WARNING", said)]
        await asyncio.sleep(299.0)
        assert 4 <= len(told(caplog)) <= 5
        assert set(told(caplog)) == {("WARNING", said)}

    play(scene)


def test_case_13_another_reason_is_told_soon_and_the_end_of_trouble_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sglang_router.health")

    async def scene(bench: Bench) -> None:
        worker = bench.add(E, REFUSED)
        await asyncio.sleep(10.0)
        bench.pool.script[E] = 404
        await asyncio.sleep(10.0)
        assert told(caplog) == [("WARNING", REFUSED[1]), ("WARNING", "GET /health answered 404")]
        bench.pool.script[E] = 200
        await asyncio.sleep(20.0)
        assert len(told(caplog)) == 2, "the line of the change of health says it"
        bench.pool.script[E] = CLOSED
        bench.checks.check_now(worker)
        await asyncio.sleep(0.1)
        bench.pool.script[E] = 200
        await asyncio.sleep(20.0)
        assert worker.health is Health.HEALTHY
        assert told(caplog)[2:] == [("WARNING", CLOSED[1]), ("INFO", "")]

    play(scene)


def test_case_13_reasons_that_take_turns_are_told_once_a_minute_each(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(bench: Bench) -> None:
        worker = bench.add(E, REFUSED)
        for number in range(120):
            bench.pool.script[E] = REFUSED if number % 2 else 503
            bench.checks.check_now(worker)
            await asyncio.sleep(5.0)
        assert 16 <= len(told(caplog)) <= 22
        assert {error for _, error in told(caplog)} == {REFUSED[1], "GET /health answered 503"}

    play(scene)


def test_case_13_a_replica_that_starts_is_told_by_its_launcher(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(bench: Bench) -> None:
        bench.add(E, REFUSED, source=Source.REPLICAS)
        await asyncio.sleep(100.0)
        assert told(caplog) == []

    play(scene)


def test_case_13_a_key_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(bench: Bench) -> None:
        worker = bench.add(E, (Outcome.INVALID, "What is 's3cret'?"), api_key="s3cret")
        await asyncio.sleep(1.0)
        assert told(caplog) == [("WARNING", "What is '***'?")]
        assert worker.reason == "What is '***'?"
        assert "s3cret" not in str(bench.fleet.unavailable(bench.now()))

    play(scene)


@pytest.mark.parametrize(
    ("url", "status", "slip"),
    [
        (f"{E}/v1", 404, "/v1"),
        (f"{E}/v1", 401, "/v1"),
        (f"{E}/v1", 405, "/v1"),
        (f"{E}/llm/v1", 404, "/v1"),
        (f"{E}/v1/chat/completions", 404, "/v1/chat/completions"),
        (f"{E}/generate", 404, "/generate"),
        (f"{E}/v1", 503, None),
        (f"{E}/engines/v10", 404, None),
        (f"{E}/v1-models", 404, None),
        (E, 404, None),
    ],
)
def test_case_13_the_path_of_an_endpoint_in_a_base_url_is_named(url: str, status: int, slip: str | None) -> None:
    """`--worker-urls http://HOST:PORT/v1` looked like any other dead worker."""

    async def scene(bench: Bench) -> None:
        worker = bench.add(url, status)
        await asyncio.sleep(0.1)
        wanted = f"GET /health answered {status}"
        if slip:
            mistake = f"worker URLs are base URLs; remove {slip} at the end of this one"
            wanted = f"GET {slip}/health answered {status}: {mistake}"
        assert worker.reason == wanted

    play(scene)


# -- who waits for them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "checks"),
    [(TLS, 1), (NO_NAME, 1), (NO_HTTP, 1), (404, 1), (401, 1), (301, 1), (REFUSED, 2), (CLOSED, 2)],
    ids=str,
)
def test_case_14_nobody_waits_for_what_waiting_does_not_heal(answer: Answer, checks: int) -> None:
    """A request waited for ten seconds for a worker that could not come, and was not told why."""

    async def scene(bench: Bench) -> None:
        bench.add(E, answer)
        assert isinstance(bench.fleet.unavailable(bench.now()), WorkersStarting), "not checked yet"
        await asyncio.sleep(0.5 + (checks - 1) * 1.0)
        assert len(bench.pool.asked) == checks
        error = bench.fleet.unavailable(bench.now())
        assert (type(error), error.status, error.retry_after) == (Unavailable, 503, 5.0)
        said = f"GET /health answered {answer}" if isinstance(answer, int) else answer[1].rstrip(".")
        assert str(error) == f"{Unavailable.message} Reasons: {said} (1 of 1)."

    play(scene)


@pytest.mark.parametrize("answer", [503, 500, 429, SILENT], ids=str)
def test_case_14_an_engine_that_says_that_it_starts_is_waited_for(answer: Answer) -> None:
    async def scene(bench: Bench) -> None:
        bench.add(E, answer)
        bench.add("http://10.0.0.8", 404)
        await asyncio.sleep(60.0)
        error = bench.fleet.unavailable(bench.now())
        assert isinstance(error, WorkersStarting)
        assert "GET /health answered 404 (1 of 2)" in str(error)

    play(scene)


def test_case_14_a_worker_that_comes_after_all_is_waited_for_again() -> None:
    async def scene(bench: Bench) -> None:
        worker = bench.add(E, REFUSED)
        await asyncio.sleep(5.0)
        assert worker.hopeless
        bench.pool.script[E] = 503
        await asyncio.sleep(2.0)
        assert isinstance(bench.fleet.unavailable(bench.now()), WorkersStarting)
        bench.pool.script[E] = 200
        await asyncio.sleep(2.0)
        assert bench.fleet.candidates(bench.now()) == (worker,)

    play(scene)


def test_case_14_many_reasons_are_summed_up() -> None:
    async def scene(bench: Bench) -> None:
        answers: list[Answer] = [REFUSED, REFUSED, TLS, 404, 401]
        for number, answer in enumerate(answers):
            bench.add(f"http://10.0.0.{number}", answer)
        await asyncio.sleep(3.0)
        text = str(bench.fleet.unavailable(bench.now()))
        assert "Reasons: The worker refuses connections (2 of 5); " in text
        assert text.count("(1 of 5)") == 2
        assert "10.0.0" not in text

    play(scene)
