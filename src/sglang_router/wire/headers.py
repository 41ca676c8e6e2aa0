"""Builds the heads that leave the router: what is forwarded, what is dropped, what is added (RFC 9110 7.6.1).

Bodies are never touched; heads are always built anew, so nothing that is meant for one hop gets to the next one, and
the framing that is announced is the framing that is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from http import HTTPStatus

import msgspec

from sglang_router.errors import RouterError
from sglang_router.wire.request import Headers, Request
from sglang_router.wire.response import ResponseHead

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
"""Request fields the router writes itself, or treats on their own."""

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
"""Request fields that reach the worker by default, besides authorization, x-request-id and x-request-id-*."""

_CORS = b"access-control-"
_PLAIN = frozenset((b"close", b"keep-alive"))
"""Values of Connection that name no other field."""

_NEVER_SENT = HOP_BY_HOP | _REBUILT
_NEVER_SENT_WITH_KEYS = _NEVER_SENT | {b"x-api-key"}
_LOOKED_AT = WHITELIST | {b"authorization", b"connection"}
_RESPONSE_DROPPED = HOP_BY_HOP | {b"content-length", b"x-request-id"}

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def request_head(
    request: Request,
    start: bytes,
    request_id: bytes,
    *,
    key: bytes | None = None,
    everything: bool = False,
    guarded: bool = False,
) -> bytes:
    """The head of a leg.

    start       request line and Host field, each with its CRLF (they depend on worker and path only)
    request_id  sent as x-request-id
    key         the worker's own API key, used when the client sent no Authorization
    everything  forward every end-to-end field instead of the whitelist
    guarded     the client's key is for the router, so it ends here, and the worker gets its own
    """
    lines = [start, b"x-request-id: ", request_id, b"\r\ncontent-length: %d\r\n" % len(request.body)]
    authorized = guarded
    never_sent = _NEVER_SENT_WITH_KEYS if guarded else _NEVER_SENT
    for name, value in request.headers:
        if name not in _LOOKED_AT:
            if name in never_sent if everything else not name.startswith(b"x-request-id-"):
                continue
        elif name == b"authorization":
            if authorized:
                continue
            authorized = True
        elif name == b"connection":
            if value.strip().lower() not in _PLAIN:  # it may name fields that stand before it
                request = _end_to_end(request)
                return request_head(request, start, request_id, key=key, everything=everything, guarded=guarded)
            continue
        lines += (name, b": ", value, b"\r\n")
    if key is not None and (guarded or not authorized):
        lines += (b"authorization: Bearer ", key, b"\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def _end_to_end(request: Request) -> Request:
    dropped = _named_by_connection(request.headers)
    headers = [(name, value) for name, value in request.headers if name not in dropped]
    return msgspec.structs.replace(request, headers=headers)


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    return HOP_BY_HOP | named


def response_head(
    head: ResponseHead, request_id: bytes, *, framing: bytes, connection: bytes, cors: bytes = b""
) -> bytes:
    """The head of a worker's answer, for the client.

    framing     the field that tells how the body ends, with CRLF; empty when the closing tells it
    connection  the Connection field with CRLF, or empty
    cors        the router's own fields of that kind, each with CRLF: they take the place of the worker's
    """
    start = b"HTTP/1.1 %d %s" % (head.status, head.reason or REASONS.get(head.status, b""))
    if head.plain:  # as a rule: the fields go on as they came, their Content-Length among them
        fields = _without_cors(head) if cors else head.fields
        return b"".join((start, fields, b"\r\nx-request-id: ", request_id, b"\r\n", connection, cors, b"\r\n"))
    dropped = _RESPONSE_DROPPED | _named_by_connection(head.headers)
    lines = [start, b"\r\n"]
    for name, value in head.headers:
        if name not in dropped and not (cors and name.startswith(_CORS)):
            lines += (name, b": ", value, b"\r\n")
    lines += (b"x-request-id: ", request_id, b"\r\n", framing, connection, cors, b"\r\n")
    return b"".join(lines)


def _without_cors(head: ResponseHead) -> bytes:
    if _CORS not in head.fields.lower():
        return head.fields
    kept = (b"\r\n%s: %s" % field for field in head.headers if not field[0].startswith(_CORS))
    return b"".join(kept)


def answer(
    status: int,
    body: bytes,
    *,
    content_type: bytes = b"application/json",
    extra: Sequence[tuple[bytes, bytes]] = (),
    connection: bytes = b"",
) -> bytes:
    """A whole response made by the router."""
    lines = [
        b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n"
        % (status, REASONS.get(status, b""), content_type, len(body))
    ]
    for name, value in extra:
        lines += (name, b": ", value, b"\r\n")
    lines += (connection, b"\r\n", body)
    return b"".join(lines)


def error_answer(error: RouterError, request_id: bytes, connection: bytes) -> bytes:
    """The response that carries an error of the router."""
    extra = [(b"x-request-id", request_id), (b"x-smg-error-code", error.code.encode())]
    if error.retry_after is not None:
        extra.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if error.challenge:
        extra.append((b"www-authenticate", error.challenge.encode()))
    return answer(error.status, error.body(), extra=extra, connection=connection)
