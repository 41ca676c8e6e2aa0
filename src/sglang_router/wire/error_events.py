"""Read the first event of a stream: does it say that the engine failed, and with which status?

Engines send the head of a stream before they know whether they can answer. Then the error comes as an event:

    data: {"error": {"message": "...", "type": "...", "code": 503}}              SGLang, vLLM, llama.cpp, OpenAI
    data: {"object": "error", "message": "...", "type": "...", "code": 503}      vLLM, SGLang (older versions)
    error: {"code": 503, "message": "...", "type": "unavailable_error"}          llama.cpp (older versions)
    event: error
    data: {"type": "error", "error": {"type": "overloaded_error", "message": "..."}}        /v1/messages
    data: {"type": "error", "code": "server_error", "message": "...", "param": null}        /v1/responses

The status is the code, where that is a number; else what the code or the type stands for; 0 where neither is known.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from sglang_router.wire.sse import EventSplitter, payloads

_NAMES: Final = {
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "too_many_requests": 429,
    "api_error": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "internalservererror": 500,
    "server_error": 500,
    "badgatewayerror": 502,
    "overloaded": 503,
    "overloaded_error": 503,
    "service_unavailable": 503,
    "service_unavailable_error": 503,
    "serviceunavailableerror": 503,
    "unavailable_error": 503,
    "timeout_error": 504,
}
"""What the names of codes and types stand for, in lower case."""
_OLD: Final = b"error: "
_LONGEST_LINE: Final = 1 << 16
"""Bytes of a first line from which on it is no error, although it may go on: an error is shorter."""
_ERROR: Final = re.compile(rb'\{\s*"error"\s*:')


class FirstEvent:
    """The first event of a stream that is more than a comment or a ping.

    status  that it stands for, 400 to 599; 0: it is no error, or none with a known status
    body    the error as JSON; b"" for an event that is no error
    """

    __slots__ = ("body", "status")

    def __init__(self, status: int = 0, body: bytes = b"") -> None:
        self.status = status
        self.body = body

    def __repr__(self) -> str:
        return f"<FirstEvent {self.status or 'no error'}>"


class FirstSaid:
    """Wait for the first event of a stream that says something, or the first of its lines of JSON.

    lines  the answer is lines of JSON, not events; a first line that is an error stands for 500
    """

    __slots__ = ("_line", "_lines", "_splitter")

    def __init__(self, lines: bool) -> None:
        self._lines = lines
        self._line = b""  # the beginning of a first line
        self._splitter = EventSplitter()

    def feed(self, content: bytes, ended: bool) -> FirstEvent | None:
        """Take a piece of the answer; return the first event or line once it is there.

        ended  this is the end of the answer: it need not end its last event
        """
        if self._lines:
            return self._first_line(content, ended)
        whole = self._splitter.feed(content)
        if ended and self._splitter.holds:
            whole += self._splitter.take() + b"\n\n"
        return first_event(whole) if whole else None

    def _first_line(self, content: bytes, ended: bool) -> FirstEvent | None:
        self._line = line = (self._line + content).lstrip()
        if not line or not (b"\n" in line or ended or len(line) > _LONGEST_LINE):
            return None
        return FirstEvent(500, line.partition(b"\n")[0]) if _ERROR.match(line) else FirstEvent()


def first_event(events: bytes) -> FirstEvent | None:
    """Return the first event that says something among these whole events; None when there is none."""
    for event, data in payloads(events):
        if event.startswith(_OLD):
            data = event.removeprefix(_OLD).strip()
            return FirstEvent(_status(data, True), data)
        if data and not event.startswith(b"event: ping"):
            return FirstEvent(status, data) if (status := _status(data)) else FirstEvent()
    return None


def _status(data: bytes, failed: bool = False) -> int:
    """Return the status for which an event stands; 0 when it is no error. failed: it is one, whatever its shape."""
    if b"error" not in data and not failed:
        return 0
    try:
        event = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
    if not isinstance(event, dict):
        return 0
    error = event.get("error")
    if isinstance(error, dict):
        return _code(error)
    return _code(event) if failed or "error" in (event.get("type"), event.get("object")) else 0


def _code(error: dict[str, object]) -> int:
    for name in ("code", "status_code", "status", "type"):
        said = str(error.get(name)).lower()
        code = int(said) if said.isascii() and said.isdigit() and len(said) == 3 else _NAMES.get(said, 0)
        if 400 <= code <= 599:
            return code
    return 0
