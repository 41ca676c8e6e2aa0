"""Long answers of the control plane: made once for all who ask, and in slices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator

import pytest

from sglang_router.admin.ask import all_of
from sglang_router.admin.shared import Shared, in_slices


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Maker:
    """Makes 1, 2, 3 ...; each when the test lets it."""

    def __init__(self) -> None:
        self.made = 0
        self.let = asyncio.Event()
        self.cancelled = 0

    async def __call__(self) -> int:
        self.made += 1
        number = self.made
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if number == 3:
            raise ZeroDivisionError
        return number


def run(test: Callable[[Clock, Shared[int], Maker], Awaitable[None]]) -> None:
    async def scene() -> None:
        clock = Clock()
        await test(clock, Shared(clock, 1.0), Maker())

    asyncio.run(scene())


async def begun(work: Coroutine[object, object, int]) -> asyncio.Task[int]:
    task = asyncio.ensure_future(work)
    for _ in range(3):
        await asyncio.sleep(0)
    return task


def test_f13_a_result_is_made_at_most_once_a_second_for_all_who_ask() -> None:
    """Two strangers who scraped in a loop made the exposition again and again: 116 ms each on the relaying loop."""

    async def test(clock: Clock, shared: Shared[int], make: Maker) -> None:
        waiting = [await begun(shared.get("text", make)) for _ in range(5)]
        make.let.set()
        assert [await each for each in waiting] == [1] * 5
        clock.now = 0.999
        assert await shared.get("text", make) == 1
        assert await shared.get("openmetrics", make) == 2
        clock.now = 1.0
        with pytest.raises(ZeroDivisionError):
            await shared.get("text", make)
        assert await shared.get("text", make) == 4, "a failure is not kept"
        assert make.made == 4

    run(test)


def test_one_that_takes_long_is_not_made_twice_at_a_time() -> None:
    async def test(clock: Clock, shared: Shared[int], make: Maker) -> None:
        first = await begun(shared.get("", make))
        clock.now = 5.0
        second = await begun(shared.get("", make))
        make.let.set()
        assert (await first, await second, make.made) == (1, 1, 1)

    run(test)


def test_a_client_that_leaves_takes_nothing_from_the_others_and_the_last_one_ends_the_work() -> None:
    async def test(clock: Clock, shared: Shared[int], make: Maker) -> None:
        one, two = await begun(shared.get("", make)), await begun(shared.get("", make))
        one.cancel()
        await asyncio.gather(one, return_exceptions=True)
        assert (make.cancelled, two.done()) == (0, False)
        two.cancel()
        await asyncio.gather(two, return_exceptions=True)
        await asyncio.sleep(0)
        assert make.cancelled == 1
        make.let.set()
        assert await shared.get("", make) == 2

    run(test)


def test_other_work_has_its_turn_after_each_millisecond() -> None:
    def pieces() -> Iterator[int]:
        for number in range(20):
            until = time.perf_counter() + 0.0006
            while time.perf_counter() < until:
                pass
            yield number

    async def scene() -> None:
        work = asyncio.ensure_future(in_slices(pieces()))
        turns = 0
        while not work.done():
            await asyncio.sleep(0)
            turns += 1
        assert work.result() == list(range(20))
        assert turns >= 9

    asyncio.run(scene())


def test_a_thousand_questions_do_not_begin_in_one_turn() -> None:
    begun_by_turn: list[int] = []

    async def question(number: int) -> int:
        begun_by_turn[-1] += 1
        return number

    async def scene() -> None:
        work = asyncio.ensure_future(all_of(question(n) for n in range(100)))
        while not work.done():
            begun_by_turn.append(0)
            await asyncio.sleep(0)
        assert work.result() == list(range(100))
        assert max(begun_by_turn) <= 16

    asyncio.run(scene())
