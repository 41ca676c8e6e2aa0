"""Server-sent events: write the error event of a broken stream, and split a stream into whole events.

*The error event* is the last one of a stream that broke, in the format that clients of the endpoint read as an error.
The stream does not end cleanly after it: the connection closes without the final chunk, so that a client that does not
know error events notices the break too.

*Whole events.* A stream that may end in an error must not break inside an event at the client: `EventSplitter` passes
whole events on and keeps the beginning of the next one. Lines end with LF, CRLF or CR.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from sglang_router.errors import RouterError, speaks_anthropic
from sglang_router.wire.framing import Chunked, Framing, chunk, fill

_MAX_PADDING: Final = 65536
"""Most bytes written to complete a chunk that the worker left open; for a larger gap, no error event is sent."""


def error_event(path: bytes, error: RouterError) -> bytes:
    """Return the error event for a stream of this endpoint: OpenAI's `{"error": ...}` unless it has its own format."""
    if speaks_anthropic(path):
        return b"event: error\ndata: %s\n\n" % error.body(path)
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


def keep_alive_event(path: bytes) -> bytes:
    """Return an event that says nothing: a comment, or the ping that clients of Anthropic's API know."""
    return b'event: ping\ndata: {"type": "ping"}\n\n' if speaks_anthropic(path) else b": keep-alive\n\n"


_END: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
MOST_HELD: Final = 1 << 20
"""Most bytes kept of one incomplete event; more are passed on."""


class EventSplitter:
    """Split a stream after whole events; keep the beginning of the next one.

    However a long event arrives, each byte of it is looked at and copied a fixed number of times.

    torn  the last bytes returned ended inside an event, because it is too long
    """

    __slots__ = ("_pieces", "_size", "_tail", "torn")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._tail = b""  # the last bytes of the pieces: the end of an event may begin in them
        self.torn = False

    @property
    def holds(self) -> bool:
        """Whether the beginning of an event is kept."""
        return self._size > 0

    def feed(self, data: bytes) -> bytes:
        """Return the whole events that these bytes complete, with their empty lines; b"" when there is none."""
        if not self._size and data.endswith(b"\n\n"):  # the usual case: one read, one event
            self.torn = False
            return data
        kept = len(self._tail)
        end = _last_end(self._tail + data) - kept
        if end <= 0:
            if self._size + len(data) <= MOST_HELD:
                self._keep(data)
                return b""
            end = len(data)
            self.torn = True
        else:
            self.torn = False
        whole = self.take() + data[:end]
        if end < len(data):
            self._keep(data[end:])
        return whole

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        self._tail = (self._tail + data)[-3:]

    def take(self) -> bytes:
        """Return what is kept, and keep it no more."""
        kept = b"".join(self._pieces)
        self._pieces.clear()
        self._size, self._tail = 0, b""
        return kept


def _last_end(data: bytes) -> int:
    """Return the index after the last empty line that ends an event; 0 without one.

    A CR at the very end may be half of a CRLF; where one is likely, wait for the LF.
    """
    feeds, mixed, returns = data.rfind(b"\n\n"), data.rfind(b"\n\r", 0, -1), data.rfind(b"\r\r")
    start = max(feeds, mixed, returns)
    if start < 0:
        return 0
    end = start + 2
    return end + 1 if start != feeds and data[end : end + 1] == b"\n" else end


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
    lines = _LINE_END.split(event)
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")])
