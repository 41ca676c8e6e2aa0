"""Virtual time: what will happen, ordered by time and, at the same time, by when it was planned."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

Work = Callable[..., None]


class Timeline:
    """See the module. now: seconds since the start.

    soon  what is done after the current event, at the same time; it gets the time as its argument
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: list[Callable[[float], None]] = []
        self._events: list[tuple[float, int, bool, Work, tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._awaited = 0  # events that keep the run going

    def __repr__(self) -> str:
        return f"<Timeline at {self.now:.3f}, {self._awaited} events to come>"

    def plan(self, at: float, work: Work, *arguments: Any) -> None:
        """Plan a call; one for the past is made now."""
        self._awaited += 1
        heapq.heappush(self._events, (max(at, self.now), next(self._order), True, work, arguments))

    def background(self, at: float, work: Work, *arguments: Any) -> None:
        """Plan a call that is made only if the run goes on until then: a periodic job, or what may come too late."""
        heapq.heappush(self._events, (max(at, self.now), next(self._order), False, work, arguments))

    def run(self) -> None:
        """Make all calls, also those that are planned meanwhile, until none is left but those in the background."""
        events, soon = self._events, self.soon
        while self._awaited:
            self.now, _, awaited, work, arguments = heapq.heappop(events)
            self._awaited -= awaited
            work(*arguments)
            while soon:
                soon.pop(0)(self.now)
