"""Slots by the bytes that they hold, so that the smallest one is found without looking at all.

sizes    [0, 310, 4096]                 sorted, each once
slots    0: {3,4}  310: {0}  4096: {1,2}      sets of slots are bit masks, as in `routing.prefix_tree.tree`
"""

from __future__ import annotations

from bisect import bisect_left, insort


class Sizes:
    """See the module."""

    __slots__ = ("_known", "_sizes", "_slots")

    def __init__(self) -> None:
        self._known: dict[int, int] = {}  # the size of each slot
        self._slots: dict[int, int] = {}  # by size
        self._sizes: list[int] = []

    def __repr__(self) -> str:
        return f"<Sizes {self._sizes[:1]} to {self._sizes[-1:]} of {len(self._known)} slots>"

    def put(self, slot: int, size: int) -> None:
        """Take note of the size of a slot."""
        if self._known.get(slot) == size:
            return
        self.drop(slot)
        self._known[slot] = size
        slots = self._slots.get(size)
        if slots is None:
            slots = 0
            insort(self._sizes, size)
        self._slots[size] = slots | 1 << slot

    def drop(self, slot: int) -> None:
        """Forget a slot."""
        old = self._known.pop(slot, None)
        if old is not None:
            rest = self._slots[old] ^ 1 << slot
            if rest:
                self._slots[old] = rest
            else:
                del self._slots[old]
                del self._sizes[bisect_left(self._sizes, old)]

    def smallest(self, mask: int) -> int:
        """Return those slots of a mask that hold the least; 0, when they are not among the first sizes.

        It looks at so many sizes that it is quicker to look at the slots of the mask themselves if these are not found.
        """
        slots = self._slots
        for size in self._sizes[: len(self._sizes) // mask.bit_count() + 1]:
            if found := slots[size] & mask:
                return found
        return 0
