"""The frames of the page, made by a `Live` whose clock and counters are played."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec

from fleets import Bench
from sglang_router.admin.decision_book import DecisionBook
from sglang_router.admin.figures import Totals
from sglang_router.admin.live import Counters, Frame, Live, ShadowState
from sglang_router.admin.worker_row import COLUMNS
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker


class RunEngines:
    """Runs all workers of a fleet."""

    def __init__(self) -> None:
        self.rolling = {"state": "running", "done": 1, "total": 2}

    def describe(self, worker: Worker) -> dict[str, Any]:
        return {"restarts": 3, "reason": ""}


class Explained:
    """An autoscaler that has decided often; the newest first."""

    def explain(self) -> dict[str, Any]:
        return {"desired": 4, "decisions": [{"desired": number} for number in range(100)]}


class Played:
    """What a `Live` reads. now: of its clock; wall: seconds since 1970 at 0 of the clock."""

    def __init__(self, workers: int = 2) -> None:
        self.bench = Bench(workers, "cache_aware")
        self.fleet = self.bench.fleet
        self.now, self.wall = 100.0, 1e9
        self.replicas: Any = None
        self.autoscaler: Any = None
        self.decisions: DecisionBook | None = None
        self.ending = False
        self.counted = Totals([0, 0])
        counters = Counters(
            totals=self.totals,
            bounds=[1.0],
            queued=lambda: 7,
            running=lambda: 8,
            shadow=lambda: ShadowState("random", 1, 2, 3, 4),
            shared=lambda: None,
        )
        self.live = Live(self, counters, "cache_aware", lambda: self.wall + self.now)

    def clock(self) -> float:
        return self.now

    def totals(self) -> Iterator[Totals | None]:
        yield None
        yield msgspec.structs.replace(self.counted, first_byte=[*self.counted.first_byte])

    def frame(self, seen: int = 0) -> Frame:
        """Assemble the next frame, for a viewer who has seen one."""
        return asyncio.run(self._frame(seen))

    async def _frame(self, seen: int) -> Frame:
        await self.live._assemble()
        return msgspec.json.decode(await self.live._encode(self.live._number, seen), type=Frame)


def test_a_frame_says_of_when_and_of_what_it_is() -> None:
    played = Played()
    played.bench.workers[0].health = Health.UNHEALTHY
    played.now += 61.26
    frame = played.frame()
    assert (frame.frame, frame.whole, frame.at, frame.uptime) == (1, True, 1e9 + 161.3, 61.3)
    assert (frame.policy, frame.columns, frame.recorded) == ("cache_aware", COLUMNS, False)
    assert frame.shadow == ShadowState("random", 1, 2, 3, 4)
    assert (frame.scale, frame.shared, frame.rolling, frame.decisions) == (None, None, None, [])
    now = frame.now
    assert (now.at, now.healthy, now.workers, now.queued, now.running) == (1e9 + 161.3, 1, 2, 7, 8)
    assert {row.url for row in frame.rows} == {worker.url for worker in played.fleet}
    assert {row.since for row in frame.rows} == {1e9 + worker.since for worker in played.fleet}


def test_figures_are_of_the_last_ten_seconds() -> None:
    played = Played()
    rates = []
    for second in range(20):
        if second <= 5:
            played.counted.requests += 10
            played.counted.first_byte[0] += 10
        played.now += 1.0
        now = played.frame().now
        rates.append((now.requests, now.ttft_p50))
    assert rates[5] == (10.0, 0.5)
    assert rates[12][0] == 3.0
    assert rates[-1] == (0.0, None)


def test_engines_that_the_router_runs_and_scaling_are_told() -> None:
    played = Played(1)
    played.replicas, played.autoscaler = RunEngines(), Explained()
    frame = played.frame()
    assert frame.rolling == {"state": "running", "done": 1, "total": 2}
    assert [(row.restarts, row.managed) for row in frame.rows] == [(3, True)]
    assert frame.scale == {"desired": 4, "decisions": [{"desired": number} for number in range(20)]}


def test_a_viewer_gets_what_changed_since_its_frame() -> None:
    played = Played()
    first = played.frame()
    played.fleet.set_draining(played.bench.workers[1], True)
    gone = played.bench.workers[0]
    played.fleet.remove(gone)
    second = played.frame(first.frame)
    assert not second.whole
    assert [row.id for row in second.rows] == [played.bench.workers[1].id]
    assert second.gone == [gone.id]
    assert second.decisions is None
    third = played.frame(second.frame)
    assert (third.rows, third.gone, third.events) == ([], [], [])


def test_a_point_of_the_curves_is_of_ten_seconds() -> None:
    played = Played()
    assert played.live.sample() == 10.0  # seconds until the next one
    played.counted.requests, played.now = 20, played.now + 10.0
    assert played.live.sample() == 10.0
    (point,) = played.frame().points
    assert (point.at, point.requests, point.queued) == (1e9 + 110.0, 2.0, 7)
