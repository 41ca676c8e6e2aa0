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

from typing import Final

import msgspec

from sglang_router.wire.sse import payloads

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
