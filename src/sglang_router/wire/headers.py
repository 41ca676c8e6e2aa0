"""Builds the heads that leave the router: what is forwarded, what is dropped, what is added (RFC 9110 7.6.1).

Bodies are never touched; heads are always built anew, so nothing that is meant for one hop gets to the next one, and the
framing that is announced is the framing that is sent.
"""

from __future__ import annotations

from http import HTTPStatus

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

_RESPONSE_DROPPED = HOP_BY_HOP | {b"content-length", b"x-request-id"}

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


def request_head(
    request: Request,
    start: bytes,
    request_id: bytes,
    *,
    key: bytes | None = None,
    everything: bool = False,
) -> bytes:
    """The head of a leg.

    start       request line and Host field, each with its CRLF (they depend on worker and path only)
    request_id  sent as x-request-id
    key         the worker's own API key, used when the client sent no Authorization
    everything  forward every end-to-end field instead of the whitelist
    """
    lines = [start, b"x-request-id: ", request_id, b"\r\ncontent-length: %d\r\n" % len(request.body)]
    authorized = False
    dropped = _named_by_connection(request.headers) if everything else None
    for name, value in request.headers:
        if name == b"authorization":
            if authorized:
                continue
            authorized = True
        elif dropped is not None:
            if name in dropped or name in _REBUILT:
                continue
        elif name not in WHITELIST and not name.startswith(b"x-request-id-"):
            continue
        lines += (name, b": ", value, b"\r\n")
    if key is not None and not authorized:
        lines += (b"authorization: Bearer ", key, b"\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    return HOP_BY_HOP | named


def response_head(head: ResponseHead, request_id: bytes, *, framing: bytes, connection: bytes) -> bytes:
    """The head of a worker's answer, for the client.

    framing     the field that tells how the body ends, with CRLF; empty when the closing tells it
    connection  the Connection field with CRLF, or empty
    """
    dropped = _RESPONSE_DROPPED
    lines = [b"HTTP/1.1 %d " % head.status, head.reason or REASONS.get(head.status, b""), b"\r\n"]
    for name, value in head.headers:
        if name in dropped:
            if name == b"connection" and value.lower() not in (b"close", b"keep-alive"):
                dropped = dropped | _named_by_connection([(name, value)])
            continue
        lines += (name, b": ", value, b"\r\n")
    if dropped is not _RESPONSE_DROPPED:
        return _without(head, dropped, request_id, framing, connection)
    lines += (b"x-request-id: ", request_id, b"\r\n", framing, connection, b"\r\n")
    return b"".join(lines)


def _without(head: ResponseHead, dropped: frozenset[bytes], rid: bytes, framing: bytes, connection: bytes) -> bytes:
    """The rare answer whose Connection field names other fields, which may stand before it."""
    kept = [(name, value) for name, value in head.headers if name not in dropped]
    plain = ResponseHead(head.status, head.reason, kept, False, False, None, 0)
    return response_head(plain, rid, framing=framing, connection=connection)


def answer(
    status: int,
    body: bytes,
    *,
    content_type: bytes = b"application/json",
    extra: Headers = (),  # type: ignore[assignment]
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
        extra.append((b"retry-after", b"%d" % max(1, round(error.retry_after + 0.5))))
    return answer(error.status, error.body(), extra=extra, connection=connection)
