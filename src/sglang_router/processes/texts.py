"""Long routing texts cross to the decider in shared memory: a ring, from which the decider reads in the order of asks.

    0           oldest                 newest              size
    |  free     |  texts not read yet  |  free             |
                     put --> at the newest end, whole; where the rest is too short, at 0
                     free <-- the oldest: the decider has answered its ask, so it has read the text

The relay owns all positions; the decider only reads where an ask says so. docs/performance.md has what was measured.
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import Final

SHARED: Final = 1 << 14
"""Bytes of a text from which it crosses in shared memory: from here on that costs less CPU than a place in a frame."""
SIZE: Final = 1 << 24
"""Bytes of the memory of one relay; the system provides what is used."""


def shared_memory() -> mmap.mmap:
    """Make memory that processes share which are forked from this one."""
    return mmap.mmap(-1, SIZE)


class TextRing:
    """See the module."""

    __slots__ = ("_memory", "_newest", "_size", "_taken")

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._memory = memory
        self._size = len(memory)
        self._newest = 0  # where the free part behind the newest text begins
        self._taken: deque[tuple[int, int]] = deque()  # begin and end of each text, the oldest first

    def __repr__(self) -> str:
        return f"<TextRing {len(self._taken)} texts>"

    def put(self, text: bytes) -> int:
        """Copy a text; return its place, or -1 when there is no room for it now."""
        size = len(text)
        at = self._place(size)
        if at >= 0:
            self._memory[at : at + size] = text
            self._taken.append((at, at + size))
            self._newest = at + size
        return at

    def _place(self, size: int) -> int:
        if not self._taken:
            return 0 if size <= self._size else -1
        oldest, newest = self._taken[0][0], self._newest
        if newest <= oldest:  # the texts go over the end
            return newest if newest + size <= oldest else -1
        if newest + size <= self._size:
            return newest
        return 0 if size <= oldest else -1

    def free(self) -> None:
        """Give back the oldest text: it was read."""
        self._taken.popleft()

    def clear(self) -> None:
        """Give back all texts: nobody will read them."""
        self._taken.clear()
