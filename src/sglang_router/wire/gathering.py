"""Gather the pieces of a request's body, as the reads of the socket cut it.

    body = piece                                     the first one, which usually is all
    body = gather(body, pieces, piece, announced)    each further one
    body = whole(body, pieces)                       the end

A buffer that grows with each piece is copied several times. So the pieces of a body of up to `_JOINED` announced bytes
are kept until all are here, and joined once, unless they are tiny: a list of those would take many times the memory of
the body. All other bodies are one buffer, which is never joined or copied.
"""

from __future__ import annotations

from typing import Final

Body = bytes | bytearray
"""A body. A very large one that came in several pieces is the buffer they were gathered in. Nobody changes it."""

_JOINED: Final = 1 << 20
"""Announced bytes up to which pieces are joined at the end: more would take the event loop too long at once."""
_PIECE: Final = 4096
"""Bytes of a piece that is kept."""
_BYTES_UP_TO: Final = 65536
"""Bytes up to which a buffer is made bytes: copying it costs less than a second type."""


def gather(body: Body, pieces: list[bytes], piece: bytes, announced: int, last: bool) -> Body:
    """Add a piece that is not the first; return the body so far, without those in `pieces`.

    announced  Content-Length; -1: the body is chunked
    last       nothing follows this piece, as far as is announced
    """
    if isinstance(body, bytearray):
        body += piece
        return body
    if 0 < announced <= _JOINED and (last or len(piece) >= _PIECE):
        pieces.append(piece)
        return body
    buffer = bytearray(b"".join((body, *pieces)))
    pieces.clear()
    buffer += piece
    return buffer


def whole(body: Body, pieces: list[bytes]) -> Body:
    """Return the complete body; `pieces` is empty then."""
    if pieces:
        body = b"".join((body, *pieces))
        pieces.clear()
        return body
    return bytes(body) if len(body) <= _BYTES_UP_TO else body
