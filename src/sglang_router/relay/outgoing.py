"""A large request body on its way to a worker: its next slice is written when the socket has taken the last one.

    rest = Outgoing(body)
    rest.next() --> a view of the next slice; nothing is copied        rest.done: there is no more

One write of 50 MB holds up the event loop for as long as the system takes to copy it, and what the worker does not
take at once stands in the transport's buffer.
"""

from __future__ import annotations

from typing import Final

from sglang_router.wire.gathering import Body
from sglang_router.wire.splice import Spliced

SLICE: Final = 262144
"""Bytes of a slice: takes the system about 0.1 ms."""


class Outgoing:
    """See the module."""

    __slots__ = ("_at", "_tail", "_view")

    def __init__(self, body: Body | Spliced) -> None:
        if isinstance(body, Spliced):
            self._view, self._tail = memoryview(body.body)[: body.end], body.tail
        else:
            self._view, self._tail = memoryview(body), b""
        self._at = 0

    def __repr__(self) -> str:
        return f"<Outgoing {self._at} of {len(self._view)} bytes>"

    @property
    def done(self) -> bool:
        """Whether everything was returned."""
        return self._at >= len(self._view)

    def next(self) -> memoryview | bytes:
        """Return the next slice."""
        at = self._at
        self._at = at + SLICE
        piece = self._view[at : self._at]
        return bytes(piece) + self._tail if self.done and self._tail else piece
