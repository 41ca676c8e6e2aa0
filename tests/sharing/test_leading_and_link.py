"""Who leads, by its own clock; how the state of a store is told; how much of a stream is kept. All played."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest

from sglang_router.routing.shared.records import SharedTopic
from sglang_router.sharing.leading import HELD_FOR, Leader
from sglang_router.sharing.link import CONNECTED, CONNECTING, StoreLink
from sglang_router.sharing.reading import StoreReader, before
from sglang_router.sharing.store import START, Appended, LeaderHold, Position, StoreFailed, StreamEntry, Trouble
from sglang_router.sharing.traffic import Traffic
from sglang_router.sharing.writing import StoreWriter
from store_scenes import SmallCore, play, until

AWAY = StoreFailed(Trouble.UNREACHABLE, "it is away")
LOADS = SharedTopic.LOADS
FOREIGN = StoreFailed(Trouble.FOREIGN, "it holds something else")


class PlayedStore:
    """A store in memory.

    failure  raised by all that it is asked for; None: it works
    broken   streams that take nothing
    holder   who leads; "": nobody, and it is known that the one before gave it back; None: it is not known
    """

    def __init__(self) -> None:
        self.failure: StoreFailed | None = None
        self.broken: dict[str, StoreFailed] = {}
        self.holder: str | None = None
        self.asked = 0
        self.batches: list[Sequence[Appended]] = []

    def _fail(self) -> None:
        self.asked += 1
        if self.failure is not None:
            raise self.failure

    async def append(self, batch: Sequence[Appended]) -> list[Position | StoreFailed]:
        self._fail()
        self.batches.append([each for each in batch if each.stream not in self.broken])
        return [self.broken.get(each.stream, (len(self.batches), number)) for number, each in enumerate(batch)]

    async def follow(self, positions: Mapping[str, Position], most: int, wait: float) -> dict[str, list[StreamEntry]]:
        self._fail()
        return {}

    async def older(self, stream: str, newest: Position, most: int) -> list[StreamEntry]:
        self._fail()
        return []

    async def ends(self, streams: Sequence[str]) -> dict[str, Position]:
        self._fail()
        return dict.fromkeys(streams, START)

    async def shared_key(self, own: bytes) -> bytes:
        self._fail()
        return own

    async def tidy(self, kept: Mapping[str, tuple[float, float | None]]) -> None:
        self._fail()

    async def hold(self, holder: str, seconds: float) -> LeaderHold:
        self._fail()
        if self.holder:
            return LeaderHold.KEPT if self.holder == holder else LeaderHold.OTHER
        before, self.holder = self.holder, holder
        return LeaderHold.NEW if before is None else LeaderHold.PASSED_ON

    async def resign(self, holder: str) -> None:
        self._fail()
        self.holder = "" if self.holder == holder else self.holder

    async def close(self) -> None:
        """Nothing is open."""


class PlayedClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def looked(leader: Leader, store: PlayedStore) -> None:
    """Let a leader ask the store once."""
    asked = store.asked
    task = asyncio.ensure_future(leader.run())
    await until(lambda: store.asked > asked)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def leads(leader: Leader, store: PlayedStore, clock: PlayedClock) -> None:
    """Let a leader find nobody, and wait until it acts."""
    await looked(leader, store)
    assert not leader.leads
    clock.now += HELD_FOR - 1.5
    await looked(leader, store)
    clock.now += 1.5
    await looked(leader, store)
    assert leader.leads


def test_a_leader_stops_to_act_by_its_own_clock_before_another_one_can_begin() -> None:
    async def scene() -> None:
        store, clock = PlayedStore(), PlayedClock()
        leader, other = Leader(store, "a", clock), Leader(store, "b", clock)
        await leads(leader, store, clock)
        await looked(other, store)
        assert (leader.leads, other.leads) == (True, False)
        store.failure = AWAY
        clock.now += HELD_FOR - 1.5
        await looked(leader, store)  # it is not renewed
        assert (leader.leads, other.leads) == (True, False)
        clock.now += 1.0
        assert (leader.leads, other.leads) == (False, False)
        store.failure, store.holder = None, None  # as it expires in the store
        await leads(other, store, clock)
        await looked(leader, store)
        assert (leader.leads, other.leads) == (False, True)

    play(scene)


def test_who_resigns_does_not_act_any_more_and_another_one_may() -> None:
    async def scene() -> None:
        store, clock = PlayedStore(), PlayedClock()
        leader, other = Leader(store, "a", clock), Leader(store, "b", clock)
        await leads(leader, store, clock)
        await other.resign()
        assert store.holder == "a"  # it was not its own
        await leader.resign()
        assert (leader.leads, store.holder) == (False, "")
        await looked(other, store)
        assert other.leads  # at once
        store.failure = AWAY
        await leader.resign()  # a store that is away holds up nothing

    play(scene)


@pytest.mark.parametrize("reached", [True, False], ids=["reached", "cut off"])
def test_a_store_that_forgot_who_leads_never_has_two_that_act(reached: bool) -> None:
    """It was flushed, or evicts keys, or its replica knew less."""

    async def scene() -> None:
        store, clock = PlayedStore(), PlayedClock()
        leader, other = Leader(store, "a", clock), Leader(store, "b", clock)
        await leads(leader, store, clock)
        await looked(leader, store)
        store.holder = None
        acted = []
        for _ in range(40):
            await looked(other, store)
            if reached:
                await looked(leader, store)
            assert not (leader.leads and other.leads)
            acted.append(other.leads)
            clock.now += 0.5
        assert acted[-1]
        assert not acted[28]

    play(scene)


def test_a_leader_that_is_quicker_than_the_others_after_a_flush_goes_on() -> None:
    async def scene() -> None:
        store, clock = PlayedStore(), PlayedClock()
        leader, other = Leader(store, "a", clock), Leader(store, "b", clock)
        await leads(leader, store, clock)
        store.holder = None
        await looked(leader, store)
        await looked(other, store)
        assert (leader.leads, other.leads) == (True, False)

    play(scene)


def test_what_a_store_knew_before_a_failover_makes_nobody_act_at_once() -> None:
    async def scene() -> None:
        store, clock = PlayedStore(), PlayedClock()
        leader, other = Leader(store, "a", clock), Leader(store, "b", clock)
        await leads(leader, store, clock)
        clock.now += HELD_FOR
        store.holder = None
        await leads(other, store, clock)
        store.holder = "a"  # the replica's view, of before
        await looked(leader, store)
        assert (leader.leads, other.leads) == (False, True)
        await looked(other, store)
        assert not other.leads

    play(scene)


def test_what_keeps_a_router_from_leading_alone_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        store = PlayedStore()
        leader = Leader(store, "a", PlayedClock())
        for failure in (AWAY, FOREIGN, FOREIGN, AWAY):
            store.failure = failure
            await looked(leader, store)

    play(scene)
    assert [record.getMessage() for record in caplog.records] == [
        "it holds something else; this router cannot lead, so it does not scale"
    ]


# -- the link ----------------------------------------------------------------------------------------------------------


def test_a_change_is_one_line_and_both_sides_must_be_well(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        heard: list[str] = []
        link = StoreLink("redis://h", PlayedClock(), random.Random(1))
        link.heard = lambda: heard.append(link.state)
        link.reading.well()
        assert (link.state, link.connected) == (CONNECTING, False)
        link.writing.well()
        assert (link.state, link.connected) == (CONNECTED, True)
        full = StoreFailed(Trouble.FULL, "it is full")
        await link.writing.failed(full)
        await link.writing.failed(full)
        assert (link.state, link.problem, link.losses) == ("full", "it is full", 1)
        await link.reading.failed(AWAY)
        assert (link.state, link.losses) == ("unreachable", 1)
        link.reading.well()
        assert link.state == "full"
        link.writing.well()
        assert (link.state, link.problem) == (CONNECTED, "")
        assert heard == [CONNECTED, "full", "unreachable", "full", CONNECTED]

    caplog.set_level(logging.INFO)
    play(scene)
    assert [record.levelname for record in caplog.records] == ["INFO", *["WARNING"] * 4]
    assert "sharing again after" in caplog.text


# -- writing -----------------------------------------------------------------------------------------------------------


async def flushed(core: SmallCore, store: PlayedStore, traffic: Traffic, memory: int = 1 << 20) -> None:
    """Let a writer write what a core has to tell."""
    clock = PlayedClock()
    link = StoreLink("redis://h", clock, random.Random(1))
    task = asyncio.ensure_future(StoreWriter(store, core, link.writing, traffic, clock, memory).run())
    await until(lambda: bool(store.batches))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("size", "most"), [(436, 2097), (65_472, 256)])
def test_as_many_placements_stay_as_fit_into_their_memory(size: int, most: int) -> None:
    async def scene() -> None:
        core, store, traffic = SmallCore(), PlayedStore(), Traffic()
        traffic.read("placements", size, (1, 1), 0.0)
        core.tells = [(SharedTopic.PLACEMENTS, b"x" * size), (SharedTopic.LOADS, b"x"), (SharedTopic.ORDERS, b"x")]
        await flushed(core, store, traffic)
        assert {each.stream: each.most for each in store.batches[0]} == {
            "placements": most,
            "loads": 4096,
            "orders": 10_000,
        }
        assert store.batches[0][0].stream == "orders"  # what operators want comes first

    play(scene)


def test_orders_that_the_store_did_not_take_are_written_again_in_their_order() -> None:
    async def scene() -> None:
        core, store, traffic = SmallCore(), PlayedStore(), Traffic()
        store.failure = AWAY
        core.tells = [(SharedTopic.ORDERS, b"first"), (SharedTopic.PLACEMENTS, b"lost")]
        flushing = asyncio.ensure_future(flushed(core, store, traffic))
        await until(lambda: traffic.lost == {"placements": 1})
        store.failure = None
        core.tells = [(SharedTopic.ORDERS, b"second")]
        await flushing
        told = [each.payload for batch in store.batches for each in batch]
        assert told[:2] == [b"first", b"second"] or told == [b"first"]

    play(scene)


def test_the_position_before_another_one() -> None:
    assert before((5, 3)) == (5, 2)
    assert before((5, 0)) == (4, (1 << 64) - 1)


def test_orders_that_one_stream_took_are_not_repeated_because_another_one_takes_nothing() -> None:
    async def scene() -> None:
        store, core, clock = PlayedStore(), SmallCore(), PlayedClock()
        store.broken = {"loads": FOREIGN}
        link = StoreLink("the store", clock, random.Random(1))
        traffic = Traffic()
        writer = StoreWriter(store, core, link.writing, traffic, clock, 1 << 20)
        told = [(SharedTopic.LOADS, b"loads"), (SharedTopic.ORDERS, b"drain"), (SharedTopic.PLACEMENTS, b"placed")]
        task = asyncio.ensure_future(writer.run())
        core.tells = list(told)
        await until(lambda: len(store.batches) == 1)
        core.tells = list(told)
        await until(lambda: len(store.batches) == 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert [[each.stream for each in batch] for batch in store.batches] == [["orders", "placements"]] * 2
        assert (traffic.sent, traffic.lost) == ({"orders": 2, "placements": 2}, {"loads": 2})
        assert link.writing.failure is FOREIGN

    play(scene)


# -- the first look ----------------------------------------------------------------------------------------------------


class EndlessOrders(PlayedStore):
    """A store with far more orders than can be read in time."""

    def __init__(self, clock: PlayedClock) -> None:
        super().__init__()
        self._clock = clock
        self.followed: list[dict[str, Position]] = []

    async def ends(self, streams: Sequence[str]) -> dict[str, Position]:
        return dict.fromkeys(streams, (1 << 40, 0))

    async def follow(self, positions: Mapping[str, Position], most: int, wait: float) -> dict[str, list[StreamEntry]]:
        self.followed.append(dict(positions))
        self._clock.now += 0.1
        await asyncio.sleep(0)
        milliseconds, number = positions["orders"]
        return {"orders": [StreamEntry((milliseconds + 1, number), b"drain")]}


def test_more_orders_than_can_be_read_in_time_are_read_beside_all_that_comes() -> None:
    async def agree() -> bool:
        return False

    async def scene() -> None:
        clock = PlayedClock()
        store, link = EndlessOrders(clock), StoreLink("the store", clock, random.Random(1))
        reader = StoreReader(store, agree, SmallCore(), link.reading, Traffic(), clock)
        task = asyncio.ensure_future(reader.run())
        await until(lambda: reader.looked and len(store.followed[-1]) == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert reader.began.is_set()
        first = next(each for each in store.followed if len(each) == 3)
        before_it = store.followed[store.followed.index(first) - 1]
        assert first["orders"] == (before_it["orders"][0] + 1, 0)  # none was left out
        assert first["placements"] == (1 << 40, 0)

    play(scene)


# -- gaps --------------------------------------------------------------------------------------------------------------


class Passing(PlayedStore):
    """A store into which others write an entry of each stream in each second.

    answered  questions for what comes next of all streams
    stops     after so many of these this process stands still for a minute, before it reads the answer
    late      what that answer has of loads
    """

    def __init__(self, clock: PlayedClock, stops: int) -> None:
        super().__init__()
        self._clock = clock
        self._stops = stops
        self.answered = 0
        self.late = b""

    async def ends(self, streams: Sequence[str]) -> dict[str, Position]:
        self._fail()
        return dict.fromkeys(streams, (int(self._clock.now), 0))

    async def follow(self, positions: Mapping[str, Position], most: int, wait: float) -> dict[str, list[StreamEntry]]:
        self._fail()
        await asyncio.sleep(0)
        if len(positions) == 3:
            self.answered += 1
            self._clock.now += 1.0
            if self.answered == self._stops:
                self._clock.now += 60.0
                self.late = b"%d" % (positions["loads"][0] + 1)
        return {name: [StreamEntry((at + 1, 0), b"%d" % (at + 1))] for name, (at, _) in positions.items()}


@pytest.mark.parametrize("stops", [0, 5])
def test_after_a_gap_all_is_read_on_from_where_it_was_left_but_loads(stops: int) -> None:
    async def agree() -> bool:
        return False

    async def scene() -> None:
        clock = PlayedClock()
        store, core = Passing(clock, stops), SmallCore()
        reader = StoreReader(store, agree, core, StoreLink("it", clock, random.Random(1)).reading, Traffic(), clock)

        def jumps(topic: SharedTopic) -> list[int]:
            told = [int(payload) for payload in core.payloads(topic)]
            return [second - first for first, second in pairwise(told)]

        task = asyncio.ensure_future(reader.run())
        await until(lambda: store.answered > 5)
        if not stops:
            store.failure, asked = StoreFailed(Trouble.UNREACHABLE, "gone"), store.asked
            await until(lambda: store.asked > asked)
            clock.now += 60.0
            store.failure = None
        await until(lambda: max(jumps(LOADS), default=0) > 50)
        heard = len(core.payloads(LOADS))
        await until(lambda: len(core.payloads(LOADS)) > heard)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert set(jumps(SharedTopic.PLACEMENTS)) == set(jumps(SharedTopic.ORDERS)) == {1}  # each once, in its order
        assert not any(old for _, _, old in core.heard)
        assert sorted(jumps(LOADS))[-2] == 1
        assert store.late not in core.payloads(LOADS)

    play(scene)
