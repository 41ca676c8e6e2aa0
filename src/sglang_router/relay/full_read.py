"""A read of a client's socket that may have left more in it: it is parsed in parts, then the socket is read again.

    data_received: FULL bytes or more --> pause reading --> FullRead.step ... step --> Parted.parsed: read again

Each part is a piece of work of `relay.bulk`.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

FULL = 131072
"""Bytes of a read that may have left more in the socket: uvloop reads 256,000 bytes at most, asyncio 262,144."""
_PARSED = 65536
"""Bytes that are parsed in one piece: of tiny chunks or pipelined requests that takes milliseconds."""


class Parted(Protocol):
    """A client connection, as this module sees it."""

    transport: asyncio.Transport

    def data_received(self, data: bytes) -> None:
        """Parse bytes."""

    def parsed(self) -> None:
        """Read again: all parts are parsed."""


class FullRead:
    """See the module."""

    __slots__ = ("_reader", "_rest")

    def __init__(self, reader: Parted, data: bytes) -> None:
        self._reader = reader
        self._rest = data

    def __repr__(self) -> str:
        return f"<FullRead {len(self._rest)} bytes left>"

    def step(self) -> bool:
        """Parse the next part; return whether there is more."""
        if self._reader.transport.is_closing():
            return False
        part, self._rest = self._rest[:_PARSED], self._rest[_PARSED:]
        self._reader.data_received(part)
        if self._rest:
            return True
        self._reader.parsed()
        return False
