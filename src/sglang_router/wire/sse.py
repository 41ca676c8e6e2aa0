"""Streams of server-sent events: the last one after a break, and where one ends and the next begins.

*The last event* of a stream that a worker broke off, in the shape that the protocol's clients read as an error. A
stream is never ended cleanly after it: the connection closes without the final chunk, so that a client which knows
nothing of error events notices as well.

*Whole events.* A stream that may be continued by another worker must never break inside an event at the client:
`EventSplitter` lets whole events through and holds the beginning of the next one back.
"""

from __future__ import annotations

import re

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


_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_EVENT = 1 << 24
"""Bytes of one event that are held back at most; what is longer is no event."""


class EventSplitter:
    """Cuts a stream behind whole events. `held` is what came of the next one."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events there are now, with their ends; b"" when there is none."""
        if self.held:
            data = self.held + data
        elif data.endswith(b"\n\n"):  # as a rule: one read, one event
            return data
        line, pair = data.rfind(b"\n\n"), data.rfind(b"\n\r\n")
        end = max(0 if line < 0 else line + 2, 0 if pair < 0 else pair + 3)
        if not end and len(data) > _LONGEST_EVENT:
            end = len(data)
        self.held = data[end:]
        return data[:end]


def payloads(events: bytes) -> list[tuple[bytes, bytes]]:
    """Each whole event as it came, its end included, and its data; b"" for one without (a comment, to keep alive)."""
    if b"\r" not in events:
        return [(event + b"\n\n", _payload(event)) for event in events.split(b"\n\n")[:-1]]
    found = []
    start = 0
    for end in _END.finditer(events):
        found.append((events[start : end.end()], _payload(events[start : end.start()])))
        start = end.end()
    return found


def _payload(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:  # as a rule
        return event[6:]
    lines = event.splitlines()
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")])


def chunk(data: bytes) -> bytes:
    """Bytes in the chunked coding (RFC 9112 7.1); not for b"", which would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)
