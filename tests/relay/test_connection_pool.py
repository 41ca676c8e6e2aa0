"""The pool over real sockets: which connections are kept, for which target, for how long; and what its `repr` shows."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import uvloop

from fake_worker import CLOSE, HANG, FakeWorker, Gate, answer
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.upstream import Opening, UpstreamConnection
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.workers.fetch import Collector, Fetched, FetchError

HEAD = b"GET /health HTTP/1.1\r\nhost: w\r\n\r\n"
HEALTH = "GET /health"


class Bench:
    """A fake worker and a pool that knows it as `target`."""

    def __init__(self, fake: FakeWorker, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        self.fake = fake
        self.pool = ConnectionPool(
            loop, Batch(loop), **{"connect_timeout": 10.0, "idle_timeout": 50.0, "max_idle": 8, "tls": None, **settings}
        )
        self.target = Target(fake.url, key=b"old", name="w0")
        self.pool.know(self.target)

    def send(self, target: Target | None = None, *, fresh: bool = False) -> Collector:
        collector = Collector(asyncio.get_running_loop().create_future(), 1 << 20)
        collector.connection = self.pool.send(target or self.target, collector, HEAD, b"", fresh=fresh)
        return collector

    async def ask(self, target: Target | None = None, *, fresh: bool = False) -> UpstreamConnection | Opening | None:
        """Send one request; return the connection that carried it."""
        collector = self.send(target, fresh=fresh)
        answered: Fetched = await asyncio.wait_for(collector.answer, 10.0)
        assert answered.ok
        return collector.connection

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let the loop run until the condition holds: closing a socket triggers no event."""

        async def turning() -> None:
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0)

        await asyncio.wait_for(turning(), 10.0)


class Refusing:
    """An event loop on which each connection is refused; `before` is called just before that."""

    def __init__(self, loop: asyncio.AbstractEventLoop, before: Callable[[], object]) -> None:
        self._loop = loop
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def create_connection(self, *_: object, **__: object) -> None:
        self._before()
        raise ConnectionRefusedError


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run a scene on either event loop; the connection has none of their base classes."""

    def run(scene: Callable[[Bench], Awaitable[None]], script: Any = None, **settings: Any) -> None:
        async def whole() -> None:
            fake = FakeWorker(script)
            await fake.start()
            bench = Bench(fake, **settings)
            try:
                await scene(bench)
            finally:
                await bench.pool.close()
                await fake.stop()
                await bench.until(lambda: not bench.pool.open)

        request.param(whole())

    return run


Play = Callable[..., None]


def test_an_idle_connection_carries_the_next_request(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        first = await bench.ask()
        assert repr(first) == "<UpstreamConnection w0 idle>"
        assert await bench.ask() is first
        assert repr(bench.pool) == "<ConnectionPool 1 open, 1 idle, 0 opening, 1 targets>"

    play(scene)


def test_equal_targets_share_connections_and_others_do_not(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        first = await bench.ask()
        assert await bench.ask(Target(bench.fake.url, key=b"old", name="w0")) is first
        other = bench.target._replace(worker_id="another registration")
        bench.pool.know(other)
        assert await bench.ask(other) is not first

    play(scene)


def test_connections_of_an_unknown_target_are_not_kept(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        await bench.ask(Target(bench.fake.url))
        await bench.fake.hung_up()
        await bench.until(lambda: bench.pool.open == 0)

    play(scene)


def test_forgetting_closes_idle_connections_and_busy_ones_after_their_answer(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        gate = Gate(answer(200))
        idle = await bench.ask()
        bench.fake.script[HEALTH] = gate
        busy = bench.send(fresh=True)
        await bench.fake.asked(HEALTH, 2)
        bench.pool.forget(bench.target)
        await bench.until(lambda: repr(idle) == "<UpstreamConnection w0 closed>")
        assert repr(busy.connection) == "<UpstreamConnection w0 sent>"
        gate.open.set()
        assert (await asyncio.wait_for(busy.answer, 10.0)).ok
        await bench.fake.hung_up()

    play(scene)


def test_a_worker_with_a_new_key_keeps_its_connections(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        gate = bench.fake.script[HEALTH] = Gate(answer(200))
        busy = bench.send()
        await bench.fake.asked(HEALTH)
        renewed = bench.target._replace(key=b"new")
        bench.pool.move(bench.target, renewed)
        gate.open.set()
        await asyncio.wait_for(busy.answer, 10.0)
        assert await bench.ask(renewed) is busy.connection
        assert await bench.ask(bench.target) is not busy.connection  # the old name is not known any more

    play(scene)


def test_no_more_idle_connections_than_allowed(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        gate = bench.fake.script[HEALTH] = Gate(answer(200))
        asked = [bench.send() for _ in range(3)]
        await bench.fake.asked(HEALTH, 3)
        gate.open.set()
        await asyncio.gather(*(collector.answer for collector in asked))
        await bench.until(lambda: bench.pool.open == 2)

    play(scene, max_idle=2)


def test_connections_that_idle_too_long_are_closed(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        await bench.ask()
        bench.pool.trim()
        await bench.fake.hung_up()

    play(scene, idle_timeout=-1.0)


def test_connections_within_the_time_stay(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        first = await bench.ask()
        bench.pool.trim()
        assert await bench.ask() is first

    play(scene)


def test_a_fresh_connection_is_a_new_one(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        first = await bench.ask()
        assert await bench.ask(fresh=True) is not first
        assert bench.pool.open == 2

    play(scene)


def test_case_13_fresh_connections_do_not_pile_up(play: Play) -> None:
    """Each check of a worker that loads its model left an idle connection: 20 such workers held 550 of them."""

    async def scene(bench: Bench) -> None:
        for _ in range(20):
            await bench.ask(fresh=True)
        assert len(bench.pool.at(bench.target).idle) == 2

    play(scene)


def test_bytes_that_nobody_asked_for_end_an_idle_connection(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        first = await bench.ask()
        assert isinstance(first, UpstreamConnection)
        first.data_received(b"HTTP/1.1 200 OK\r\n")
        assert await bench.ask() is not first
        await bench.until(lambda: bench.pool.open == 1)

    play(scene)


def test_an_opening_can_be_given_up(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        collector = bench.send()
        opening = collector.connection
        assert repr(opening) == "<Opening>"
        assert "1 opening" in repr(bench.pool)
        assert opening is not None
        opening.abort()
        assert repr(opening) == "<Opening given up>"
        await bench.until(lambda: "0 opening" in repr(bench.pool))
        assert not collector.answer.done()
        assert bench.fake.seen == []

    play(scene)


def test_an_opening_that_fails_while_it_is_given_up_tells_nobody(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        loop = asyncio.get_running_loop()

        def give_up() -> None:
            assert again.connection is not None
            again.connection.abort()

        # The failure is known by then, but not heard yet.
        refusing = cast("asyncio.AbstractEventLoop", Refusing(loop, lambda: loop.call_soon(give_up)))
        bench.pool = ConnectionPool(
            refusing, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None
        )
        again = bench.send(fresh=True)
        assert isinstance(again.connection, Opening)
        await bench.until(lambda: "0 opening" in repr(bench.pool))
        assert repr(again.connection) == "<Opening given up>"
        assert not again.answer.done()

    play(scene)


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [(CLOSE, Outcome.BROKEN), (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab", Outcome.CUT)],
)
def test_what_a_sink_hears_of_a_broken_answer(play: Play, reply: bytes, outcome: Outcome) -> None:
    async def scene(bench: Bench) -> None:
        collector = bench.send()
        await bench.fake.asked(HEALTH)
        if outcome is Outcome.CUT:
            assert isinstance(collector.connection, UpstreamConnection)
            await bench.until(lambda: "answering" in repr(collector.connection))
            await bench.fake.stop()
        with pytest.raises(FetchError) as caught:
            await asyncio.wait_for(collector.answer, 10.0)
        assert caught.value.outcome is outcome

    play(scene, {HEALTH: reply})


def test_a_kept_connection_that_was_closed_is_stale(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        await bench.ask()
        bench.fake.script[HEALTH] = CLOSE
        with pytest.raises(FetchError) as caught:
            await bench.ask()
        assert caught.value.outcome is Outcome.STALE

    play(scene)


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH])
def test_case_8_a_kept_connection_whose_machine_vanished_is_not_stale(play: Play, number: int) -> None:
    """The request would be sent to the same machine again, and wait there once more."""

    async def scene(bench: Bench) -> None:
        await bench.ask()
        bench.fake.script[HEALTH] = HANG
        collector = bench.send()
        await bench.fake.asked(HEALTH, 2)
        assert isinstance(collector.connection, UpstreamConnection)
        collector.connection.connection_lost(OSError(number, "as the system says it"))
        with pytest.raises(FetchError, match="machine does not answer") as caught:
            await collector.answer
        assert caught.value.outcome is Outcome.BROKEN
        bench.pool.open += 1  # the real end of the connection is counted too
        collector.connection.transport.abort()

    play(scene)


def test_nobody_listens(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        await bench.fake.stop()
        with pytest.raises(FetchError, match="refuses connections") as caught:
            await bench.ask(fresh=True)
        assert caught.value.outcome is Outcome.REFUSED

    play(scene)


def test_a_name_that_does_not_exist(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        with pytest.raises(FetchError, match="could not be reached") as caught:
            await bench.ask(Target("http://no-such-host.invalid:1"))
        assert caught.value.outcome is Outcome.UNREACHABLE

    play(scene)


def test_closing_the_pool_leaves_a_busy_connection_to_its_request(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        busy = bench.send()
        await bench.fake.asked(HEALTH)
        await bench.pool.close()
        assert bench.pool.open == 1
        assert isinstance(busy.connection, UpstreamConnection)
        busy.connection.abort()
        await bench.until(lambda: bench.pool.open == 0)

    play(scene, {HEALTH: HANG})


def test_a_closed_pool_opens_no_connection(play: Play) -> None:
    """A task that was made at the very end of the router was never run, and said so in the log."""

    async def scene(bench: Bench) -> None:
        await bench.pool.close()
        before = asyncio.all_tasks()
        late = bench.send()
        assert asyncio.all_tasks() == before
        with pytest.raises(FetchError, match="router ends"):
            await asyncio.wait_for(late.answer, 10.0)

    play(scene)
