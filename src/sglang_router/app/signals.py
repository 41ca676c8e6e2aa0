"""Handle signals: the first one stops the process gracefully, a second one at once."""

from __future__ import annotations

import asyncio
import logging
import signal

log = logging.getLogger("sglang_router")


class Signals:
    """Handles SIGTERM, SIGINT and SIGQUIT.

    stop    set by the first signal
    urgent  set by the second signal
    status  the exit status of the process; a second signal makes it 128 + its number
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stop = asyncio.Event()
        self.urgent = asyncio.Event()
        self.status = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, self._hear, number)

    def _hear(self, number: int) -> None:
        if self.stop.is_set():
            log.warning("second signal: leaving at once")
            self.status = 128 + number
            self.urgent.set()
        self.stop.set()


async def first_of(loop: asyncio.AbstractEventLoop, *events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    waits = [loop.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
