"""Long answers of the control plane: made in slices, as the event loop also relays tokens, and not for each who asks.

    in_slices(pieces)            collect what an iterator yields; streams continue after each millisecond of it
    joined(texts)                the same, as one text in UTF-8
    Shared.get(key, make)        the result of `make`, made at most once in `interval` seconds

Who asks for a shared result meanwhile gets the same one, or waits for the one that is in the making.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

_JOINED = 500
"""Texts that are joined at once."""
_SLICE = 0.001
"""Seconds of work after which other work of the event loop has its turn."""


async def in_slices(pieces: Iterable[T]) -> list[T]:
    """Return the pieces, which are made one by one. A piece should take far less than a millisecond."""
    made: list[T] = []
    until = time.perf_counter() + _SLICE
    for piece in pieces:
        made.append(piece)
        if time.perf_counter() >= until:
            await asyncio.sleep(0)
            until = time.perf_counter() + _SLICE
    return made


async def joined(texts: Iterable[str]) -> bytes:
    """Return texts, which are made one by one, as one in UTF-8."""
    made = await in_slices(texts)
    parts = ("".join(made[at : at + _JOINED]).encode() for at in range(0, len(made), _JOINED))
    return b"".join(await in_slices(parts))


class _Making(Generic[T]):
    """One result: when it was begun, its task, and how many wait for it."""

    __slots__ = ("begun", "task", "waiting")

    def __init__(self, begun: float, task: asyncio.Task[T]) -> None:
        self.begun = begun
        self.task = task
        self.waiting = 0

    @property
    def failed(self) -> bool:
        """Whether it ended without a result."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class Shared(Generic[T]):
    """See the module. Keys must be few: a result is kept for each until it is made again."""

    def __init__(self, clock: Callable[[], float], interval: float) -> None:
        self._clock = clock
        self._interval = interval
        self._made: dict[str, _Making[T]] = {}

    async def get(self, key: str, make: Callable[[], Awaitable[T]]) -> T:
        """Return a result that was begun less than `interval` seconds ago or is in the making, else a new one.

        Raises: what `make` raises, to all who wait for it.
        """
        now, making = self._clock(), self._made.get(key)
        fresh = making is not None and (not making.task.done() or now - making.begun < self._interval)
        if making is None or not fresh or making.failed:
            making = self._made[key] = _Making(now, asyncio.ensure_future(_awaited(make)))
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if not making.waiting and not making.task.done():  # all who asked have left
                making.task.cancel()
                if self._made.get(key) is making:
                    del self._made[key]


async def _awaited(make: Callable[[], Awaitable[T]]) -> T:
    return await make()
