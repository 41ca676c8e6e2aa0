"""What one worker was given since its cache was empty, by all routers: counters, see `routing.shared.prefixes`."""

from __future__ import annotations

from typing import Final, Protocol

BEGIN: Final = 1 << 40
"""Grains that a new life is said to have: those of the past count backwards from here."""


class LifeOwner(Protocol):
    """A prefix tree in which workers have slots."""

    def renamed(self, life: CacheLife) -> None:
        """Take note that a worker has another name."""


class CacheLife:
    """What a worker was given since its cache was empty, in grains. number: of the life; name: of the worker.

    placed    by all routers
    past      by others before this router looked; negative: the cache was emptied after all that is older
    recent, own  what all routers placed lately, and this one
    untold    bytes that this router placed without telling
    capacity  that its cache holds
    bit, owner  its slot in the prefix tree of a pool, and whose that is; 0 and None: it has none
    """

    __slots__ = ("bit", "capacity", "name", "number", "own", "owner", "past", "placed", "recent", "untold")

    def __init__(self, name: int, number: int) -> None:
        self.name = name
        self.number = number
        self.placed = BEGIN
        self.recent = self.own = 0
        self.past = 0
        self.untold = 0
        self.capacity = 0
        self.bit = 0
        self.owner: LifeOwner | None = None

    @property
    def share(self) -> float:
        """The part of what was placed lately that this router placed; 1 as long as there is room for all."""
        return self.own / self.recent if self.recent > self.capacity // 2 else 1.0

    @property
    def filled(self) -> int:
        """What of its cache is filled, by all routers."""
        return min(self.recent + max(self.past, 0), self.capacity)

    def place(self, grains: int, own: bool) -> int:
        """Count what was placed; return the sum."""
        self.placed += grains
        self.recent += grains
        self.own += grains if own else 0
        if self.recent > 2 * self.capacity:
            self.recent >>= 1
            self.own >>= 1
        return self.placed

    def take_back(self, grains: int, own: bool) -> None:
        """Count what was placed as if it had not been."""
        self.placed = max(self.placed - grains, BEGIN)
        self.recent = max(self.recent - grains, 0)
        self.own = max(self.own - grains, 0) if own else self.own

    def __repr__(self) -> str:
        return f"<CacheLife {self.number} of {self.name:016x}: {self.placed - BEGIN} grains placed of {self.capacity}>"
