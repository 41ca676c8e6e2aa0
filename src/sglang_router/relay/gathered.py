"""Gather the body of one answer, up to a limit: what must be read as a whole before it is decided what follows.

head --> Gathered.data ... --> then(head, whole body, done)        done False: it is longer than the limit
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sglang_router.wire.response import ResponseHead

Then = Callable[[ResponseHead, bytes, bool], None]
"""Takes the head, what was gathered, and whether that is all."""


class GatheredLeg(Protocol):
    """A leg, as this module sees it."""

    def handle_by(self, sink: None) -> None:
        """Let the body pass as it comes."""

    def holding(self) -> None:
        """Take note that the worker sent something that is held."""


class Gathered:
    """See the module. It is the sink of a leg's body. most: bytes that are kept."""

    __slots__ = ("_head", "_held", "_most", "_size", "_then")

    def __init__(self, head: ResponseHead, most: int, then: Then) -> None:
        self._head = head
        self._most = most
        self._then = then
        self._held: list[bytes] = []
        self._size = 0

    def __repr__(self) -> str:
        return f"<Gathered {self._size} bytes of at most {self._most}>"

    def data(self, leg: GatheredLeg, data: bytes, done: bool) -> None:
        """Keep bytes; pass all of them on at the end, or when they are too many."""
        self._held.append(data)
        self._size += len(data)
        if done or self._size > self._most:
            leg.handle_by(None)
            self._then(self._head, b"".join(self._held), done)
        else:
            leg.holding()
