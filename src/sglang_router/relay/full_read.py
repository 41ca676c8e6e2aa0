"""A read of a client's socket that takes long to parse, or may have left more in it: it is parsed in parts.

    data_received: `comes_in_parts` --> pause reading --> FullRead.step ... step --> Parted.parsed: read again

Each part is a piece of work of `relay.bulk`. What takes long are many lines, which tiny chunks and pipelined requests
have: each costs as much as kilobytes of a body.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

FULL: Final = 131072
"""Bytes of a read that may have left more in the socket: uvloop reads 256,000 bytes at most, asyncio 262,144."""
FEW: Final = 8192
"""Bytes that are parsed at once whatever they are: of tiny chunks or pipelined requests that takes a millisecond."""
_PARSED: Final = 65536
"""Bytes that are parsed in one piece when they have few lines."""
_FEW_LINES: Final = 1000
"""Lines of a piece up to which only its bytes count."""


def comes_in_parts(data: bytes) -> bool:
    """Return whether a read of more than FEW bytes is parsed in parts."""
    return len(data) >= FULL or _has_many_lines(data, 0, len(data))


def _has_many_lines(data: bytes, start: int, end: int) -> bool:
    """Return whether this stretch has too many lines for one piece.

    Looking for one takes a hundredth of the time of counting, and a usual body has none far behind its head.
    """
    return data.find(b"\n", start + FEW, end) >= 0 and data.count(b"\n", start, end) > _FEW_LINES


class Parted(Protocol):
    """A client connection, as this module sees it."""

    transport: asyncio.Transport

    def data_received(self, data: bytes) -> None:
        """Parse bytes."""

    def parsed(self) -> None:
        """Read again: all parts are parsed."""


class FullRead:
    """See the module."""

    __slots__ = ("_at", "_data", "_reader")

    def __init__(self, reader: Parted, data: bytes) -> None:
        self._reader = reader
        self._data = data
        self._at = 0

    def __repr__(self) -> str:
        return f"<FullRead {len(self._data) - self._at} bytes left>"

    def step(self) -> bool:
        """Parse the next part; return whether there is more."""
        if self._reader.transport.is_closing():
            return False
        data, start = self._data, self._at
        end = start + (FEW if _has_many_lines(data, start, start + _PARSED) else _PARSED)
        self._at = end
        self._reader.data_received(data[start:end])
        if end < len(data):
            return True
        self._reader.parsed()
        return False
