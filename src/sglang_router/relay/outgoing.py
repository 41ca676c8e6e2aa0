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
_SHORT: Final = 4096
"""Bytes of a piece that is not worth a write of its own."""


class Outgoing:
    """See the module."""

    __slots__ = ("_at", "_piece", "_pieces")

    def __init__(self, body: Body | Spliced) -> None:
        self._pieces = body.pieces if isinstance(body, Spliced) else [memoryview(body)]
        self._piece = 0  # that is being sent
        self._at = 0  # and how far

    def __repr__(self) -> str:
        return f"<Outgoing {self._at} bytes of piece {self._piece + 1} of {len(self._pieces)}>"

    @property
    def done(self) -> bool:
        """Whether everything was returned."""
        return self._piece >= len(self._pieces)

    def next(self) -> memoryview | bytes:
        """Return the next slice. Short pieces go with the slice before them."""
        found: memoryview | bytes = self._slice()
        while not self.done and not self._at and len(self._pieces[self._piece]) < _SHORT:
            found = bytes(found) + bytes(self._slice())
        return found

    def _slice(self) -> memoryview:
        piece, at = self._pieces[self._piece], self._at
        self._at = at + SLICE
        if self._at >= len(piece):
            self._piece += 1
            self._at = 0
        return piece[at : at + SLICE]
