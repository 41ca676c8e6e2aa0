"""Sets of workers as bit masks, and the able workers of a pool by their load: no decision looks at all workers.

    seat      a worker's number in its pool; a set of workers is an int whose bits are seats
    levels    levels[n] is the set of the able workers with n requests in flight

                  seats  3210
    levels[0]            0010      worker 1 is idle           low  = 0, the first level that is not empty
    levels[1]            1001      workers 0 and 3            high = 1, the last one
    all                  1011      worker 2 is not able

A lease moves one bit to the next level, and its end moves it back, so that `low` and `high` move by at most one. The
least loaded of any set are found at the first level that has some of it. A mask of a thousand bits costs hardly more
than one of four: with masks, "the candidates but the full ones" is one operation, and so is "those of them that hold
this prefix", as the prefix tree uses the same numbers (`routing.pools`).

Lists of workers by load lost: a set (the candidates for one model, the owners of a prefix) could not be compared with
them without looking at each worker.
"""

from __future__ import annotations

from typing import Final

_NARROW: Final = 32
"""Bits of a mask in which a bit is sought one by one."""


class Roster:
    """See the module. The fleet calls `raised` and `lowered`, the pool the others; everybody may read.

    all       the able workers
    on_trial  workers with a half-open breaker
    levels    the able workers by load; behind `high` all levels are empty
    """

    __slots__ = ("all", "high", "levels", "low", "on_trial")

    def __init__(self) -> None:
        self.all = 0
        self.on_trial = 0
        self.low = 0
        self.high = 0
        self.levels = [0]

    def __repr__(self) -> str:
        return f"<Roster {self.all.bit_count()} workers with loads from {self.low} to {self.high}>"

    def add(self, bit: int, load: int) -> None:
        """Add a worker, in any order of loads."""
        levels = self.levels
        while len(levels) <= load:
            levels.append(0)
        levels[load] |= bit
        if not self.all or load < self.low:
            self.low = load
        if load > self.high:
            self.high = load
        self.all |= bit

    def remove(self, bit: int, load: int) -> None:
        """Remove a worker."""
        levels = self.levels
        levels[load] ^= bit
        self.all ^= bit
        if not self.all:
            self.low = self.high = 0
            return
        while not levels[self.low]:
            self.low += 1
        while not levels[self.high]:
            self.high -= 1

    def raised(self, bit: int, load: int) -> None:
        """Take note that the load of a worker rose by one from `load`."""
        levels = self.levels
        rest = levels[load] ^ bit
        levels[load] = rest
        load += 1
        if load > self.high:
            self.high = load
            if load == len(levels):
                levels.append(0)
        levels[load] |= bit
        if not rest and load > self.low == load - 1:
            self.low = load

    def lowered(self, bit: int, load: int) -> None:
        """Take note that the load of a worker fell by one from `load`."""
        levels = self.levels
        rest = levels[load] ^ bit
        levels[load] = rest
        if not rest and load == self.high:
            self.high = load - 1
        load -= 1
        levels[load] |= bit
        if load < self.low:
            self.low = load

    # -- questions about a set of able workers -------------------------------------------------------------------------

    def least(self, mask: int) -> int:
        """Return the least load of a set with at least one worker."""
        levels, load = self.levels, self.low
        while not levels[load] & mask:
            load += 1
        return load

    def most(self, mask: int) -> int:
        """Return the highest load of a set with at least one worker."""
        levels, load = self.levels, self.high
        while not levels[load] & mask:
            load -= 1
        return load

    def least_loaded(self, mask: int) -> int:
        """Return those of a set with the least load; the empty set for an empty one."""
        levels = self.levels
        for load in range(self.low, self.high + 1):
            if found := levels[load] & mask:
                return found
        return 0

    def at_least(self, load: int) -> int:
        """Return all workers with this load or more."""
        found = 0
        for level in self.levels[load : self.high + 1]:
            found |= level
        return found

    def running(self, mask: int) -> int:
        """Return the sum of the loads of a set."""
        levels = self.levels
        return sum([load * (levels[load] & mask).bit_count() for load in range(self.low, self.high + 1)])


def seat_of(mask: int, number: int) -> int:
    """Return the seat of a set's worker by its place in the set, from 0."""
    if not mask & (mask + 1):  # the usual case: there is no gap
        return number
    seat = 0
    width = mask.bit_length()
    while width > _NARROW:
        half = width >> 1
        lower = mask & ((1 << half) - 1)
        count = lower.bit_count()
        if number < count:
            mask = lower
            width = half
        else:
            number -= count
            mask >>= half
            seat += half
            width -= half
    for _ in range(number):
        mask &= mask - 1
    return seat + (mask & -mask).bit_length() - 1
