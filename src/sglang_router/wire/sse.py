"""The last event of a stream that a worker broke off, in the shape that the protocol's clients read as an error.

A stream is never ended cleanly after it: the connection closes without the final chunk, so that a client which knows
nothing of error events notices as well.
"""

from __future__ import annotations

import msgspec

from sglang_router.errors import RouterError
from sglang_router.wire.response import Chunked, Framing

_MAX_PADDING = 65536
"""Bytes written to fill a chunk the worker left open; a larger hole is not filled, the connection just closes."""


def error_event(path: bytes, error: RouterError) -> bytes:
    """The event for a stream of this endpoint: OpenAI's `{"error": ...}` unless the endpoint has a shape of its own."""
    if path == b"/v1/messages":
        shape = {"type": "error", "error": {"type": "api_error", "message": str(error)}}
        return b"event: error\ndata: %s\n\n" % msgspec.json.encode(shape)
    if path == b"/v1/responses":
        flat = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return b"event: error\ndata: %s\n\n" % msgspec.json.encode(flat)
    return b"data: %s\n\n" % error.body()


def farewell(event: bytes, framing: Framing, chunked: bool) -> bytes | None:
    """The bytes that put `event` behind what the client already has; None where that cannot be done.

    `chunked` says whether the client is sent the chunks as they are, or (HTTP/1.0) their content.

    A chunk the worker left open is filled up with newlines, which mean nothing between events.
    """
    if isinstance(framing, Chunked) and not chunked:
        return b"\n\n" + event
    gap = framing.gap
    if gap is None or gap > _MAX_PADDING:
        return None
    event = b"\n\n" + event
    if not chunked:
        return event
    filled = b"" if not gap else (b"\n" * gap)[: max(0, gap - 2)] + b"\r\n"[max(0, 2 - gap) :]
    return filled + b"%x\r\n%s\r\n" % (len(event), event)
