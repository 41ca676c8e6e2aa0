"""When periodic work is done: the steps of an interval, and the alarm."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker
from sglang_router.workers.rhythm import Alarm, pause_to_step


@given(st.floats(0, 1e6), st.floats(0, 100), st.floats(0.1, 100))
def test_a_pause_is_made_longer_by_less_than_a_step(now: float, pause: float, interval: float) -> None:
    longer = pause_to_step(now, pause, interval) - pause
    assert -1e-6 <= longer <= interval / 40 + 1e-6


def test_a_thousand_workers_that_start_together_are_checked_in_groups_of_like_size() -> None:
    groups: Counter[float] = Counter()
    for order in range(1, 1001):
        worker = Worker(WorkerSpec(url="http://w"), "id", order, 0.0)
        groups[round(pause_to_step(50.0, 10.0 * worker.phase, 10.0), 6)] += 1
    assert (min(groups.values()), max(groups.values())) in [(24, 26), (25, 25), (24, 25), (25, 26)]
    assert len(groups) == 40


def rings(play: Callable[[Alarm, asyncio.AbstractEventLoop], Awaitable[None]]) -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        await play(Alarm(loop), loop)

    asyncio.run(scene())


def test_an_alarm_wakes_at_once_and_goes_on_ringing() -> None:
    async def play(alarm: Alarm, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon(alarm.set)
        await alarm.wait(1e6)
        assert alarm.ringing
        alarm.set()
        await alarm.wait(1e6)
        alarm.clear()
        assert not alarm.ringing

    rings(play)


def test_an_alarm_wakes_when_its_time_is_over() -> None:
    async def play(alarm: Alarm, loop: asyncio.AbstractEventLoop) -> None:
        await alarm.wait(0.001)
        assert not alarm.ringing

    rings(play)


def test_who_is_cancelled_while_waiting_is_not_waked_later() -> None:
    async def play(alarm: Alarm, loop: asyncio.AbstractEventLoop) -> None:
        waiting = loop.create_task(alarm.wait(1e6))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        alarm.set()
        assert alarm.ringing

    rings(play)
