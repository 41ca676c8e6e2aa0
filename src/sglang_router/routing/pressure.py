"""Cache pressure: what a miss costs beside its own prefill, measured by what is used again after how long.

    D       bytes of prompts that are new: no worker ever had them
    R(a)    bytes that were used again after more than a seconds: hits, and prompts that come back after their eviction

Every byte that becomes old dies or is used again, and as many die as are born. So of the bytes that have not been used
for a seconds, R(a) are used again for D that are not. A miss in a full cache evicts what was used last a seconds ago,
byte for byte. The share p = R / (R + D) of it comes back, is read again and evicts in turn, p of which comes back:

    p + p^2 + p^3 ... = p / (1 - p) = R(a) / D        seconds of prefill that a second of prefill takes from others

A request that leaves the worker that has its prefix also leaves a copy there that is of no use, and takes the room of
as much. So it is twice that: alpha = 1 + 2 R(a) / D. With ample caches, where nothing is evicted or nothing comes back,
alpha is 1. It is lower at a worker with an old tail, so new prompts go where they push out least.

What was there once is remembered by checksums of prompts' beginnings, of 64, 96, 128, 192, 256 ... bytes, which takes
few bytes and no text. Only those that are longer than a quarter of their prompt count: at most five.
"""

from __future__ import annotations

import zlib
from typing import Final

_FIRST: Final = 64
"""Bytes of the shortest beginning that is remembered."""
_OF_SIZE: Final = 2
"""Beginnings of less than the size of a prompt >> _OF_SIZE are passed over."""
_MOST_SEEN: Final = 1 << 15
"""Beginnings that are remembered; the oldest are forgotten first."""
_LEAST_MEMORY: Final = 1 << 12
"""Bytes of new prompts after which half is forgotten, at least."""
_DOUBT: Final = 0.05
"""How much of that memory counts as new until something is known."""
_MOST: Final = 32.0
"""Seconds that one second of prefill takes from others at most."""
_BUCKETS: Final = 20
"""Ages by powers of two of seconds."""
_FULL_UNIT: Final = 1e9


class Pressure:
    """See the module."""

    __slots__ = ("_born", "_memory", "_seen", "_unit", "_used_again")

    def __init__(self) -> None:
        # Newer bytes weigh more than older ones, by a unit that grows: so nothing needs to fade.
        self._unit = 1.0
        self._born = 0.0
        self._used_again = [0.0] * _BUCKETS  # by the bucket of an age: the bytes used again after that or longer
        self._memory = float(_LEAST_MEMORY)
        self._seen: dict[int, tuple[int, float]] = {}  # the workers that have had it; when it was read last

    def __repr__(self) -> str:
        return f"<Pressure {self.evicting(0.0):.2f} at once, {self.evicting(64.0):.2f} after a minute>"

    def evicting(self, age: float) -> float:
        """Return the seconds of prefill that evicting takes from others, for each second of prefill.

        age  seconds since what is evicted was used; negative, or minus infinity: there is nothing to evict
        """
        if age < 0.0:
            return 0.0
        bucket = int(age).bit_length()
        if bucket >= _BUCKETS:
            return 0.0
        taken = 2.0 * self._used_again[bucket] / (self._born + _DOUBT * self._memory * self._unit)
        return taken if taken < _MOST else _MOST

    def used(self, size: int, age: float) -> None:
        """Take bytes that were used again after an age."""
        weight = size * self._unit
        used = self._used_again
        for bucket in range(min(int(age).bit_length(), _BUCKETS - 1) + 1):
            used[bucket] += weight

    def inserted(self, namespace: bytes, text: bytes, known: tuple[int, int], owner: int, new: int, now: float) -> None:
        """Take an insertion.

        known  bytes of the text that the chosen worker had, and that some worker had
        owner  the set of the chosen worker
        new    bytes that it did not have
        """
        back, age = self._look(namespace, text, known, owner, now) if len(text) >= _FIRST else (0, 0.0)
        back = min(back, new)
        if back:
            self.used(back, age)
        self._born += (new - back) * self._unit
        self._unit *= 1.0 + new / self._memory
        if self._unit > _FULL_UNIT:
            self._shrink()

    def remember(self, held: int) -> None:
        """Let half be forgotten after as many new bytes as all workers hold."""
        self._memory = float(max(held, _LEAST_MEMORY))

    def _shrink(self) -> None:
        self._born /= self._unit
        self._used_again = [weight / self._unit for weight in self._used_again]
        self._unit = 1.0

    def _look(self, namespace: bytes, text: bytes, known: tuple[int, int], owner: int, now: float) -> tuple[int, float]:
        """Remember the beginnings of a text that a worker does not have.

        Return how many bytes of it were evicted, and how long ago they were used.
        """
        size, seen = len(text), self._seen
        mine, anybodys = known
        view = memoryview(text)
        above = max(mine, size >> _OF_SIZE, _FIRST - 1)
        power = 1 << (above.bit_length() - 1)  # not above `above`
        checked, last, at, used = zlib.crc32(namespace), 0, 0, now
        while power <= size:
            for mark in (power, power + (power >> 1)):
                if above < mark <= size:
                    checked = zlib.crc32(view[at:mark], checked)
                    at = mark
                    key = mark << 32 | checked
                    owners, then = seen.pop(key, (0, now))
                    if owners & owner or (owners and mark > anybodys):
                        last, used = mark, then
                    seen[key] = owners | owner, now
            power <<= 1
        while len(seen) > _MOST_SEEN:
            del seen[next(iter(seen))]
        if not last:
            return 0, 0.0
        return (size if last == at else last) - mine, now - used
