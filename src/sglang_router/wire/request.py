"""Reads HTTP/1.1 requests (RFC 9112) out of the bytes of one client connection, in any split, pipelined or not.

    bytes --feed()--> [Request, Request, RouterError]

llhttp (by httptools) does the grammar and is strict: no bare LF, no obs-fold, no Content-Length beside
Transfer-Encoding, no `+5`. Added here is what a proxy must refuse besides, because the next hop could read it in
another way: Transfer-Encoding on HTTP/1.0 or other than `chunked` alone, a missing or doubled Host, versions other than
1.0 and 1.1, upgrades, and whatever exceeds the limits.

A mistake is not raised but returned, behind the good requests that came before it in the pipeline: each gets its answer
in order. After a mistake the parser is done: where the next message would begin is not known any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httptools
import msgspec

from sglang_router.errors import (
    BadHTTP,
    HeadTooLarge,
    PayloadTooLarge,
    RouterError,
    UpgradeRefused,
    URITooLong,
    VersionNotSupported,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_FRAMING_PER_BYTE = 16
"""Bytes of chunk framing that one byte of content may cost for long; a chunk of one byte costs six."""

_WATCHED = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))

Headers = list[tuple[bytes, bytes]]
"""Fields in the order they came; names in lower case."""


class Limits(msgspec.Struct, frozen=True):
    """What one request may cost. All in bytes but the count."""

    head_bytes: int = 65536
    header_count: int = 128
    body_bytes: int = 512 << 20


class Request(msgspec.Struct, gc=False):
    """One whole request.

    `body` has its transfer coding removed and is otherwise what the client sent; `target` is path and query, also when
    it came in absolute form. With a `refusal` that is the answer, and the body was not read. `client` is the name of
    its key, where one is asked for.
    """

    method: bytes
    target: bytes
    path: bytes
    headers: Headers
    body: bytes = b""
    http10: bool = False
    keep_alive: bool = True
    refusal: RouterError | None = None
    client: str = ""


class RequestParser:
    """The parser of one connection.

    admit  asked when a head is here, with the request and whether a body follows; may set refusal and client
    """

    __slots__ = (
        "_admit",
        "_error",
        "_head_bytes",
        "_headers",
        "_limits",
        "_long",
        "_parser",
        "_pieces",
        "_ready",
        "_request",
        "_size",
        "_url",
        "mid_body",
        "mid_head",
        "wants_continue",
    )

    _head_bytes: int
    _parser: httptools.HttpRequestParser | None
    _size: int

    def __init__(self, limits: Limits, admit: Callable[[Request, bool], None] | None = None) -> None:
        self._limits = limits
        self._admit = admit
        self._long = False  # a head that ends in this read may be over the limit
        self._error: RouterError | None = None
        self._ready: list[Request | RouterError] = []
        self.mid_head = False
        """Some bytes of a head are here, not all."""
        self.mid_body = False
        """A head is here, its body is not, or not wholly."""
        self.wants_continue = False
        """The client waits for `100 Continue` before it sends the body; the owner clears it when sent."""
        self.on_message_begin()
        self.mid_head = False
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> list[Request | RouterError]:
        """Takes the next bytes; returns what they completed, in order. Nothing follows an error."""
        parser = self._parser
        if parser is None or self._error is not None:
            return []
        in_body, size = self.mid_body, self._size
        between = not (self.mid_head or in_body)
        self._long = len(data) > self._limits.head_bytes or self.mid_head
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if self._parser is not None:
                self._error = self._error or _verdict(exc)
        if self.mid_head:
            # A field that never ends makes no callback. A read in which the head began behind other messages is not
            # counted; the head itself is measured when it is whole.
            self._head_bytes += len(data) if self._head_bytes or (between and not self._ready) else 1
            if self._head_bytes > self._limits.head_bytes:
                self._error = self._error or self._too_large()
        elif in_body and self.mid_body and not self._ready:
            # Nor do chunk extensions and trailers that never end. A byte of content pays for some that are not content.
            self._head_bytes = max(0, self._head_bytes + len(data) - _FRAMING_PER_BYTE * (self._size - size))
            if self._head_bytes > self._limits.head_bytes:
                self._error = self._error or HeadTooLarge("The chunked body is mostly chunk extensions or trailers.")
        ready = self._ready
        if self._error is not None:
            ready.append(self._error.with_traceback(None))  # its frames hold this object: a cycle for the collector
            self.mid_head = self.mid_body = self.wants_continue = False
        if ready:
            self._ready = []
        return ready

    def close(self) -> None:
        """Lets go of the parser, which holds this object: no cycle stays behind for the collector."""
        self._error = self._error or BadHTTP()
        self._parser = None

    # -- llhttp's callbacks ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self._size = 0
        self._pieces: list[bytes] = []
        self._request: Request | None = None
        self.mid_head = True

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > self._limits.head_bytes:
            self._fail(URITooLong())

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._headers
        headers.append((name.lower(), value))
        if len(headers) > self._limits.header_count:
            self._fail(HeadTooLarge())

    def on_headers_complete(self) -> None:
        parser, headers = self._parser, self._headers
        assert parser is not None
        self._headers = []  # what follows is trailers: a proxy that does not need them may drop them (RFC 9110 6.5.1)
        self.mid_head = False
        self.mid_body = True
        self._head_bytes = 0
        version = parser.get_http_version()
        http10 = version == "1.0"
        if not http10 and version != "1.1":
            self._fail(VersionNotSupported())
        if parser.should_upgrade():
            self._fail(UpgradeRefused())
        has_body = self._check(headers, http10)
        url = self._url
        if not url.startswith(b"/"):
            url = _origin_form(url)
        path = url.partition(b"?")[0]
        self._request = Request(parser.get_method(), url, path, headers, b"", http10, parser.should_keep_alive())
        if self._admit is not None:
            self._ask_for(self._request, self._admit, has_body)

    def _ask_for(self, request: Request, admit: Callable[[Request, bool], None], has_body: bool) -> None:
        """A body that nobody will look at is not read: the request is complete without it, and the last one."""
        admit(request, has_body)
        if request.refusal is not None and has_body:
            request.keep_alive = self.wants_continue = False
            self._parser = None
            self._ready.append(request)
            raise BadHTTP  # only to leave llhttp; nobody hears of it

    def _check(self, headers: Headers, http10: bool) -> bool:
        """What llhttp leaves to its user. Returns whether a body follows."""
        hosts = length = 0
        coded = expects = False
        for name, value in headers:
            if name not in _WATCHED:
                continue
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                length = int(value)  # llhttp lets only digits through
            elif name == b"transfer-encoding":
                coded = True
                if value.rstrip().lower() != b"chunked":  # llhttp leaves the white space behind a value
                    self._fail(BadHTTP("The only transfer coding the router takes is chunked."))
            else:
                expects = value.rstrip().lower() == b"100-continue"
        if self._long:
            size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in headers)
            if size > self._limits.head_bytes:
                self._fail(self._too_large())
        if hosts > 1 or (not hosts and not http10):
            self._fail(BadHTTP("An HTTP/1.1 request has exactly one Host header."))
        if coded and http10:
            self._fail(BadHTTP("HTTP/1.0 has no Transfer-Encoding."))
        if length > self._limits.body_bytes:
            self._fail(PayloadTooLarge())
        has_body = length > 0 or coded
        self.wants_continue = expects and not http10 and has_body
        return has_body

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._size += len(piece)
        self.wants_continue = False
        if self._size > self._limits.body_bytes:
            self._fail(PayloadTooLarge())

    def on_message_complete(self) -> None:
        request, pieces = self._request, self._pieces
        assert request is not None
        request.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._request = None
        self._pieces = []
        self.mid_body = self.wants_continue = False
        self._ready.append(request)

    def _too_large(self) -> RouterError:
        return URITooLong() if len(self._url) * 2 > self._limits.head_bytes else HeadTooLarge()

    def _fail(self, error: RouterError) -> None:
        self._error = error
        raise error


def _origin_form(target: bytes) -> bytes:
    """Path and query of a target in absolute form (RFC 9112 3.2.2), as clients of a proxy send it; `*` stays `*`."""
    whole, mark, query = target.partition(b"?")
    _, absolute, rest = whole.partition(b"://")
    return b"/" + rest.partition(b"/")[2] + mark + query if absolute else target


def _verdict(exc: httptools.HttpParserError) -> RouterError:
    text = str(exc)
    if "PRI" in text or "HTTP version" in text:
        return VersionNotSupported()
    if isinstance(exc, httptools.HttpParserInvalidMethodError):
        return BadHTTP("The request line does not begin with a method.")
    return BadHTTP(f"This is not a well-formed HTTP/1.1 request: {text}.")
