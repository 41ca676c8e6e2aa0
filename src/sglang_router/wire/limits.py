"""The limits on one request of a client."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """The limits on one request.

    head_bytes    bytes of the request line and all fields
    header_count  number of fields
    body_bytes    bytes of the body, without its transfer coding
    ahead_bytes   bytes of further requests that are read while one is answered
    """

    head_bytes: int = 65536
    header_count: int = 128
    body_bytes: int = 512 << 20
    ahead_bytes: int = 65536
