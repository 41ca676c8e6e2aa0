"""Addresses of names: shared look-ups, addresses that stay while look-ups fail or hang, pauses, names that move."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from sglang_router.relay.addresses import Addresses
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.upstream import UpstreamConnection
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Target
from sglang_router.workers.fetch import Collector, FetchError, fetch

PATIENCE = 10.0


class Resolver:
    """A resolver that follows a script, in the threads that call it.

    found  addresses by name; a name that is missing does not exist
    hangs  names whose look-up does not end before `go_on`
    asked  look-ups by name
    """

    def __init__(self, **found: Sequence[str]) -> None:
        self.found: dict[str, Sequence[str]] = dict(found)
        self.hangs: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.at_once: Counter[str] = Counter()
        self.go_on = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Sequence[str]:
        with self._lock:
            self.asked[name] += 1
            self.at_once[name] += 1
        try:
            if name in self.hangs:
                self.go_on.wait(PATIENCE)
            if name not in self.found:
                raise OSError(-2, "Name or service not known")
            return self.found[name]
        finally:
            with self._lock:
                self.at_once[name] -= 1


class Later:
    """An event loop whose clock a test can put forward. silent: an address where nothing answers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.ahead = 0.0
        self.silent = ""

    async def create_connection(self, make: Any, address: str, *arguments: Any, **more: Any) -> Any:
        if address == self.silent:
            await asyncio.sleep(PATIENCE * 10)
        return await self._loop.create_connection(make, address, *arguments, **more)

    def time(self) -> float:
        return self._loop.time() + self.ahead

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


class Bench:
    """Addresses, found by a fake resolver, and a clock to put forward."""

    def __init__(self, resolver: Resolver) -> None:
        self.resolver = resolver
        self.loop = Later(asyncio.get_running_loop())
        self.addresses = Addresses(self.loop, resolver)  # type: ignore[arg-type]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let the loop run until a condition holds: threads change it."""

        async def turning() -> None:
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

        await asyncio.wait_for(turning(), PATIENCE)

    async def of(self, name: str) -> tuple[str, ...]:
        return await asyncio.wait_for(self.addresses.of(name), PATIENCE)

    async def looked_up(self, name: str, times: int) -> None:
        """Wait until that many look-ups of a name, the only one, have ended."""
        await self.until(lambda: self.resolver.asked[name] == times and not self.looking)

    @property
    def looking(self) -> bool:
        """Whether a look-up is in progress."""
        return "0 look-ups" not in repr(self.addresses)


def run(resolver: Resolver, scene: Callable[[Bench], Awaitable[None]]) -> None:
    async def whole() -> None:
        try:
            await scene(Bench(resolver))
        finally:
            resolver.go_on.set()

    asyncio.run(whole())


def test_case_6_all_who_ask_share_one_look_up() -> None:
    """Every new connection looked its name up, also while another look-up of the name was in progress."""
    resolver = Resolver(engine=["10.0.0.7"])
    resolver.hangs.add("engine")

    async def scene(bench: Bench) -> None:
        asking = [asyncio.ensure_future(bench.of("engine")) for _ in range(50)]
        await bench.until(lambda: resolver.asked["engine"] == 1)
        resolver.go_on.set()
        assert set(await asyncio.gather(*asking)) == {("10.0.0.7",)}
        assert await bench.of("engine") == ("10.0.0.7",)
        assert resolver.asked["engine"] == 1

    run(resolver, scene)


def test_case_6_who_stops_waiting_holds_nothing_and_stops_nobody_else() -> None:
    """A cancelled request must not cancel the look-up that others wait for."""
    resolver = Resolver(engine=["10.0.0.7"])
    resolver.hangs.add("engine")

    async def scene(bench: Bench) -> None:
        leaves, stays = (asyncio.ensure_future(bench.of("engine")) for _ in range(2))
        await bench.until(lambda: resolver.asked["engine"] == 1)
        leaves.cancel()
        assert isinstance((await asyncio.gather(leaves, return_exceptions=True))[0], asyncio.CancelledError)
        resolver.go_on.set()
        assert await stays == ("10.0.0.7",)

    run(resolver, scene)


@pytest.mark.parametrize("dead", [40, 200])
def test_case_6_names_that_hang_do_not_hold_up_others(dead: int) -> None:
    """Four look-ups that hung kept all other names from being looked up."""
    resolver = Resolver(good=["10.0.0.1"])
    names = [f"dead{number}" for number in range(dead)]
    resolver.hangs.update(names)
    before = threading.active_count()  # of other tests, which may have left some

    async def scene(bench: Bench) -> None:
        assert await bench.of("good") == ("10.0.0.1",)
        hanging = [asyncio.ensure_future(bench.of(name)) for name in names]
        await bench.until(lambda: sum(resolver.at_once.values()) == min(dead, 128))
        bench.loop.ahead += 60.0  # good's addresses are old, and its look-up may have no thread
        for _ in range(3):
            assert await bench.of("good") == ("10.0.0.1",)
        if dead < 128:  # names that were never found get a thread as well
            resolver.found["new"] = ["10.0.0.2"]
            assert await bench.of("new") == ("10.0.0.2",)
        assert max(resolver.at_once.values()) == 1
        assert threading.active_count() - before < 128 + 20
        for each in hanging:
            each.cancel()

    run(resolver, scene)


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_case_6_the_last_good_addresses_are_used_meanwhile(how: str) -> None:
    """A resolver that stopped to answer took healthy engines down."""
    resolver = Resolver(engine=["10.0.0.7"])

    async def scene(bench: Bench) -> None:
        assert await bench.of("engine") == ("10.0.0.7",)
        if how == "hangs":
            resolver.hangs.add("engine")
        else:
            del resolver.found["engine"]
        for look in range(2, 5):
            bench.loop.ahead += 100.0
            assert await bench.of("engine") == ("10.0.0.7",)
            await bench.until(lambda want=look: resolver.asked["engine"] == (2 if how == "hangs" else want))  # type: ignore[misc]
            if how == "fails":
                await bench.looked_up("engine", look)
        resolver.found["engine"] = ["10.0.0.8"]
        resolver.go_on.set()
        await bench.until(lambda: not bench.looking)
        bench.loop.ahead += 100.0
        await bench.of("engine")
        await bench.until(lambda: not bench.looking)
        assert await bench.of("engine") == ("10.0.0.8",)

    run(resolver, scene)


def test_f16_failed_look_ups_back_off() -> None:
    """A name that does not exist was looked up for every check of its worker."""
    resolver = Resolver()

    async def scene(bench: Bench) -> None:
        for _ in range(1200):  # ten minutes, asked twice a second
            with pytest.raises(OSError, match="the look-up of its name failed: Name or service not known"):
                await bench.of("nobody")
            bench.loop.ahead += 0.5
        assert 16 <= resolver.asked["nobody"] <= 34
        resolver.found["nobody"] = ["10.0.0.7"]
        bench.loop.ahead += 36.0  # the longest pause, 30 s, and a fifth of it
        assert await bench.of("nobody") == ("10.0.0.7",)

    run(resolver, scene)


def test_f16_addresses_that_take_no_connection_are_looked_up_again_soon_but_not_always() -> None:
    resolver = Resolver(engine=["10.0.0.7"])

    async def scene(bench: Bench) -> None:
        await bench.of("engine")
        for _ in range(1200):
            bench.loop.ahead += 0.5
            bench.addresses.doubted("engine")
            await bench.until(lambda: not bench.looking)
        assert 16 <= resolver.asked["engine"] <= 40
        resolver.asked.clear()
        bench.addresses.worked("engine", "10.0.0.7")
        await bench.until(lambda: not bench.looking)
        resolver.asked.clear()
        bench.loop.ahead += 1.0
        bench.addresses.doubted("engine")
        assert bench.looking
        await bench.looked_up("engine", 1)

    run(resolver, scene)


def test_the_address_that_worked_is_tried_first_whatever_the_order_of_answers() -> None:
    resolver = Resolver(engine=["10.0.0.7", "10.0.0.8"])

    async def scene(bench: Bench) -> None:
        assert await bench.of("engine") == ("10.0.0.7", "10.0.0.8")
        bench.addresses.worked("engine", "10.0.0.8")
        assert await bench.of("engine") == ("10.0.0.8", "10.0.0.7")
        resolver.found["engine"] = ["10.0.0.9", "10.0.0.8"]
        moved: list[tuple[str, frozenset[str]]] = []
        bench.addresses.on_moved = lambda name, gone: moved.append((name, gone))
        bench.loop.ahead += 60.0
        bench.addresses.refresh("engine")
        await bench.looked_up("engine", 2)
        assert await bench.of("engine") == ("10.0.0.8", "10.0.0.9")
        assert moved == [("engine", frozenset({"10.0.0.7"}))]

    run(resolver, scene)


def test_names_that_nobody_asks_for_are_forgotten() -> None:
    resolver = Resolver(**{f"n{number}": ["10.0.0.1"] for number in range(30)})

    async def scene(bench: Bench) -> None:
        for number in range(30):
            await bench.of(f"n{number}")
        assert "30 names" in repr(bench.addresses)
        bench.loop.ahead += 1000.0
        await bench.of("n1")
        bench.addresses.tidy()
        assert "1 names" in repr(bench.addresses)
        await bench.until(lambda: "0 look-ups" in repr(bench.addresses))

    run(resolver, scene)


def test_a_resolver_with_a_fault_is_a_failed_look_up() -> None:
    async def scene() -> None:
        def broken(name: str) -> Sequence[str]:
            raise ZeroDivisionError("by zero")

        with pytest.raises(OSError, match="ZeroDivisionError: by zero"):
            await Addresses(asyncio.get_running_loop(), broken).of("engine")

    asyncio.run(scene())


# -- connections -------------------------------------------------------------------------------------------------------


class Place:
    """A worker on one loopback address; it answers with its address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests = 0
        self.connections = 0
        self._server: asyncio.Server | None = None

    async def listen(self, port: int = 0) -> int:
        self._server = await asyncio.start_server(self._serve, self.address, port)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                body = self.address.encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.transport.abort()


class Named:
    """Workers at several loopback addresses with one port, and a pool that knows them by name."""

    def __init__(self, resolver: Resolver, port: int, **settings: float) -> None:
        loop = asyncio.get_running_loop()
        self.clock = Later(loop)
        self.resolver = resolver
        self.pool = ConnectionPool(
            self.clock,  # type: ignore[arg-type]
            Batch(loop),
            **{"connect_timeout": 5.0, "idle_timeout": 5000.0, **settings},
            max_idle=8,
            tls=None,
            addresses=Addresses(self.clock, resolver),  # type: ignore[arg-type]
        )
        self.target = Target(f"http://engine:{port}", name="w0")
        self.pool.know(self.target)

    async def ask(self) -> str:
        fetched = await fetch(self.pool, self.target, b"GET", b"/who", timeout=PATIENCE)
        return fetched.body.decode()

    async def until(self, holds: Callable[[], bool]) -> None:
        await Bench(self.resolver).until(holds)


def served(scene: Callable[[Named, dict[str, Place]], Awaitable[None]], *listening: str, **settings: float) -> None:
    """Run a scene with a name that has the addresses 127.0.0.2 and 127.0.0.3, of which `listening` take connections."""

    async def whole() -> None:
        places = {address: Place(address) for address in listening}
        port = 0
        for place in places.values():
            port = await place.listen(port)
        named = Named(Resolver(engine=["127.0.0.2", "127.0.0.3"]), port, **settings)
        try:
            await scene(named, places)
        finally:
            await named.pool.close()
            for place in places.values():
                place.close()
            await named.until(lambda: not named.pool.open)

    asyncio.run(whole())


ONE, OTHER = "127.0.0.2", "127.0.0.3"


def test_case_7_the_next_address_is_tried_when_one_refuses_and_then_used_first() -> None:
    async def scene(named: Named, places: dict[str, Place]) -> None:
        assert [await named.ask() for _ in range(3)] == [OTHER] * 3
        assert await named.pool.addresses.of("engine") == (OTHER, ONE)

    served(scene, OTHER)


def test_case_7_the_next_address_is_tried_when_one_does_not_answer() -> None:
    """An address behind which nothing is took the whole time for a connection."""

    async def scene(named: Named, places: dict[str, Place]) -> None:
        named.clock.silent = ONE
        assert [await named.ask() for _ in range(2)] == [OTHER] * 2
        assert places[OTHER].connections == 1
        assert await named.pool.addresses.of("engine") == (OTHER, ONE)

    served(scene, OTHER, connect_timeout=0.4)


def test_case_13_a_look_up_that_hangs_is_told_as_such() -> None:
    async def scene(named: Named, places: dict[str, Place]) -> None:
        named.resolver.hangs.add("engine")
        with pytest.raises(FetchError, match=r"The look-up of the worker's name takes longer than 0.05 s."):
            await fetch(named.pool, named.target, b"GET", b"/", timeout=0.05)
        with pytest.raises(FetchError, match=r"The look-up of the worker's name takes longer than 0.1 s.") as caught:
            await named.ask()
        assert caught.value.outcome is Outcome.UNCONNECTED
        named.resolver.go_on.set()

    served(scene, ONE, connect_timeout=0.1)


def test_case_7_all_addresses_refuse() -> None:
    async def scene(named: Named, places: dict[str, Place]) -> None:
        places[OTHER].close()
        with pytest.raises(FetchError, match="refuses connections") as caught:
            await named.ask()
        assert caught.value.outcome is Outcome.REFUSED

    served(scene, OTHER)


def test_case_7_a_name_that_moved_is_followed() -> None:
    """All requests went to the old address for as long as its connections lived."""

    async def scene(named: Named, places: dict[str, Place]) -> None:
        assert [await named.ask() for _ in range(3)] == [ONE] * 3
        assert places[ONE].connections == 1
        named.resolver.found["engine"] = [OTHER]
        named.clock.ahead += 30.0
        named.pool.refresh(named.target)
        await named.until(lambda: "0 idle" in repr(named.pool))
        assert [await named.ask() for _ in range(3)] == [OTHER] * 3

    served(scene, ONE, OTHER)


def test_case_7_a_busy_connection_to_an_address_that_is_gone_closes_after_its_answer() -> None:
    async def scene(named: Named, places: dict[str, Place]) -> None:
        loop = asyncio.get_running_loop()
        collector = Collector(loop.create_future(), 1 << 20)
        head = b"GET /who HTTP/1.1\r\nhost: w\r\n"
        collector.connection = named.pool.send(named.target, collector, head, b"")
        await named.until(lambda: isinstance(collector.connection, UpstreamConnection))
        named.pool.addresses.on_moved("engine", frozenset({ONE}))
        assert isinstance(collector.connection, UpstreamConnection)
        collector.connection.transport.write(b"\r\n")
        assert (await asyncio.wait_for(collector.answer, PATIENCE)).body == ONE.encode()
        await named.until(lambda: not named.pool.open)

    served(scene, ONE)


def test_case_7_a_connection_that_is_being_opened_while_the_name_moves_is_not_kept() -> None:
    """The look-up that finds the new address begins with the connection: a connection that took longer was kept."""

    async def scene(named: Named, places: dict[str, Place]) -> None:
        connect = named.clock.create_connection

        async def slowly(make: Any, address: str, *arguments: Any, **more: Any) -> Any:
            if address == ONE:
                named.resolver.found["engine"] = [OTHER]
                named.clock.ahead += 30.0
                named.pool.refresh(named.target)
                await named.until(lambda: "0 look-ups" in repr(named.pool.addresses))
            return await connect(make, address, *arguments, **more)

        named.clock.create_connection = slowly  # type: ignore[method-assign]
        assert [await named.ask() for _ in range(3)] == [ONE, OTHER, OTHER]
        assert (places[ONE].connections, places[OTHER].connections) == (1, 1)

    served(scene, ONE, OTHER)


def test_case_7_connections_have_a_greatest_age() -> None:
    """A connection that was never idle for long lived for ever."""

    async def scene(named: Named, places: dict[str, Place]) -> None:
        for _ in range(40):  # 400 s
            await named.ask()
            named.clock.ahead += 10.0
        assert 4 <= places[ONE].connections <= 6
        named.clock.ahead += 100.0
        named.pool.trim()  # an idle one that nobody uses
        await named.until(lambda: not named.pool.open)

    served(scene, ONE, max_age=100.0)
