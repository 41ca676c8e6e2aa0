"""Parse HTTP/1.1 requests (RFC 9112) from the bytes of one client connection, split in any way, pipelined or not.

    bytes --feed()--> [Request, Request, RouterError]

llhttp (through httptools) parses the grammar strictly: no bare LF, no obs-fold, no Content-Length together with
Transfer-Encoding, no `Content-Length: +5`. This module also rejects what the next hop could read in another way:
Transfer-Encoding on HTTP/1.0 or other than `chunked` alone, a missing or repeated Host, versions other than 1.0 and
1.1, CONNECT, request lines that are not exact (`wire.request_line`), and everything that exceeds the limits.

An Upgrade that a client offers is ignored (RFC 9110 7.8). llhttp stops at such a head and takes the rest for another
protocol; so a new parser is told the same head without its Upgrade field, and goes on with the rest. But a request that
`takes` takes (`wire.upgrade`) is the last one of its connection, and what follows it stays unread, in `early`.

An invalid request is returned as an error, not raised, after the valid requests that came before it: so each gets its
answer in order. After an error the parser stops, because it is not known where the next message begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import httptools

from sglang_router.errors import (
    BadHTTP,
    HeadTooLarge,
    PayloadTooLarge,
    RouterError,
    UpgradeRefused,
    URITooLong,
    VersionNotSupported,
)
from sglang_router.wire.gathering import Body, gather, whole
from sglang_router.wire.limits import Limits
from sglang_router.wire.malformed import verdict
from sglang_router.wire.request_line import RequestLines
from sglang_router.wire.rewriting import origin_form, without_upgrade

_FRAMING_PER_BYTE: Final = 16
"""Bytes allowed for each byte of a chunked body's content, chunk framing included; a chunk of one byte takes six."""

_LINE: Final = "The request line must be METHOD TARGET HTTP/1.1, with one space between them and nothing before it."
_LINE_ENDS: Final = frozenset((b"\r", b"\n"))
_WATCHED: Final = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))

Headers = list[tuple[bytes, bytes]]
"""Fields in the order they came; names in lower case."""


class Request:
    """One complete request.

    target      path and query, also when the request line had the absolute form
    path        the target without its query
    headers     fields in the order they came; names in lower case
    body        without its transfer coding, otherwise as the client sent it
    http10      the request has version HTTP/1.0
    keep_alive  whether the client wants to keep its connection open
    refusal     the error to answer with, decided at the head; the body was not read
    client      name of the client's API key; "" when no key is required
    """

    __slots__ = ("body", "client", "headers", "http10", "keep_alive", "method", "path", "refusal", "target")

    def __init__(
        self, method: bytes, target: bytes, path: bytes, headers: Headers, http10: bool = False, keep_alive: bool = True
    ) -> None:
        self.method = method
        self.target = target
        self.path = path
        self.headers = headers
        self.body: Body = b""
        self.http10 = http10
        self.keep_alive = keep_alive
        self.refusal: RouterError | None = None
        self.client = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Request) and self._facts() == other._facts()

    def _facts(self) -> tuple[object, ...]:
        message = (self.method, self.target, self.path, self.headers, self.body)
        return (*message, self.http10, self.keep_alive, self.refusal, self.client)

    def with_body(self, body: Body) -> Request:
        """Return the same request with another body."""
        other = Request(self.method, self.target, self.path, self.headers, self.http10, self.keep_alive)
        other.body = body
        other.client = self.client
        return other

    def __repr__(self) -> str:
        return f"<Request {self.method.decode('latin-1')} {self.path.decode('latin-1')} {len(self.body)} bytes>"


Admit = Callable[[Request, bool], "int | None"]
Takes = Callable[[bytes, bytes, Headers], "Request | None"]


class RequestParser:
    """The parser of one connection.

    limits  sizes above which a request is rejected
    admit   called with each head, and whether a body follows; may set refusal and client; returns the body's own limit
    takes   called with a head that offers an upgrade; returns the request if that is taken
    early   what came behind a request that takes an upgrade; None: there was none
    """

    __slots__ = (
        *("_admit", "_body", "_chunked", "_error", "_head_bytes", "_headers", "_limits", "_lines", "_long"),
        *("_most_body", "_most_headers", "_offer", "_parser", "_pieces", "_ready", "_request", "_takes_it", "_url"),
        *("early", "http10", "length", "mid_body", "mid_head", "received", "wants_continue"),
    )

    _body: Body
    _head_bytes: int
    _parser: httptools.HttpRequestParser | None
    _request: Request | None
    http10: bool
    """The last head that is complete was of HTTP/1.0."""
    length: int
    """The announced length of the current body; -1: it is chunked."""
    received: int
    """Bytes of the current body that are here, without its transfer coding."""

    def __init__(self, limits: Limits, admit: Admit | None = None, takes: Takes | None = None) -> None:
        self._limits = limits
        self._takes_it = takes
        self.early: list[bytes] | None = None
        self._most_headers = limits.header_count
        self._most_body = limits.body_bytes
        self._admit = admit
        self._long = False  # a head that ends in this read may exceed the limit
        self._error: RouterError | None = None
        self._ready: list[Request | RouterError] = []
        self.http10 = False
        self._lines = RequestLines()
        self._chunked = False
        self._pieces: list[bytes] = []  # see `wire.gathering`
        self._offer = b""  # a head that offers an upgrade, without that
        self.mid_head = False
        """A part of a head has arrived."""
        self.mid_body = False
        """A head is complete and its body is not."""
        self.wants_continue = False
        """The client waits for `100 Continue` before it sends the body; the owner clears it when it has sent that."""
        self.on_message_begin()
        self.mid_head = False
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> list[Request | RouterError]:
        """Parse the next bytes; return the requests they complete, in order. Nothing follows an error."""
        parser = self._parser
        if parser is None:
            if self.early is not None:
                self.early.append(data)
            return []
        in_body, size = self.mid_body, self.received
        between = not (self.mid_head or in_body)
        self._long = len(data) > self._limits.head_bytes or self.mid_head
        lines = self._lines
        if between and not lines.cr:
            lines.raw, lines.at = data, 0  # usual: a request begins here
        else:
            lines.read(data, self.mid_head, size)
        try:
            try:
                parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                if self._without_upgrade(data, exc.args[0]):
                    ready, self._ready = self._ready, []
                    return ready
        except httptools.HttpParserError as exc:
            if self._parser is not None:
                self._error = self._error or verdict(exc)
        if self.mid_head:
            # A field that does not end triggers no callback, so count bytes here. A read in which the head began after
            # other messages is not counted; the head itself is measured when it is complete.
            self._head_bytes += len(data) if self._head_bytes or (between and not self._ready) else 1
            if self._head_bytes > self._limits.head_bytes:
                self._error = self._error or self._too_large()
        elif in_body and self.mid_body and not self._ready:
            # Chunk extensions and trailers that do not end trigger no callback either. Each byte of content allows
            # some bytes that are not content.
            self._head_bytes = max(0, self._head_bytes + len(data) - _FRAMING_PER_BYTE * (self.received - size))
            if self._head_bytes > self._limits.head_bytes:
                self._error = self._error or HeadTooLarge("The chunked body is mostly chunk extensions or trailers.")
        ready = self._ready
        if not self.mid_head and data[-1:] not in _LINE_ENDS:
            lines.raw = b""  # usual: a request ends here, and not with empty lines
        elif not lines.end(self.mid_head, self.mid_body, self.received if ready else -1, self._chunked):
            self._error = self._error or BadHTTP(_LINE)
        if self._error is not None:
            ready.append(self._error.with_traceback(None))  # its frames refer to this object: avoid a cycle
            self.mid_head = self.mid_body = self.wants_continue = False
            self._parser = None  # nothing follows an error
            lines.raw = b""
        if ready:
            self._ready = []
        return ready

    @property
    def path(self) -> bytes:
        """The path of the request whose part came last, as far as it was read."""
        return origin_form(self._url).partition(b"?")[0]

    def close(self) -> Body:
        """Release the parser, which refers to this object; return what has arrived of an incomplete body."""
        self._error = self._error or BadHTTP()
        self._parser = self.early = None
        self._lines.raw = b""
        self.mid_head = self.mid_body = False
        body, self._body = self._body, b""
        self._pieces = []
        return body

    def _without_upgrade(self, data: bytes, at: int) -> bool:
        """Parse the head that offers an upgrade again without that, and what follows it. at: its end in `data`.

        Return True when the upgrade is taken instead: then what follows is no HTTP, and is kept.
        """
        rest = memoryview(data)
        while self._offer:
            head, self._offer = self._offer, b""
            parser = self._parser = httptools.HttpRequestParser(self)
            self._lines.go_on(head, 0)
            parser.feed_data(head)
            self._lines.go_on(data, at)
            try:
                parser.feed_data(rest[at:])
            except httptools.HttpParserUpgrade as exc:
                at += exc.args[0]
            else:
                return False
        self._parser, self.early = None, [data[at:]]
        return True

    def _takes(self, request: Request | None) -> bool:
        """Begin a request that takes an upgrade; return False when there is none."""
        if request is None:
            return False
        if self._check(request.headers, False):
            self._fail(BadHTTP("A request for a WebSocket has no body."))
        self._request = request
        if self._admit is not None:
            self._admit(request, False)
        return True

    # -- called by llhttp ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Reset the state of one message."""
        if self._ready:
            self._lines.follows(self.received, self._chunked)
        self._url = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self.length = self.received = 0
        self._body = b""
        self._request = None
        self.mid_head = True

    def on_url(self, url: bytes) -> None:
        """Add a part of the target."""
        self._url += url
        if len(self._url) > self._limits.head_bytes:
            self._fail(URITooLong())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a field; trailers come here too, and are counted like fields."""
        headers = self._headers
        headers.append((name.lower(), value))
        if len(headers) > self._most_headers:
            self._fail(HeadTooLarge())

    def on_headers_complete(self) -> None:
        """Check the head and create the request."""
        parser, headers = self._parser, self._headers
        assert parser is not None
        self._headers = []  # trailers go here and are dropped, as a proxy may (RFC 9110 6.5.1)
        self.mid_head = False
        self.mid_body = True
        self._head_bytes = 0
        url, method, lines = self._url, parser.get_method(), self._lines
        line = method + b" " + url + b" HTTP/1.1\r\n"
        http10 = self.http10 = False
        if lines.at or not lines.exact or not lines.raw.startswith(line):
            http10 = self._check_line(parser.get_http_version(), method)
        else:  # usual: the read begins with this line
            lines.at, lines.before = len(line) - 2, -1
        if b"#" in url:
            self._fail(BadHTTP("The target has a fragment (#), which is not sent to servers."))
        if parser.should_upgrade():
            if method == b"CONNECT":
                self._fail(UpgradeRefused())
            if http10 or self._takes_it is None or not self._takes(self._takes_it(method, url, headers)):
                self._offer = without_upgrade(method, url, parser.get_http_version(), headers)
            return
        has_body = self._check(headers, http10)
        if not url.startswith(b"/"):
            url = origin_form(url)
        path = url.partition(b"?")[0]
        request = self._request = Request(method, url, path, headers, http10, parser.should_keep_alive())
        if self._admit is None:
            return
        most = self._admit(request, has_body)
        self._most_body = self._limits.body_bytes if most is None else most
        if has_body and request.refusal is not None:  # it is complete without its body, and the connection's last one
            request.keep_alive = self.wants_continue = False
            self._parser = None
            self._ready.append(request)
            raise BadHTTP  # stops llhttp; `feed` ignores it, because the parser is already released

    def _check_line(self, version: str, method: bytes) -> bool:
        """Check a request line that is not at the beginning of a read; return whether it says HTTP/1.0."""
        http10 = self.http10 = version == "1.0"
        if not http10 and version != "1.1":
            self._fail(VersionNotSupported())
        if not self._lines.check(method, self._url, http10):
            self._fail(BadHTTP(_LINE))
        return http10

    def _check(self, headers: Headers, http10: bool) -> bool:
        """Check what llhttp does not check; return whether a body follows.

        Raises: RouterError, the answer to an invalid head.
        """
        hosts = length = 0
        coded = expects = False
        for name, value in headers:
            if name not in _WATCHED:
                continue
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                length = int(value)  # llhttp accepts only digits
            elif name == b"transfer-encoding":
                coded = True
                if value.rstrip().lower() != b"chunked":  # llhttp keeps the white space after a value
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
        self.length = -1 if coded else length
        if length > self._limits.body_bytes:
            self._fail(PayloadTooLarge())
        has_body = length > 0 or coded
        self._chunked = coded
        self.wants_continue = expects and not http10 and has_body
        return has_body

    def on_body(self, piece: bytes) -> None:
        """Add a part of the body, without its transfer coding. The first part is kept as it is: usually it is all."""
        if self._body:
            last = self.received + len(piece) == self.length
            self._body = gather(self._body, self._pieces, piece, self.length, last)
        else:
            self._body = piece
        self.received += len(piece)
        self.wants_continue = False
        if self.received > self._most_body:
            self._fail(PayloadTooLarge())

    def on_message_complete(self) -> None:
        """Pass the complete request on."""
        request, body = self._request, self._body
        if self._offer:
            return
        assert request is not None
        request.body = body if type(body) is bytes and not self._pieces else whole(body, self._pieces)
        self._request = None
        self._body = b""
        self.mid_body = self.wants_continue = False
        self._ready.append(request)

    def _too_large(self) -> RouterError:
        return URITooLong() if len(self._url) * 2 > self._limits.head_bytes else HeadTooLarge()

    def _fail(self, error: RouterError) -> None:
        self._error = error
        raise error
