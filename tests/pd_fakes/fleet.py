"""Fake engines on an event loop in a thread of its own, for tests that block.

with running(SglangPair(decodes=2)) as fakes:
    fakes.call(fakes.pair.prefill.kill)                  # runs a function on the loop
    fakes.run(fakes.pair.prefill.start())                # runs a coroutine
    fakes.until(fakes.pair.decode, lambda it: it.living)   # waits for a state
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, Protocol, TypeVar

from pd_fakes.edge import WITHIN, EdgeServer, Hold, Stage

T = TypeVar("T")
E = TypeVar("E", bound=EdgeServer)


class Group(Protocol):
    """Engines that are started and stopped together."""

    @property
    def engines(self) -> Any: ...
    @property
    def flags(self) -> list[str]: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def idle(self) -> None: ...


G = TypeVar("G", bound=Group)


class Fakes(Generic[G]):
    """See the module. `running` makes it."""

    def __init__(self, pair: G) -> None:
        self.pair = pair
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(pair.start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * WITHIN)

    def call(self, function: Callable[[], T]) -> T:
        async def on_loop() -> T:
            return function()

        return self.run(on_loop())

    def until(self, engine: E, holds: Callable[[E], bool]) -> None:
        """Wait until something holds for an engine; it is checked after each change of it."""
        self.run(engine.until(lambda: holds(engine)))

    def hold(self, stage: Stage, *engines: EdgeServer) -> Hold:
        """Stop legs of these engines that reach a stage from now on."""
        hold = Hold()
        self.call(lambda: [engine.hold(stage, hold) for engine in engines])
        return hold

    def reached(self, hold: Hold) -> EdgeServer:
        """Wait until a leg is held; return its engine."""
        return self.run(hold.reached())

    def release(self, hold: Hold) -> None:
        self.call(hold.release)

    def idle(self) -> None:
        """Wait until no engine holds anything; fail if one does not let go."""
        self.run(self.pair.idle())

    def close(self) -> None:
        try:
            self.run(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WITHIN)
            self._loop.close()

    async def _stop(self) -> None:
        await self.pair.stop()
        for _ in range(10):  # transports of the last connections are made, and let go of sockets, in the next turns
            await asyncio.sleep(0)


@contextlib.contextmanager
def running(pair: G) -> Iterator[Fakes[G]]:
    """Yield fake engines that listen."""
    fakes = Fakes(pair)
    try:
        yield fakes
    finally:
        fakes.close()
