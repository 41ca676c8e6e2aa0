"""Whose KV events are followed, from when to when; over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from fake_worker import FakeWorker, answer
from fleets import any_policy
from kv_publisher import CLEARED, Publisher, stored
from sglang_router.relay.batch import Batch
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.events import Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.kv_index import KVIndex
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.worker import Worker
from sglang_router.workers import kv_events
from sglang_router.workers.kv_events import KVEvents
from sglang_router.workers.kv_sources import Templates
from sglang_router.workers.kv_stream import KVStreams

WITHIN = 20.0
SOURCES = "GET /kv_event_sources"
PROMPT = list(range(8))
NOTHING = Templates()


def run(work: Coroutine[Any, Any, None]) -> None:
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(work, WITHIN))
    finally:
        loop.close()


def says(*publishers: Publisher) -> bytes:
    """Return vLLM's answer about these ranks."""
    ranks = []
    for rank, each in enumerate(publishers):
        at = each.published
        ranks.append({"data_parallel_rank": rank, "endpoint": at.endpoint, "replay_endpoint": at.replay, "topic": ""})
    return answer(200, ranks)


class Bench:
    """One engine, a fleet, and what follows the events."""

    def __init__(self, fake: FakeWorker, templates: Templates) -> None:
        loop = asyncio.get_running_loop()
        self.fake = fake
        self.pool = ConnectionPool(loop, Batch(loop), connect_timeout=10.0, idle_timeout=50.0, max_idle=8, tls=None)
        listeners = Listeners()
        ids = itertools.count()
        self.fleet = Fleet(listeners, lambda: f"id{next(ids)}", any_policy)
        self.index = KVIndex()
        self.events = KVEvents(loop, self.pool, self.index, KVStreams(), templates, self.fleet.found_empty)
        listeners.add(self.events)

    def add(self, rank: int | None = None, *, checked: bool = False) -> Worker:
        spec = WorkerSpec(url=self.fake.url, dp_rank=rank, health=HealthRules(enabled=checked))
        worker = self.fleet.add(spec, 0.0)
        self.pool.know(worker.target)
        return worker

    def live(self, worker: Worker) -> bool:
        holder = self.index.holders.get(worker.id)
        return holder is not None and holder.live

    def blocks(self, worker: Worker) -> list[Any]:
        return sorted(self.index.holders[worker.id].blocks)


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN / 2
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def bench(*publishers: Publisher, templates: Templates = NOTHING) -> AsyncIterator[Bench]:
    fake = FakeWorker()
    await fake.start()
    for each in publishers:
        await each.start()
    found = Bench(fake, templates)
    try:
        yield found
    finally:
        await found.events.close()
        await found.pool.close()
        for each in publishers:
            await each.stop()
        await fake.stop()


def test_a_worker_is_followed_from_when_it_joins_to_when_it_leaves() -> None:
    async def main() -> None:
        publisher = Publisher()
        async with bench(publisher) as it:
            it.fake.script[SOURCES] = says(publisher)
            await publisher.publish(stored([1, 2], None, PROMPT, 4))
            worker = it.add()
            await until(lambda: it.live(worker))
            assert it.blocks(worker) == [1, 2]
            it.fleet.remove(worker)
            assert it.index.holders == {}
            await until(lambda: len(it.index) == 0)

    run(main())


def test_a_cache_that_is_cleared_is_empty_for_the_fleet_as_well_but_not_for_what_was_before() -> None:
    async def main() -> None:
        publisher = Publisher()
        async with bench(publisher) as it:
            it.fake.script[SOURCES] = says(publisher)
            await publisher.publish(CLEARED)
            await publisher.publish(stored([1, 2], None, PROMPT, 4))
            worker = it.add()
            await until(lambda: it.live(worker))
            assert it.blocks(worker) == [1, 2]
            assert worker.caches == 0
            await publisher.publish(CLEARED, CLEARED)
            await until(lambda: worker.caches == 1)
            await publisher.publish(stored([3], None, PROMPT[:4], 4))
            await until(lambda: it.blocks(worker) == [3])
            assert worker.caches == 1  # of nothing

    run(main())


def test_each_rank_follows_its_own_and_an_engine_with_hidden_ranks_is_not_followed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        zero, one = Publisher(), Publisher()
        async with bench(zero, one) as it:
            it.fake.script[SOURCES] = says(zero, one)
            await one.publish(stored([1, 2], None, PROMPT, 4))
            whole, rank = it.add(), it.add(1)
            await until(lambda: it.live(rank))
            assert it.blocks(rank) == [1, 2]
            await until(lambda: bool(caplog.records))
            assert not it.live(whole)
            (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
            assert "--dp-aware" in record.fields["why"]  # type: ignore[attr-defined]

    run(main())


def test_another_process_is_asked_anew_where_it_publishes() -> None:
    async def main() -> None:
        old, new = Publisher(), Publisher()
        async with bench(old, new) as it:
            it.fake.script[SOURCES] = says(old)
            await old.publish(stored([1, 2], None, PROMPT, 4))
            await new.publish(stored([3], None, PROMPT[:4], 4))
            worker = it.add()
            await until(lambda: it.live(worker))
            it.fake.script[SOURCES] = says(new)
            it.fleet.lost(worker, 1.0)
            await until(lambda: it.live(worker) and it.blocks(worker) == [3])

    run(main())


def test_an_engine_that_was_not_up_is_asked_when_it_is_found_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        publisher = Publisher()
        async with bench(publisher) as it:
            worker = it.add(checked=True)
            await it.fake.asked(SOURCES, 1)
            it.fake.script[SOURCES] = says(publisher)
            it.fleet.probed(worker, None, 1.0)
            await until(lambda: it.live(worker))

    monkeypatch.setattr(kv_events, "_FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(kv_events, "_LONGEST_PAUSE", 3600.0)
    run(main())


def test_an_address_that_is_none_is_told_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench(templates=Templates("ipc:///" + "x" * 300)) as it:
            worker = it.add()
            await until(lambda: any(each.levelname == "ERROR" for each in caplog.records))
            assert not it.live(worker)
            it.fleet.remove(worker)

    run(main())


def test_what_was_cleared_is_freed_and_promises_get_old(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        publisher = Publisher()
        async with bench(publisher) as it:
            it.fake.script[SOURCES] = says(publisher)
            await publisher.publish(stored([1, 2], None, PROMPT, 4))
            worker = it.add()
            await until(lambda: it.live(worker))
            holder = it.index.holders[worker.id]
            it.index.promise(holder, it.index.match([50] * 8))
            assert it.index.match([50] * 8).levels == [(8, holder.bit)]
            await until(lambda: it.index.match([50] * 8).levels == [])
            it.index.clear(holder)
            await until(lambda: len(it.index) == 0)

    monkeypatch.setattr(kv_events, "_TIDY_EVERY", 0.005)
    run(main())
