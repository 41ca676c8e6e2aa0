"""Write every head and every error answer that the router sends to clients; no other module writes them.

    error_answer(error, ...)       a complete answer for an error of the router
    plain_answer(status, ...)      another complete answer of the router
    worker_head(head, ...)         the head of a worker's answer
    app_head(status, ...)          the head of an answer of the control plane
    connection_field(...)          the Connection field, where it is needed (RFC 9112 9.3)

`Answers` adds what is the same for all requests of a port: the rule for request ids, and the CORS fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Final

from sglang_router.errors import RouterError
from sglang_router.routing.model_names import plain_name
from sglang_router.routing.plan import PlannedLeg, RequestTag
from sglang_router.wire.cors import Cors
from sglang_router.wire.framing import Framing, Sized, UntilClose
from sglang_router.wire.headers import HOP_BY_HOP, named_by_connection
from sglang_router.wire.request import Headers, Request
from sglang_router.wire.request_id import RequestIds
from sglang_router.wire.response import ResponseHead

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
"""The interim answer for a client that waits for it before it sends its body."""

_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_CORS: Final = b"access-control-"
_DECISION: Final = b"x-sglang-router-decision"
_WORKER: Final = b"x-sglang-router-worker"
_MODEL: Final = b"x-sglang-router-model"
_LIMITS: Final = b"x-ratelimit-"
_PRINTABLE: Final = bytes(range(0x20, 0x7F))
_UNESCAPED: Final = frozenset(_PRINTABLE) - frozenset(b'%"')
_DROPPED: Final = HOP_BY_HOP | {b"content-length", b"x-request-id"}


def connection_field(keep_alive: bool, http10: bool) -> bytes:
    """Return the Connection field with its CRLF; b"" where it would repeat the default of the HTTP version."""
    if not keep_alive:
        return b"connection: close\r\n"
    return b"connection: keep-alive\r\n" if http10 else b""


def plain_answer(
    status: int, body: bytes, extra: Sequence[tuple[bytes, bytes]], tail: bytes, content_type: bytes = b""
) -> bytes:
    """Return a complete answer of the router.

    extra         fields of the head
    tail          further fields, each with its CRLF
    content_type  b"" for application/json
    """
    lines = [
        b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n"
        % (status, _REASONS.get(status, b""), content_type or b"application/json", len(body))
    ]
    for name, value in extra:
        lines += (name, b": ", value, b"\r\n")
    lines += (tail, b"\r\n", body)
    return b"".join(lines)


def error_answer(error: RouterError, request_id: bytes, tail: bytes, head: bool = False, path: bytes = b"") -> bytes:
    """Return the answer for an error of the router.

    tail  further fields, each with its CRLF
    head  the request was HEAD, so the body is left out
    path  of the request: clients of /v1/messages expect another shape
    """
    fields = [(b"x-request-id", request_id), (b"x-smg-error-code", error.code.encode())]
    if error.retry_after is not None:
        fields.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    fields += ((name.encode(), value.encode()) for name, value in error.fields)
    whole = plain_answer(error.status, error.body(path), fields, tail)
    return whole[: whole.index(b"\r\n\r\n") + 4] if head else whole


def worker_head(
    head: ResponseHead, request_id: bytes, framing: bytes, connection: bytes, cors: bytes = b"", decision: bytes = b""
) -> bytes:
    """Return the head of a worker's answer as the client gets it.

    framing     Content-Length or Transfer-Encoding with CRLF; b"" when `head` has the length or the close ends the body
    connection  the Connection field with CRLF, or b""
    cors        the router's own CORS fields, each with CRLF: they replace the worker's; b"": keep the worker's
    decision    what the router tells of its decision, likewise: a worker may be a router too
    """
    start = b"HTTP/1.1 %d %s" % (head.status, head.reason or _REASONS.get(head.status, b""))
    replaced: tuple[bytes, ...] = (_CORS,) if cors else ()
    if decision:
        replaced += tuple([name for name in (_DECISION, _WORKER, _MODEL, _LIMITS) if name in decision])
    own = b"%b%b%b\r\n" % (connection, cors, decision)
    if head.plain:  # the usual case: pass the fields on as they came, including Content-Length
        fields = _without(head, replaced) if replaced else head.fields
        return b"".join((start, fields, b"\r\nx-request-id: ", request_id, b"\r\n", own))
    dropped = _DROPPED | named_by_connection(head.headers)
    lines = [start, b"\r\n"]
    for name, value in head.headers:
        if name not in dropped and not name.startswith(replaced):
            lines += (name, b": ", value, b"\r\n")
    lines += (b"x-request-id: ", request_id, b"\r\n", framing, own)
    return b"".join(lines)


def _without(head: ResponseHead, prefixes: tuple[bytes, ...]) -> bytes:
    """Return the fields of a head without those whose names begin so, each with the CRLF before it."""
    spelled = head.fields.lower()
    if not any(prefix in spelled for prefix in prefixes):
        return head.fields
    kept = (b"\r\n%s: %s" % field for field in head.headers if not field[0].startswith(prefixes))
    return b"".join(kept)


def app_head(status: int, fields: Iterable[tuple[bytes, bytes]], request_id: bytes, tail: bytes) -> bytes:
    """Return the head of an answer of the control plane.

    tail  framing, Connection and CORS fields, each with its CRLF
    """
    lines = [b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, b""))]
    for name, value in fields:
        lines += (name, b": ", value, b"\r\n")
    lines += (tail, b"x-request-id: ", request_id, b"\r\n\r\n")
    return b"".join(lines)


def decision_fields(tag: RequestTag, leg: PlannedLeg | None, retries: int, by_id: bool) -> bytes:
    """Return the fields that tell a client which worker was chosen and why, each with its CRLF.

        x-sglang-router-decision: hit; matched=3000; total=4000; attempt=1; id="chatcmpl-4f"
        x-sglang-router-worker: http://10.0.0.7:30000

    The first is a structured field (RFC 9651): the policy's reason, `none` without a worker, with parameters. An
    id that is not printable ASCII is a display string: id=%"f%c3%bcr".

    leg    the last one; None: no worker was asked, and the second field is missing
    by_id  call the worker by its id, not by its URL
    """
    shown = _structured(tag.raw_id)
    if leg is None:
        return b"%s: none; attempt=0; id=%s\r\n" % (_DECISION, shown)
    worker = leg.target.worker_id if by_id else leg.target.name
    return b"%s: %s; matched=%d; total=%d; attempt=%d; id=%s\r\n%s: %s\r\n" % (
        _DECISION,
        leg.branch.encode(),
        leg.matched,
        leg.total,
        retries + 1,
        shown,
        _WORKER,
        worker.encode(),
    )


def model_field(model: bytes) -> bytes:
    """Return the field that tells a client which model served, where that is another one than it has named.

    What is not printable ASCII is percent-encoded (RFC 3986 2.1). model: its name as JSON text.
    """
    name = plain_name(model.decode("utf-8", "replace")).encode("utf-8", "replace")
    shown = b"".join([b"%c" % each if each in _UNESCAPED else b"%%%02x" % each for each in name])
    return b"%s: %s\r\n" % (_MODEL, shown)


def _structured(request_id: bytes) -> bytes:
    """Return an id as an item of a structured field: a string, or a display string (RFC 9651 3.3.3 and 3.3.8)."""
    if not request_id.translate(None, _PRINTABLE):
        return b'"%s"' % request_id.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    try:
        request_id.decode()
    except UnicodeDecodeError:
        request_id = request_id.decode("latin-1").encode()
    return b'%%"%s"' % b"".join([b"%c" % each if each in _UNESCAPED else b"%%%02x" % each for each in request_id])


class Answers:
    """Writes the answers of one port.

    ids     the rule for request ids
    cors    which web pages may read the answers; None: the router adds no CORS fields
    always  tell every client which worker was chosen and why, not only those that ask
    by_id   call workers by their ids then
    """

    __slots__ = ("always", "by_id", "cors", "ids")

    def __init__(self, ids: RequestIds, cors: Cors | None = None, always: bool = False, by_id: bool = False) -> None:
        self.ids = ids
        self.cors = cors
        self.always = always
        self.by_id = by_id

    def decision(self, tag: RequestTag, leg: PlannedLeg | None, retries: int) -> bytes:
        """Return what the client is told of the decision, and of its limits; b"" when it does not ask, gets the model
        that it has named, and has no limits.

        See `decision_fields` and `model_field`.
        """
        told = decision_fields(tag, leg, retries, self.by_id) if tag.explained or self.always else b""
        if tag.limits:
            told += tag.limits
        return told if leg is None or not leg.model else told + model_field(leg.model)

    def cors_fields(self, headers: Headers) -> bytes:
        """Return the router's own CORS fields for an answer to a request with these headers; b"" without CORS."""
        return b"" if self.cors is None else self.cors.fields(headers)

    def tail(self, request: Request, keep_alive: bool) -> bytes:
        """Return the Connection and CORS fields of an answer."""
        return connection_field(keep_alive, request.http10) + self.cors_fields(request.headers)

    def error(
        self, error: RouterError, request: Request, request_id: bytes, keep_alive: bool, decision: bytes = b""
    ) -> bytes:
        """Return the answer to a request that failed with an error of the router. decision: see `decision`."""
        tail = self.tail(request, keep_alive) + decision
        return error_answer(error, request_id, tail, request.method == b"HEAD", request.path)

    def refusal(self, error: RouterError, request_id: bytes, path: bytes = b"") -> bytes:
        """Return the answer to bytes that were no valid request; the connection closes after it.

        path  as far as it was read
        """
        return error_answer(error, request_id, connection_field(False, False) + self.cors_fields([]), path=path)

    def client_head(
        self,
        head: ResponseHead,
        framing: Framing,
        request: Request,
        request_id: bytes,
        keep_alive: bool,
        decision: bytes = b"",
    ) -> tuple[bytes, bool, bool]:
        """Return the head of a worker's answer for the client, and how its body is sent.

        framing     of the worker's answer
        keep_alive  whether the client's connection may stay open
        decision    what the client is told of the decision, see `decision`

        Returns: the head; whether the client is sent chunks; whether the client's connection stays open. In HTTP/1.0 a
        body without a length ends when the connection closes.
        """
        field = connection = b""
        chunked = False
        if isinstance(framing, Sized):
            if not head.plain and head.status != 204 and (head.content_length is not None or request.method != b"HEAD"):
                field = b"content-length: %d\r\n" % (head.content_length or 0)
        else:
            chunked = not (isinstance(framing, UntilClose) or request.http10)
            if chunked:
                field = b"transfer-encoding: chunked\r\n"
            else:
                keep_alive = False
        if request.http10 or not keep_alive:
            connection = connection_field(keep_alive, request.http10)
        cors = b"" if self.cors is None else self.cors.fields(request.headers)
        return worker_head(head, request_id, field, connection, cors, decision), chunked, keep_alive

    def preflight(self, request: Request, request_id: bytes, keep_alive: bool) -> bytes | None:
        """Return the complete answer to a browser's preflight; None for any other request, or without CORS."""
        fields = None if self.cors is None else self.cors.preflight(request)
        if fields is None:
            return None
        extra = [(b"x-request-id", request_id), *fields]
        return plain_answer(200, b"", extra, connection_field(keep_alive, request.http10))
