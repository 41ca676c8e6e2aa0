"""Follow the KV events of all workers: find where each publishes, keep its stream, forget what leaves.

    fleet: "added"                  --> a task: ask where it publishes, again and again; follow; ask again
    fleet: "restarted", "healthy"   --> ask now: another process may publish elsewhere
    fleet: "removed"                --> the task ends, its holder leaves the index

An engine inside which several data-parallel ranks share one worker is not followed: the router does not choose the
rank, so it cannot use what one of them holds. With --dp-aware each rank is a worker of its own.

One more task cleans the index up: promises get old, and what was cleared is freed in slices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.events import Listener, WorkerChanged
from sglang_router.routing.kv_blocks import Holder
from sglang_router.routing.kv_index import KVIndex
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.kv_sources import Published, Templates, sources_of

log = logging.getLogger("sglang_router.kv_events")

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two questions where an engine publishes, the second time and later on."""
_TIDY_EVERY = 1.0
_TURN_EVERY = 10
"""Tidyings between two turns of the promises."""
_SLICE = 512
"""Blocks that are freed at once."""


class Streams(Protocol):
    """What follows streams: `workers.kv_stream.KVStreams`."""

    def follow(
        self, published: Published, index: KVIndex, holder: Holder, url: str, emptied: Callable[[], None]
    ) -> Coroutine[Any, Any, None]:
        """Return what follows a stream until it is cancelled. emptied: called when the cache is cleared meanwhile."""

    def close(self) -> None:
        """Free what the streams share."""


class KVEvents(Listener):
    """See the module.

    emptied  hears of a worker whose cache its engine has cleared: prompts of which the tokens are unknown, and other
             routers, need it as well
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: ConnectionPool,
        index: KVIndex,
        streams: Streams,
        templates: Templates,
        emptied: Callable[[Worker], None],
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._index = index
        self._streams = streams
        self._templates = templates
        self._emptied = emptied
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._news: dict[Worker, asyncio.Event] = {}
        self._tidying: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<KVEvents of {len(self._tasks)} workers, {self._index!r}>"

    def worker_changed(self, event: WorkerChanged) -> None:
        """Follow a worker that was added, not one that was removed; ask one anew that may be another process."""
        worker, what = event.worker, event.what
        if what == "added":
            self._news[worker] = asyncio.Event()
            self._tasks[worker] = self._loop.create_task(self._serve(worker))
            if self._tidying is None:
                self._tidying = self._loop.create_task(self._tidy())
        elif what == "removed":
            self._end(worker)
        elif worker in self._news and (what == "restarted" or self._is_found_well(event)):
            self._news[worker].set()

    def _is_found_well(self, event: WorkerChanged) -> bool:
        """Whether a worker is healthy now whose stream is not followed."""
        holder = self._index.holders.get(event.worker.id)
        return event.what == "health" and event.new == Health.HEALTHY.value and (holder is None or not holder.live)

    def _end(self, worker: Worker) -> None:
        self._news.pop(worker, None)
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()
        self._index.leave(worker.id)

    async def close(self) -> None:
        """End all streams."""
        tasks = list(self._tasks.values())
        for worker in list(self._tasks):
            self._end(worker)
        if self._tidying is not None:
            self._tidying.cancel()
            tasks.append(self._tidying)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._streams.close()

    async def _serve(self, worker: Worker) -> None:
        """Find where a worker publishes, and follow it until there is news of it."""
        news, pause, told = self._news[worker], _FIRST_PAUSE, ""
        while True:
            news.clear()
            found = await sources_of(self._pool, worker, self._templates)
            why = _why_not(found, worker)
            if not why:
                pause, told = _FIRST_PAUSE, ""
                await self._follow(worker, found[worker.dp_rank or 0], news)
                continue
            if why != told and worker.health is Health.HEALTHY:
                log.warning(
                    "no KV events: the cache is estimated", extra={"fields": {"worker": worker.url, "why": why}}
                )
                told = why
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _follow(self, worker: Worker, published: Published, news: asyncio.Event) -> None:
        """Follow a stream until there is news of its worker."""
        index = self._index
        holder = index.holders.get(worker.id) or index.join(worker.id)
        follow = self._streams.follow(published, index, holder, worker.url, partial(self._emptied, worker))
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(follow), asyncio.ensure_future(news.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Exception as error:  # an address that is none, or a fault: the tree answers
            log.error("KV events cannot be followed", exc_info=error, extra={"fields": {"worker": worker.url}})
            await asyncio.sleep(_LONGEST_PAUSE)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tidy(self) -> None:
        """Keep the index small."""
        index, ticks = self._index, 0
        while True:
            await asyncio.sleep(_TIDY_EVERY)
            while index.reclaim(_SLICE):  # noqa: ASYNC110
                await asyncio.sleep(0)
            ticks += 1
            if not ticks % _TURN_EVERY:
                index.turn()


def _why_not(found: dict[int, Published], worker: Worker) -> str:
    """Return why a worker's events cannot be followed; "" if they can."""
    if not found:
        return "the engine does not say where it publishes any"
    if worker.dp_rank is None and len(found) > 1:
        return "it has several data-parallel ranks: use --dp-aware"
    if (worker.dp_rank or 0) not in found:
        return f"rank {worker.dp_rank or 0} does not publish"
    return ""
