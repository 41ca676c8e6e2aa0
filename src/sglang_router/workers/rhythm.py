"""When periodic work for many workers is done: in groups, one group at a time.

    pause_to_step(now, pause, interval)    the pause, made a little longer, so that others end with it
    Alarm                                  waits for a time or for a call, without a task of its own

A thousand workers that are asked at the same time hold up all requests for 19 ms; asked one at a time, each wakes the
process for itself, which costs three times as much in all. So an interval has `_STEPS` moments.
"""

from __future__ import annotations

import asyncio
import math

_STEPS = 40


def pause_to_step(now: float, pause: float, interval: float) -> float:
    """Return the seconds until the first step of the interval that is at least `pause` seconds away."""
    step = interval / _STEPS
    return math.ceil((now + pause) / step) * step - now


class Alarm:
    """Wakes who waits, once it is set. ringing: it is set."""

    __slots__ = ("_loop", "_waiter", "ringing")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self.ringing = False

    def set(self) -> None:
        """Set it off; it rings until `clear` is called."""
        self.ringing = True
        if self._waiter is not None:
            _wake(self._waiter)

    def clear(self) -> None:
        """Make it silent."""
        self.ringing = False

    async def wait(self, seconds: float) -> None:
        """Wait until it rings, or for this time. There is one who waits at a time."""
        if self.ringing:
            return
        self._waiter = waiter = self._loop.create_future()
        timer = self._loop.call_later(seconds, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
