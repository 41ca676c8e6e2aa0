"""When a router tells again what all of its fleet know, for routers that start later.

Each router has its turn, by its name, so that the first one spares the others. Nothing is told again while the link to
the store is young: what others have said meanwhile is not heard yet, and would be taken back.
"""

from __future__ import annotations

import math
from typing import Final

_TURNS: Final = 64
_TURN: Final = 1 / 32
"""Seconds: more than others need to hear a message."""
_CALM: Final = 5.0
"""Seconds for which the store is reached before anything is told again."""
_TOLD_AFTER: Final = 1.0
"""Seconds in which each reads what the store still has, once it has lost something."""
_EVERY: Final = 86400.0
"""Seconds after which all is told again: a stream keeps only so many messages."""


class Repeating:
    """See the module. router: the name of this one. All times are seconds of one clock."""

    __slots__ = ("_all_at", "_calm_at", "_turn")

    def __init__(self, router: bytes) -> None:
        self._turn = _TURN * (router[-1] % _TURNS)
        self._calm_at = 0.0
        self._all_at = math.inf

    def __repr__(self) -> str:
        return f"<Repeating in turn {self._turn / _TURN:.0f}>"

    def reached(self, now: float) -> None:
        """Take note that the store is reached again."""
        self._calm_at = now + _CALM + self._turn

    def is_calm(self, now: float) -> bool:
        """Return whether the store has been reached for a while, if it is."""
        return now >= self._calm_at

    def after_loss(self, now: float) -> float:
        """Return when to tell again what the store has lost."""
        return now + _TOLD_AFTER + self._turn

    def due(self, now: float) -> bool:
        """Return, once a day, whether all is to be told again. Call it periodically."""
        due = now >= self._all_at
        if due or self._all_at == math.inf:
            self._all_at = now + _EVERY + self._turn
        return due
