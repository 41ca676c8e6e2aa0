"""Server-sent events: write the error event of a broken stream, and split a stream into whole events.

*The error event* is the last one of a stream that broke, in the format that clients of the endpoint read as an error.
The stream does not end cleanly after it: the connection closes without the final chunk, so that a client that does not
know error events notices the break too.

*Whole events.* A stream that another worker may continue must not break inside an event at the client:
`EventSplitter` passes whole events on and keeps the beginning of the next one.
"""

from __future__ import annotations

import re

import msgspec

from sglang_router.errors import RouterError
from sglang_router.wire.framing import Chunked, Framing, chunk, fill

_MAX_PADDING = 65536
"""Most bytes written to complete a chunk that the worker left open; for a larger gap, no error event is sent."""


def error_event(path: bytes, error: RouterError) -> bytes:
    """Return the error event for a stream of this endpoint: OpenAI's `{"error": ...}` unless it has its own format."""
    if path == b"/v1/messages":
        shape = {"type": "error", "error": {"type": "api_error", "message": str(error)}}
        return b"event: error\ndata: %s\n\n" % msgspec.json.encode(shape)
    if path == b"/v1/responses":
        flat = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return b"event: error\ndata: %s\n\n" % msgspec.json.encode(flat)
    return b"data: %s\n\n" % error.body()


def last_event(event: bytes, framing: Framing, chunked: bool) -> bytes | None:
    """Return the bytes that append `event` to what the client was sent; None where that is not possible.

    framing  of the worker's answer, at the break
    chunked  the client is sent the worker's chunks as they are; False: (HTTP/1.0) only their content

    A chunk that the worker left open is completed with newlines, which mean nothing between events.
    """
    event = b"\n\n" + event
    if isinstance(framing, Chunked) and not chunked:
        return event
    gap = framing.gap
    if gap is None or gap > _MAX_PADDING:
        return None
    return fill(gap) + chunk(event) if chunked else event


_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_EVENT = 1 << 24
"""Most bytes kept of one incomplete event; more are passed on, because they are no event."""


class EventSplitter:
    """Split a stream after whole events. held: the beginning of the next event."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = b""

    def feed(self, data: bytes) -> bytes:
        """Return the whole events that these bytes complete, with their empty lines; b"" when there is none."""
        if self.held:
            data = self.held + data
        elif data.endswith(b"\n\n"):  # the usual case: one read, one event
            return data
        line, pair = data.rfind(b"\n\n"), data.rfind(b"\n\r\n")
        end = max(0 if line < 0 else line + 2, 0 if pair < 0 else pair + 3)
        if not end and len(data) > _LONGEST_EVENT:
            end = len(data)
        self.held = data[end:]
        return data[:end]


def payloads(events: bytes) -> list[tuple[bytes, bytes]]:
    """Return each whole event as it came, with the empty line after it, and its data.

    The data is b"" for an event without data, such as a comment that keeps the connection alive.
    """
    if b"\r" not in events:
        return [(event + b"\n\n", _payload(event)) for event in events.split(b"\n\n")[:-1]]
    found = []
    start = 0
    for end in _END.finditer(events):
        found.append((events[start : end.end()], _payload(events[start : end.start()])))
        start = end.end()
    return found


def _payload(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:  # the usual case
        return event[6:]
    lines = event.splitlines()
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")])
