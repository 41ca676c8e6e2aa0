"""Sets of workers as bit masks, and the able workers of a pool by their load: no decision looks at all workers.

    seat      a worker's number in its pool; a set of workers is an int whose bits are seats
    levels    levels[n] is the set of the able workers with n requests in flight, where there are any

                  seats  3210
    levels[0]            0010      worker 1 is idle           low  = 0, the first level
    levels[7]            1001      workers 0 and 3            high = 7, the last one
    all                  1011      worker 2 is not able

A lease moves one bit to the next level, and its end moves it back, so that `low` and `high` move by at most one. A
question about a set goes through the levels, of which there are at most as many as workers, and in the usual case far
fewer; how far apart the loads are does not matter. A mask of a thousand bits costs hardly more than one of four: with
masks, "the candidates but the full ones" is one operation, and so is "those of them that hold this prefix", as the
prefix tree uses the same numbers (`routing.pools`).

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
    levels    the able workers by load; no level is empty
    low, high the first and the last level; 0 without workers
    """

    __slots__ = ("all", "high", "levels", "low", "on_trial")

    def __init__(self) -> None:
        self.all = 0
        self.on_trial = 0
        self.low = 0
        self.high = 0
        self.levels: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<Roster {self.all.bit_count()} workers with loads from {self.low} to {self.high}>"

    def add(self, bit: int, load: int) -> None:
        """Add a worker, in any order of loads."""
        self.levels[load] = self.levels.get(load, 0) | bit
        if not self.all or load < self.low:
            self.low = load
        if load > self.high:
            self.high = load
        self.all |= bit

    def remove(self, bit: int, load: int) -> None:
        """Remove a worker."""
        levels = self.levels
        self.all ^= bit
        rest = levels[load] ^ bit
        if rest:
            levels[load] = rest
            return
        del levels[load]
        if load == self.low:
            self.low = min(levels, default=0)
        if load == self.high:
            self.high = max(levels, default=0)

    def raised(self, bit: int, load: int) -> None:
        """Take note that the load of a worker rose by one from `load`."""
        levels = self.levels
        rest = levels[load] ^ bit
        higher = load + 1
        if rest:
            levels[load] = rest
        else:
            del levels[load]
            if load == self.low:
                self.low = higher
        levels[higher] = levels.get(higher, 0) | bit
        if higher > self.high:
            self.high = higher

    def lowered(self, bit: int, load: int) -> None:
        """Take note that the load of a worker fell by one from `load`."""
        levels = self.levels
        rest = levels[load] ^ bit
        lower = load - 1
        if rest:
            levels[load] = rest
        else:
            del levels[load]
            if load == self.high:
                self.high = lower
        levels[lower] = levels.get(lower, 0) | bit
        if lower < self.low:
            self.low = lower

    def moved(self, bit: int, load: int, other: int) -> None:
        """Take note that the load of a worker is another one, any number away."""
        if other != load:
            self.remove(bit, load)
            self.add(bit, other)

    # -- questions about a set of able workers -------------------------------------------------------------------------

    def least(self, mask: int) -> int:
        """Return the least load of a set with at least one worker."""
        return self.low if self.levels[self.low] & mask else min(self._loads(mask))

    def most(self, mask: int) -> int:
        """Return the highest load of a set with at least one worker."""
        return self.high if self.levels[self.high] & mask else max(self._loads(mask))

    def least_loaded(self, mask: int) -> int:
        """Return those of a set with the least load; the empty set for an empty one."""
        mask &= self.all
        return self.levels[self.least(mask)] & mask if mask else 0

    def at_least(self, load: int) -> int:
        """Return all workers with this load or more."""
        found = 0
        for each, level in self.levels.items():
            if each >= load:
                found |= level
        return found

    def running(self, mask: int) -> int:
        """Return the sum of the loads of a set."""
        return sum([load * (level & mask).bit_count() for load, level in self.levels.items()])

    def _loads(self, mask: int) -> list[int]:
        """Return the loads that workers of a set have, each once."""
        return [load for load, level in self.levels.items() if level & mask]


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
