"""Read what a store answers in bounded memory: somebody else may have put entries of any size into its streams.

An entry of ours has 64 KiB at most. The client library reads a value as a whole, up to 512 MB of it, and hundreds of
them in one answer; here one that is too long is read past, and counts as empty. So it is dropped like everything that
no router wrote, and what follows it is read.
"""

from __future__ import annotations

from typing import Final

from valkey._parsers import _AsyncRESP2Parser
from valkey.exceptions import ConnectionError as NoConnection

LONGEST: Final = 1 << 17
"""Bytes of a value that are kept."""
_PIECE: Final = 1 << 16


class BoundedParser(_AsyncRESP2Parser):
    """See the module."""

    async def _read(self, length: int) -> bytes:
        """Return a value, whose size was read; b"" for one that is too long. Raises: NoConnection."""
        if length <= LONGEST:
            return await super()._read(length)
        if self._stream is None:
            raise NoConnection("the connection to the store is closed")
        end = self._pos + length + 2
        left = end - max(len(self._buffer), self._pos)
        while left > 0:
            piece = await self._stream.read(min(left, _PIECE))
            if not piece:
                raise NoConnection("the store closed the connection within a value")
            left -= len(piece)
        self._pos = end
        return b""
