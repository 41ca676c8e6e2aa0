"""When a replica may start again: after a pause that grows, and not too often.

    end of the process      1st    2nd    3rd    4th    5th    6th
    pause before the next   1 s    2 s    4 s    8 s    16 s   none: it is left down

Only what happened within the window counts: who ran well for that long starts afresh. Arithmetic on the moments given;
no clock of its own, and no chance either: a launcher's replicas do not share a server that needs them spread out.
"""

from __future__ import annotations

from collections import deque

import msgspec


class RestartRules(msgspec.Struct, frozen=True, kw_only=True):
    """Pauses and window in seconds; `most` restarts within the window are granted."""

    initial_backoff: float = 1.0
    max_backoff: float = 60.0
    multiplier: float = 2.0
    most: int = 5
    window: float = 600.0


class Restarts:
    """The restarts of one replica."""

    def __init__(self, rules: RestartRules) -> None:
        self._rules = rules
        self._granted: deque[float] = deque()

    def pause(self, now: float) -> float | None:
        """Its process ended: the seconds to wait before the next is started, or None to leave it down."""
        rules = self._rules
        while self._granted and now - self._granted[0] > rules.window:
            self._granted.popleft()
        if len(self._granted) >= rules.most:
            return None
        pause = rules.initial_backoff
        for _ in self._granted:  # not a power: that overflows
            pause = min(pause * rules.multiplier, rules.max_backoff)
        self._granted.append(now)
        return min(pause, rules.max_backoff)

    def forget(self) -> None:
        """Starts afresh: somebody said so."""
        self._granted.clear()
