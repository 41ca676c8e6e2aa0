"""Prompts that wait to be told to the other routers, in their order: bounded, and divided as messages need it."""

from __future__ import annotations

from typing import Final

MOST_HASHES: Final = 5120
"""Hashes of one message: 40 kB; prompts and workers take 16 kB at most."""
MOST_HEADS: Final = 1024
"""Prompts of one message."""
MOST_GROWN: Final = 1 << 30
_MOST_WAITING: Final = 4 * MOST_HASHES
"""Hashes that wait; more of one flush are not told."""

Prompts = tuple[list[tuple[int, int, int]], list[int]]
"""Of each one name of the worker, number of hashes, and bytes that were new at the worker; and the hashes of all."""


class Untold:
    """See the module."""

    __slots__ = ("_heads", "_keys")

    def __init__(self) -> None:
        self._heads: list[tuple[int, int, int]] = []
        self._keys: list[int] = []

    def __repr__(self) -> str:
        return f"<Untold: {len(self._heads)} prompts>"

    def __len__(self) -> int:
        return len(self._heads)

    def add(self, name: int, grown: int, keys: list[int]) -> bool:
        """Add a prompt; return False, and do nothing, when too many wait.

        name  of the worker; grown: bytes that were new there; keys: its hashes
        """
        if len(self._keys) + len(keys) > _MOST_WAITING:
            return False
        self._heads.append((name, len(keys), min(grown, MOST_GROWN)))
        self._keys += keys
        return True

    def take(self, heads: int, hashes: int) -> Prompts:
        """Remove and return the first ones, up to so many prompts and hashes."""
        count = number = 0
        for _, more, _ in self._heads[:heads]:
            if count + more > hashes:
                break
            count += more
            number += 1
        found = self._heads[:number], self._keys[:count]
        del self._heads[:number], self._keys[:count]
        return found
