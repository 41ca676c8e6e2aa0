"""Keys of tables that outlive a request: bounded in length, whatever a client sends.

A client chooses its model, its routing key and its cache salt, and each may be as long as a request. A table that keeps
them after the request therefore keeps `bounded(key)`: the key itself up to 64 bytes, else its digest.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

LONGEST: Final = 64
"""Bytes of a key that is kept as it came."""


def bounded(key: bytes) -> bytes:
    """Return a key of at most 64 bytes that stands for this one.

    A digest begins with a NUL, which no header value and no JSON text contains: so no client can send a short key that
    equals the digest of a long one.
    """
    return key if len(key) <= LONGEST else b"\0" + blake2b(key, digest_size=32).digest()
