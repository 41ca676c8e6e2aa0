"""How well the store is reached, in one place: by the task that reads and by the one that writes.

A change is one line of the log, not each try; the last trouble is kept for metrics, /readiness and the page. Tries
after a failure come after a pause that doubles from 0.1 s to 5 s, with half of it by chance, so that a fleet does not
come back in step. The pause is short again only after 10 s without a failure: a store that comes and goes is not
hammered.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from typing import Final

from sglang_router.sharing.store import StoreFailed, Trouble

log = logging.getLogger("sglang_router.sharing")

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_CALM: Final = 10.0
CONNECTING: Final = "connecting"
CONNECTED: Final = "connected"


class LinkSide:
    """One task's use of the store: reading or writing. failure: the last one; None while it goes well."""

    def __init__(self, link: StoreLink, rng: random.Random) -> None:
        self._link = link
        self._rng = rng
        self._pause = _FIRST_PAUSE
        self._failed_at = -math.inf
        self.tried = False
        self.failure: StoreFailed | None = None

    def well(self) -> None:
        """Hear that the store did what it was asked for."""
        if self.failure is not None or not self.tried:
            self.failure, self.tried = None, True
            self._link.changed()

    async def failed(self, failure: StoreFailed) -> None:
        """Hear of a failure; return when it is time to try again."""
        now = self._link.clock()
        if now - self._failed_at > _CALM + _LONGEST_PAUSE:
            self._pause = _FIRST_PAUSE
        self._failed_at = now
        known, self.failure, self.tried = self.failure, failure, True
        if known is None or known.trouble is not failure.trouble:
            self._link.changed()
        pause, self._pause = self._pause, min(self._pause * 2, _LONGEST_PAUSE)
        await asyncio.sleep(pause * (0.5 + self._rng.random() / 2))


class StoreLink:
    """See the module. changed: called after each change of `state`.

    shown  the store, for the log
    """

    def __init__(self, shown: str, clock: Callable[[], float], rng: random.Random) -> None:
        self.shown = shown
        self.clock = clock
        self.reading, self.writing = LinkSide(self, rng), LinkSide(self, rng)
        self.heard: Callable[[], None] = _nothing
        self.losses = 0
        self._lost_at: float | None = None
        self._state = CONNECTING

    def __repr__(self) -> str:
        return f"<StoreLink {self.shown} {self._state}>"

    @property
    def state(self) -> str:
        """CONNECTING, CONNECTED, or the value of a `Trouble`."""
        return self._state

    @property
    def connected(self) -> bool:
        """Whether this router both hears the others and is heard."""
        return self._state == CONNECTED

    @property
    def problem(self) -> str:
        """What is wrong, as a sentence; "" for nothing."""
        failure = self._failure()
        return "" if failure is None else str(failure)

    def _failure(self) -> StoreFailed | None:
        return self.reading.failure or self.writing.failure

    def changed(self) -> None:
        """Work out the state from both sides; log it when it is another one."""
        failure = self._failure()
        if failure is None and not (self.reading.tried and self.writing.tried):
            return
        state = CONNECTED if failure is None else failure.trouble.value
        if state == self._state:
            return
        before, self._state = self._state, state
        if failure is not None:
            if self._lost_at is None:
                self._lost_at, self.losses = self.clock(), self.losses + 1
            log.warning("%s; requests are routed by what this router knows itself", failure)
        elif before == CONNECTING:
            log.info("%s: sharing with the other routers of the fleet", self.shown)
        else:
            away = 0.0 if self._lost_at is None else self.clock() - self._lost_at
            self._lost_at = None
            log.warning("%s: sharing again after %.1f s", self.shown, away)
        self.heard()


def _nothing() -> None:
    """Do nothing."""


TROUBLES: Final = tuple(trouble.value for trouble in Trouble)
