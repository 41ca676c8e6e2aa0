"""Replicas come and go as decided, and the one with the least useful cache goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from event_makers import leg, routed
from fleets import Bench, spec
from scaling_decisions import RULES, decision, until
from sglang_router.autoscale.replicas import ReplicaActuator
from sglang_router.errors import Conflict
from sglang_router.routing.events import Listener
from sglang_router.routing.worker import Worker


class Machine:
    """A runner with room for so many; a removal lasts until `done` is set. A replica is its worker's URL."""

    def __init__(self, bench: Bench, room: int) -> None:
        self.fleet = bench.fleet
        self.room = room
        self.own = {worker: worker.url for worker in bench.workers}
        self.why_not = ""
        self.done = asyncio.Event()
        self.removed: list[str] = []
        self.error: Exception | None = None

    def add_one(self) -> str | None:
        if len(self.own) >= self.room:
            self.why_not = "there are 2 GPUs, and replica 2 would need another one"
            return None
        worker = self.fleet.add(spec(f"new{len(self.fleet)}"), 0.0)
        self.own[worker] = worker.url
        return worker.url

    def replica_of(self, worker: Worker) -> str | None:
        return self.own.get(worker)

    async def remove(self, replica: str) -> None:
        if self.error is not None:
            raise self.error
        (worker,) = (worker for worker, url in self.own.items() if url == replica)
        self.fleet.set_draining(worker, True)
        self.removed.append(replica)
        await self.done.wait()
        self.fleet.remove(worker)
        del self.own[worker]


class Scene:
    def __init__(self, workers: int, room: int = 4, policy: str = "cache_aware") -> None:
        self.now = 0.0
        self.bench = Bench(workers, policy)
        self.workers = self.bench.workers
        self.machine = Machine(self.bench, room)
        loop = asyncio.get_running_loop()
        self.replicas = ReplicaActuator(loop, self.bench.fleet, self.machine, lambda: self.now, RULES)

    def hit(self, worker: Worker, matched: int) -> None:
        self.replicas.routed(routed(leg(worker, "hit", matched, matched)))

    def worth(self, worker: Worker) -> float:
        return self.replicas.worth(worker.id, self.now)

    def trees(self) -> list[int]:
        return [self.bench.pool.remembered(worker) for worker in self.workers]

    async def leaves(self) -> int:
        """Which of the workers is chosen when there is one too many."""
        before = len(self.machine.removed)
        self.replicas.scale(decision(len(self.workers) - 1, len(self.workers)))
        await until(lambda: len(self.machine.removed) > before)
        return [worker.url for worker in self.workers].index(self.machine.removed[-1])


def play(scene: Callable[[Any], Awaitable[None]], *args: Any, **named: Any) -> None:
    async def whole() -> None:
        stage = Scene(*args, **named)
        try:
            await scene(stage)
        finally:
            stage.machine.done.set()
            await stage.replicas.close()

    asyncio.run(whole())


# -- up ----------------------------------------------------------------------------------------------------


def test_as_many_are_added_as_are_missing() -> None:
    async def scene(stage: Scene) -> None:
        stage.replicas.scale(decision(3, 1))
        assert len(stage.bench.fleet) == 3
        stage.replicas.scale(decision(3, 3, changed=False))
        assert len(stage.bench.fleet) == 3
        assert stage.replicas.explain() == {"kind": "replicas", "replicas": 3, "leaving": None, "no_room": None}

    play(scene, 1)


def test_no_room_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(stage: Scene) -> None:
        for _ in range(5):
            stage.replicas.scale(decision(4, 2))
        assert len(stage.bench.fleet) == 2
        assert stage.replicas.explain()["no_room"] == "there are 2 GPUs, and replica 2 would need another one"
        assert len(caplog.records) == 1
        stage.machine.room = 3  # somebody else gave a GPU back
        stage.replicas.scale(decision(4, 2))
        assert len(stage.bench.fleet) == 3
        stage.replicas.scale(decision(3, 3))
        assert stage.replicas.explain()["no_room"] is None

    play(scene, 2, room=2)


def test_one_that_failed_is_replaced_within_the_most() -> None:
    async def scene(stage: Scene) -> None:
        for worker in stage.workers[:2]:
            stage.bench.fleet.down(worker, "gave up")
        stage.replicas.scale(decision(3, 1))
        assert len(stage.bench.fleet) == 4  # and not 5: two of them are failed
        stage.replicas.scale(decision(3, 2, changed=False))
        assert len(stage.bench.fleet) == 4

    play(scene, 3, room=9)


# -- down --------------------------------------------------------------------------------------------------


def test_the_least_used_cache_goes() -> None:
    async def scene(stage: Scene) -> None:
        for worker, matched in zip(stage.workers, (500, 100, 900), strict=True):
            stage.hit(worker, matched)
        assert await stage.leaves() == 1

    play(scene, 3)


def test_use_counts_half_after_ten_minutes() -> None:
    async def scene(stage: Scene) -> None:
        first, second = stage.workers
        stage.hit(first, 1000)
        stage.now = 600.0
        assert stage.worth(first) == 500.0
        stage.hit(second, 600)
        stage.hit(first, 50)
        assert stage.worth(first) == 550.0
        assert await stage.leaves() == 0

    play(scene, 2)


def test_of_equals_the_smaller_tree_and_then_the_newest() -> None:
    async def scene(stage: Scene) -> None:
        for text in (b"a" * 100, b"b" * 50, b"c" * 80):  # unknown texts go to the smallest tree: one each
            stage.bench.serve(text)
        trees = stage.trees()
        assert sorted(trees) == [50, 80, 100]
        assert await stage.leaves() == trees.index(50)

    async def empty(stage: Scene) -> None:
        assert await stage.leaves() == 2

    play(scene, 3)
    play(empty, 3)
    play(empty, 3, policy="round_robin")


def test_hits_of_the_router_itself_count_and_a_restart_forgets_them() -> None:
    async def scene(stage: Scene) -> None:
        bench, heard = stage.bench, stage.replicas
        for _ in range(3):
            bench.serve(b"the same long beginning, again and again")
        for event in bench.log.decisions:
            heard.routed(event)
        (used,) = (worker for worker in stage.workers if stage.worth(worker))
        assert stage.worth(used) == 2 * 40
        bench.fleet.lost(used, 0.0)
        for change in bench.log.changes:
            heard.worker_changed(change)
        assert stage.worth(used) == 0.0

    play(scene, 2)


def test_a_restart_or_a_removal_forgets_the_hits() -> None:
    async def scene(stage: Scene) -> None:
        fleet, heard = stage.bench.fleet, stage.replicas
        assert isinstance(heard, Listener)
        first, second, _ = stage.workers
        for worker in stage.workers:
            stage.hit(worker, 80)
        fleet.lost(first, 0.0)
        fleet.remove(second)
        for change in stage.bench.log.changes:
            heard.worker_changed(change)
        assert [stage.worth(worker) for worker in stage.workers] == [0.0, 0.0, 80.0]

    play(scene, 3)


def test_one_at_a_time() -> None:
    async def scene(stage: Scene) -> None:
        await stage.leaves()
        leaving = stage.machine.removed[0]
        for _ in range(3):
            stage.replicas.scale(decision(1, 3))
            await asyncio.sleep(0)
        assert stage.machine.removed == [leaving]
        assert stage.replicas.explain()["leaving"] == leaving
        stage.machine.done.set()
        await until(lambda: stage.replicas.explain()["leaving"] is None)
        stage.replicas.scale(decision(1, 3))
        await until(lambda: len(stage.bench.fleet) == 2)
        assert len(stage.machine.removed) == 2

    play(scene, 4)


def test_workers_of_others_drains_and_failed_ones_are_left_alone() -> None:
    async def scene(stage: Scene) -> None:
        guest, draining, down, own = stage.workers
        del stage.machine.own[guest]
        stage.bench.fleet.set_draining(draining, True)
        stage.bench.fleet.down(down, "gave up")
        stage.hit(own, 1000)
        assert await stage.leaves() == 3

    async def nobody(stage: Scene) -> None:
        stage.machine.own.clear()
        stage.replicas.scale(decision(1, 2))
        assert stage.replicas.explain()["leaving"] is None

    play(scene, 4)
    play(nobody, 2)


@pytest.mark.parametrize("error", [Conflict("It is being restarted."), RuntimeError("a fault")])
def test_one_that_cannot_be_removed_now_is_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def scene(stage: Scene) -> None:
        stage.machine.error = error
        stage.replicas.scale(decision(1, 2))
        await until(lambda: stage.replicas.explain()["leaving"] is None)
        stage.machine.error = None
        await stage.leaves()

    play(scene, 2)
    loud = [record.levelname for record in caplog.records if record.levelno >= logging.WARNING]
    assert loud == ["WARNING" if isinstance(error, Conflict) else "ERROR"]


def test_nothing_is_begun_after_the_end() -> None:
    async def scene(stage: Scene) -> None:
        await stage.replicas.close()
        stage.replicas.scale(decision(4, 1))
        stage.replicas.scale(decision(1, 2))
        await asyncio.sleep(0)
        assert (len(stage.bench.fleet), stage.machine.removed) == (2, [])

    play(scene, 2)
