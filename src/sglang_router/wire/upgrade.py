"""WebSockets as far as a router sees them (RFC 6455 4, RFC 9110 7.8): the request for one, and its answer 101.

    upgrades = Upgrades((b"/v1/realtime",))
    upgrades(b"GET", b"/v1/realtime?model=m", headers)     an UpgradeRequest; None: an upgrade that nobody takes
    keyed(headers), is_13(headers)                         whether its key, and its version, are those of a WebSocket
    refusal_of(answer)                                     why an answer with status 101 cannot be passed on; ""
    switching_head(answer, request_id, decision)           that answer for the client

What goes on behind the 101 are bytes: the router reads no frames. Browsers cannot set Authorization, so clients of
OpenAI's API send their key as a subprotocol, `openai-insecure-api-key.KEY`: it is a credential like any other.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from sglang_router.wire.headers import BROWSER_KEY, PROTOCOL, SWITCHES, UpgradeRequest, named_by_connection
from sglang_router.wire.request import Headers, Request
from sglang_router.wire.response import ResponseHead
from sglang_router.wire.rewriting import origin_form

_WEBSOCKET: Final = b"websocket"
_KEY: Final = b"sec-websocket-key"
_NONCE: Final = re.compile(rb"[A-Za-z0-9+/]{22}==")
_VERSION: Final = b"sec-websocket-version"
_REPLACED: Final = frozenset((b"x-request-id", b"content-length"))
_DECISION: Final = (b"x-sglang-router-decision", b"x-sglang-router-worker")


class Upgrades:
    """Recognises the requests for a WebSocket. paths: those that have one."""

    __slots__ = ("_paths",)

    def __init__(self, paths: Collection[bytes]) -> None:
        self._paths = frozenset(paths)

    def __repr__(self) -> str:
        return f"<Upgrades of {len(self._paths)} paths>"

    def __call__(self, method: bytes, target: bytes, headers: Headers) -> Request | None:
        """Return the request of a head that offers an upgrade; None: the offer is ignored."""
        target = origin_form(target)
        path = target.partition(b"?")[0]
        if method != b"GET" or path not in self._paths or _values(headers, b"upgrade") != [_WEBSOCKET]:
            return None
        return UpgradeRequest(method, target, path, headers, False, False)


def _values(headers: Headers, name: bytes) -> list[bytes]:
    """Return what a list in a field says, in lower case."""
    found: list[bytes] = []
    for key, value in headers:
        if key == name:
            found += [part.strip().lower() for part in value.split(b",")]
    return found


def keyed(headers: Headers) -> bool:
    """Return whether a request has one Sec-WebSocket-Key, and that is one (RFC 6455 4.2.1)."""
    keys = [value.strip() for name, value in headers if name == _KEY]
    return len(keys) == 1 and _NONCE.fullmatch(keys[0]) is not None


def is_13(headers: Headers) -> bool:
    """Return whether a request asks for the version of the protocol that all engines speak."""
    return _values(headers, _VERSION) == [b"13"]


def key_of(headers: Headers) -> bytes | None:
    """Return the key that a browser's client sends as a subprotocol; None: it sends none."""
    for name, value in headers:
        if name == PROTOCOL:
            for part in value.split(b","):
                if part.strip().startswith(BROWSER_KEY):
                    return part.strip()[len(BROWSER_KEY) :]
    return None


def refusal_of(head: ResponseHead) -> str:
    """Say why a 101 cannot be passed on; "" if it can."""
    fields = head.headers
    if _values(fields, b"upgrade") != [_WEBSOCKET] or b"upgrade" not in _values(fields, b"connection"):
        return "The worker switched to a protocol that nobody asked for."
    if head.chunked or head.content_length:
        return "The worker's answer 101 has a body."
    return ""


def switching_head(head: ResponseHead, request_id: bytes, decision: bytes) -> bytes:
    """Return the head of a 101 for the client. decision: what it is told of the decision, or b""."""
    dropped = named_by_connection(head.headers) | _REPLACED
    lines = [b"HTTP/1.1 101 Switching Protocols\r\n", SWITCHES]
    for name, value in head.headers:
        if name not in dropped and not (decision and name.startswith(_DECISION)):
            lines += (name, b": ", value, b"\r\n")
    lines += (b"x-request-id: ", request_id, b"\r\n", decision, b"\r\n")
    return b"".join(lines)


def foreign_origin(headers: Headers) -> bool:
    """Return whether a page of another site makes the request: browsers name its origin, other clients do not."""
    origin = host = b""
    for name, value in headers:
        if name == b"origin":
            origin = value
        elif name == b"host":
            host = value
    return origin != b"" and origin.partition(b"://")[2].lower() != host.strip().lower()
