"""Lists of 64-bit numbers as bytes, little-endian on every machine."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Final

SIZE: Final = 8
"""Bytes of a number."""
_SWAPS: Final = sys.byteorder == "big"


def packed(values: Iterable[int]) -> bytes:
    """Return numbers from 0 to 2**64 - 1 as bytes."""
    found = array("Q", values)
    if _SWAPS:
        found.byteswap()
    return found.tobytes()


def numbers(data: bytes) -> list[int]:
    """Return the numbers in bytes. Raises: ValueError, when there are not whole ones."""
    found = array("Q")
    found.frombytes(data)
    if _SWAPS:
        found.byteswap()
    return found.tolist()
