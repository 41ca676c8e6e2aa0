"""Select the header fields that are forwarded to workers, and write the head of a leg (RFC 9110 7.6.1).

The router builds each head itself: no field that concerns one connection reaches the next one, and Content-Length
always fits the body that is sent. The heads of answers are written by `relay.answers`.
"""

from __future__ import annotations

from sglang_router.wire.request import Headers, Request

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Fields that concern one connection only."""

_REBUILT = frozenset((b"host", b"content-length", b"expect", b"x-request-id", b"authorization"))
"""Request fields that the router writes itself or handles one by one."""

WHITELIST = frozenset(
    (
        b"accept",
        b"content-type",
        b"request-id",
        b"traceparent",
        b"tracestate",
        b"x-correlation-id",
        b"x-smg-routing-key",
        b"x-trace-id",
    )
)
"""Request fields that are forwarded by default, besides authorization, x-request-id and x-request-id-*."""

_PLAIN = frozenset((b"close", b"keep-alive"))
"""Values of Connection that name no other field."""

_NEVER_SENT = HOP_BY_HOP | _REBUILT
_LOOKED_AT = WHITELIST | {b"authorization", b"connection"}


class ForwardRules:
    """Which request fields are forwarded to workers.

    everything  forward every end-to-end field instead of the whitelist
    guarded     clients authenticate at the router: their key is not forwarded, and the worker gets its own
    never_sent  names of fields that are never forwarded as they came
    """

    __slots__ = ("everything", "guarded", "never_sent")

    def __init__(self, everything: bool = False, guarded: bool = False) -> None:
        self.everything = everything
        self.guarded = guarded
        self.never_sent = _NEVER_SENT | {b"x-api-key"} if guarded else _NEVER_SENT


def request_head(
    request: Request, start: bytes, request_id: bytes, length: int, key: bytes | None, rules: ForwardRules
) -> bytes:
    """Return the head of a leg.

    start       request line and Host field, each with its CRLF (they depend on worker and path only)
    request_id  sent as x-request-id
    length      bytes of the body
    key         the worker's own API key; sent when the client sent no Authorization, and always when `rules.guarded`
    """
    lines = [start, b"x-request-id: ", request_id, b"\r\ncontent-length: %d\r\n" % length]
    authorized = rules.guarded
    for name, value in request.headers:
        if name not in _LOOKED_AT:
            if name in rules.never_sent or not (rules.everything or name.startswith(b"x-request-id-")):
                continue
        elif name == b"authorization":
            if authorized:
                continue
            authorized = True
        elif name == b"connection":
            if value.strip().lower() not in _PLAIN:  # it may name fields that were already copied: start again
                return request_head(_end_to_end(request), start, request_id, length, key, rules)
            continue
        lines += (name, b": ", value, b"\r\n")
    if key is not None and (rules.guarded or not authorized):
        lines += (b"authorization: Bearer ", key, b"\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def _end_to_end(request: Request) -> Request:
    """Return the request without its Connection fields and the fields they name."""
    dropped = named_by_connection(request.headers)
    headers = [(name, value) for name, value in request.headers if name not in dropped]
    return Request(request.method, request.target, request.path, headers)


def named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Return the names of the fields that concern one connection only, including those listed in Connection."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    return HOP_BY_HOP | named
