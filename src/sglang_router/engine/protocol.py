"""HTTP of the built-in engine: uvicorn's protocol, except that an Upgrade which a client offers is ignored.

Stock Java clients offer HTTP/2 with each request (`Upgrade: h2c`), and expect an answer in HTTP/1.1 from a server that
does not want it (RFC 9110 7.8). llhttp stops at such a head and takes the body for another protocol; so a new parser is
told the same head without its Upgrade field, and goes on with the rest.
"""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class PlainParser:
    """A parser of requests in which nobody offers an upgrade. `protocol` hears of each request."""

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self._protocol = protocol
        self.on_body = protocol.on_body
        self._parser = self._fresh()  # looks for the methods of this object
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._offer = b""  # a head that offers an upgrade, without that

    def _fresh(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        return parser

    def feed_data(self, data: bytes) -> None:
        """Parse bytes. Raises: httptools.HttpParserError."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
            except httptools.HttpParserUpgrade as exc:
                rest = rest[exc.args[0] :]
                head, self._offer = self._offer, b""
                self._parser = self._fresh()
                self._parser.feed_data(head)
            else:
                return

    def get_http_version(self) -> str:
        """Return the version, such as "1.1"."""
        return self._parser.get_http_version()

    def get_method(self) -> bytes:
        """Return the method."""
        return self._parser.get_method()

    def should_keep_alive(self) -> bool:
        """Return whether the client keeps its connection open."""
        return self._parser.should_keep_alive()

    def should_upgrade(self) -> bool:
        """Return False: nothing is upgraded."""
        return False

    # -- called by llhttp ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._url = b""
        self._headers = []
        self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._url += url
        self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field."""
        self._headers.append((name, value))
        self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        """Take a head, or keep one that offers an upgrade for another parser."""
        if not self._parser.should_upgrade():
            self._protocol.on_headers_complete()
            return
        method = self._parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT is not supported")
        version = self._parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s\r\n" % (method, self._url, version)]
        lines += [b"%s: %s\r\n" % field for field in self._headers if field[0].lower() != b"upgrade"]
        self._offer = b"".join((*lines, b"\r\n"))

    def on_message_complete(self) -> None:
        """End a request."""
        if not self._offer:
            self._protocol.on_message_complete()


class EngineProtocol(HttpToolsProtocol):
    """See the module."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.parser: Any = PlainParser(self)
