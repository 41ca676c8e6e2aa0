"""A load that checks every answer and counts the outcomes.

    load = Load(loop, lambda: port, clients=12, seed=1)     closed: each client sends the next request after its answer
    load = Load(..., rate=200)                              paced: this many requests a second while clients are free
    load.start() ... load.stop()
    load.tally(since)                                       Tally of the requests that ended since then

Some requests use kept connections, others a connection of their own; now and then a client disconnects before the end
of its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop
from scripts.reliability.answers import Question, Questions
from scripts.reliability.client import PATIENCE, Connection, Fate, Result

from sglang_router.engine.text import Tokenizer

T = TypeVar("T")

KEPT = 0.7
"""Share of the requests that use a kept connection."""
LEAVES = 0.02
"""Share of the requests whose client disconnects."""
_REST = 0.05
"""Seconds after which a client without an answer sends the next request."""


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Loop:
    """An event loop in its own thread."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="load", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], within: float = 2 * PATIENCE) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(within)

    def close(self) -> None:
        """Cancel what still runs, such as a load that was interrupted, and end the thread."""
        with contextlib.suppress(Exception):
            self.run(_cancel_others(), 5.0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


@dataclass
class Tally:
    """Outcomes of the requests that ended within a span of time. `gap`: longest time without an answer, in seconds.

    bad  outcomes and reasons of all that were not answered, as "cut stream_broken"
    """

    requests: int = 0
    answered: int = 0
    gap: float = 0.0
    bad: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Return a quantile of the durations of answered requests, in seconds; 0 without any."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class Load:
    """See the module. `port` is called before each connection; `size` is that of a prompt's own part, in bytes."""

    def __init__(
        self,
        loop: Loop,
        port: Callable[[], int],
        *,
        clients: int,
        seed: int = 0,
        rate: float = 0.0,
        size: int = 200,
        tokens: tuple[int, int] = (4, 48),
    ) -> None:
        self.results: list[Result] = []
        self.began = time.monotonic()
        self.ended = 0.0
        self._loop = loop
        self._port = port
        self._clients = clients
        self._seed = seed
        self._rate = rate
        self._size = size
        self._tokens = tokens
        self._tokenizer = Tokenizer()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._due = 0.0

    def start(self) -> None:
        self.began = time.monotonic()

        async def begin() -> None:
            self._due = time.monotonic()
            self._tasks = [asyncio.create_task(self._client(number)) for number in range(self._clients)]

        self._loop.run(begin())

    def stop(self) -> None:
        """Send no more requests; return when those in flight have ended."""

        async def end() -> None:
            self._stopping = True
            await asyncio.gather(*self._tasks)

        self.ended = time.monotonic()
        self._loop.run(end())

    def tally(self, since: float = 0.0, until: float = math.inf) -> Tally:
        """Return the tally between two times of the monotonic clock. `gap` includes the begin and the end of the
        load."""
        last = since = since or self.began
        tally = Tally()
        for result in sorted(self.results.copy(), key=lambda result: result.ended):
            if not since < result.ended <= until:
                continue
            tally.requests += 1
            if result.fate is Fate.ANSWERED:
                tally.answered += 1
                tally.latencies.append(result.ended - result.began)
                tally.gap = max(tally.gap, result.ended - last)
                last = result.ended
            elif result.fate is not Fate.LEFT:
                tally.bad[f"{result.fate.value} {result.reason}".strip()] += 1
        tally.gap = max(tally.gap, min(until, self.ended or time.monotonic()) - last)
        return tally

    async def _client(self, number: int) -> None:
        lot = random.Random(f"{self._seed} {number}")
        questions = Questions(lot, self._size, self._tokens, self._tokenizer)
        connection: Connection | None = None
        while not self._stopping:
            await self._turn()
            close = lot.random() > KEPT
            leave = lot.uniform(0.001, 0.2) if lot.random() < LEAVES else 0.0
            result, connection = await self._ask(connection, questions.next(), close, leave)
            self.results.append(result)
            if result.fate not in (Fate.ANSWERED, Fate.LEFT):
                await asyncio.sleep(_REST)
        if connection is not None:
            connection.transport.close()

    async def _turn(self) -> None:
        if not self._rate:
            await asyncio.sleep(0)
            return
        self._due = due = max(self._due + 1 / self._rate, time.monotonic() - 1.0)
        await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _ask(
        self, connection: Connection | None, question: Question, close: bool, leave: float
    ) -> tuple[Result, Connection | None]:
        began = time.monotonic()
        if connection is not None and connection.fault:
            return Result(Fate.WRONG, connection.fault, began, began), None
        if connection is None or not connection.usable:
            try:
                connecting = asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port())
                _, opened = await asyncio.wait_for(connecting, PATIENCE)
            except (OSError, asyncio.TimeoutError) as error:
                await asyncio.sleep(_REST)
                return Result(Fate.REFUSED, type(error).__name__, began, time.monotonic()), None
            connection = opened
        return await connection.ask(question, close=close, leave=leave), connection
