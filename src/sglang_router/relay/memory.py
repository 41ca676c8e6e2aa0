"""The memory of large bodies: let it grow and go back to the system in short steps.

Growing: glibc may place blocks of up to 32 MB in its heap, where one that grows is copied. `keep_apart` makes each
block of more than `_APART` bytes a mapping, which the system moves without a copy.

Going back: freeing 50 MB at once takes 6 ms, because the system takes back each of 12,000 pages. `Discarded` gives them
back first, in pieces of `relay.bulk`; freeing the rest then takes no time.

Where the system has no such calls, both do nothing.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

_APART: Final = 1 << 20
_KEPT: Final = 1 << 23
"""Free bytes at the end of the heap above which glibc gives them back."""
_SLICE: Final = 1 << 22
"""Bytes that are given back in one piece of work, which takes about 0.5 ms."""
_TURNS: Final = 100
"""Turns of the loop to wait while somebody still looks at the body, such as a connection that is being aborted."""

_SYSTEM: Final = ctypes.CDLL(None)
_DONT_NEED: Final = getattr(mmap, "MADV_DONTNEED", -1)
_madvise = getattr(_SYSTEM, "madvise", None) if _DONT_NEED >= 0 else None
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_apart() -> None:
    """Make each large block of this process a mapping of its own."""
    mallopt = getattr(_SYSTEM, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _APART)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


class Discarded:
    """A body that nobody needs. `relay.bulk` calls `step`."""

    __slots__ = ("_at", "_body", "_turns")

    def __init__(self, body: bytearray) -> None:
        self._body = body
        self._at = 0
        self._turns = 0

    def __repr__(self) -> str:
        return f"<Discarded {self._at} of {len(self._body)} bytes>"

    def step(self) -> bool:
        """Give back a slice; return whether there is more."""
        body = self._body
        if _madvise is None:
            return False
        try:
            body.pop()  # not allowed while somebody looks at it
        except BufferError:
            self._turns += 1
            return self._turns < _TURNS
        start = ctypes.addressof(ctypes.c_char.from_buffer(body))
        page = mmap.PAGESIZE
        first = -(-(start + self._at) // page) * page
        self._at = min(self._at + _SLICE, len(body))
        length = (start + self._at) // page * page - first
        if length > 0:
            _madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONT_NEED)
        return self._at < len(body)
