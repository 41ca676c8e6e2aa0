"""Ask the control plane of a running router: what the commands that do so share.

    add_options(parser)            --url, --api-key, --ca-cert, --json
    door_of(options)  -> Door      where the router is, and the key
    door.ask("GET", "/workers")    -> Reply; Failed, when nothing there can answer

    exit status   0  done      1  no: not found, not ready, refused      2  the command line cannot be used
                  3  no router answers there      4  the router does not let this key do that
                  5  waited for too long (--timeout)

Everything that others chose is escaped where a terminal would not print it. Keys are never printed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import re
import ssl
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import msgspec

from sglang_router.commands.printable import shown
from sglang_router.config.flags import OptionParser
from sglang_router.errors import ConfigError

REFUSED: Final = 1
NO_ROUTER: Final = 3
NOT_ALLOWED: Final = 4
TOO_LATE: Final = 5
URL_VARIABLE: Final = "SGLANG_ROUTER_URL"
KEY_VARIABLE: Final = "SGLANG_ROUTER_API_KEY"
STATUSES: Final = (
    "exit status: 0 done, 1 refused or not found, 2 wrong options, 3 no router answers, 4 not allowed,"
    " 5 waited too long"
)

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the decoder raises for content that is no JSON, or has another shape."""

_URL: Final = "http://127.0.0.1:30000"
_UNSENDABLE: Final = re.compile(r"[\x00-\x20\x7f]")
_NO_URL: Final = "--url is not a URL such as http://127.0.0.1:30000"
_TIMEOUT: Final = 10.0
"""Seconds without a byte."""
_PATIENCE: Final = 60.0
"""Seconds for an answer."""
_MOST: Final = 1 << 26
"""Bytes of an answer."""


class Failed(Exception):
    """The command cannot do what it was asked for: the message says why; status: the exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Reply(NamedTuple):
    """An answer of the router. code: of its error, for programs; message: of its error, as a terminal may print it."""

    status: int
    code: str
    content: bytes

    @property
    def message(self) -> str:
        """The message of an error; "" for any other content."""
        try:
            return shown(msgspec.json.decode(self.content, type=_Error).error.message)
        except UNREADABLE:
            return ""


class _Detail(msgspec.Struct):
    message: str = ""


class _Error(msgspec.Struct):
    error: _Detail


class Door(NamedTuple):
    """Where a router is, and the key for it. shown: the URL as a terminal may print it."""

    scheme: str
    host: str
    port: int | None
    path: str
    shown: str
    key: str
    ca_cert: str | None

    def ask(self, method: str, path: str, body: object = None, purpose: str = "do that") -> Reply:
        """Send one request and return the answer; body: sent as JSON, None: there is none; purpose: for the message.

        Raises: Failed, when no router answers or the key does not allow it; ConfigError, when --ca-cert is no good.
        """
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        content = None
        if body is not None:
            content, headers["content-type"] = msgspec.json.encode(body), "application/json"
        try:
            with contextlib.closing(self._connection()) as connection:
                connection.request(method, self.path + path, content, headers)
                answer = connection.getresponse()
                content = whole(answer, time.monotonic() + _PATIENCE)
                reply = Reply(answer.status, answer.headers.get("x-smg-error-code", ""), content)
        except UnicodeError:
            raise ConfigError(_NO_URL) from None
        except (OSError, http.client.HTTPException) as error:
            raise Failed(NO_ROUTER, f"no router answers at {self.shown}: {shown(self._why(error))}.") from None
        if reply.status in (401, 403):
            who = "this key" if self.key else f"anybody without a key (--api-key, or the variable {KEY_VARIABLE})"
            raise Failed(NOT_ALLOWED, f"the router at {self.shown} does not let {who} {purpose}.{told(reply)}")
        return reply

    def get(self, path: str, shape: Any = Any) -> Any:
        """Return what the router answers, decoded. shape: what it must have. Raises: Failed."""
        return self.decoded(self.ask("GET", path), shape)

    def decoded(self, reply: Reply, shape: Any = Any) -> Any:
        """Return the content of a good answer. shape: what it must have. Raises: Failed, for any other answer."""
        if reply.status >= 400:
            raise self.refused(reply)
        try:
            found = msgspec.json.decode(reply.content)
            msgspec.convert(found, shape)  # only a check: the answer may have more than a command reads
            return found
        except UNREADABLE:
            raise Failed(NO_ROUTER, f"what answers at {self.shown} is no router that can be asked this.") from None

    def refused(self, reply: Reply) -> Failed:
        """Return the error for an answer that is one."""
        if reply.code:
            return Failed(REFUSED, reply.message or f"the router at {self.shown} answers with status {reply.status}.")
        return Failed(NO_ROUTER, f"what answers at {self.shown} is no router that can be asked this: {reply.status}.")

    def _why(self, error: Exception) -> str:
        """Return why nothing answers, and what to do if that is likely to be it."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted ({error.verify_message}); --ca-cert names whom to trust"
        if isinstance(error, ssl.SSLError):
            return f"TLS is not understood there ({error.reason}); the router may want http://"
        if self.scheme == "http" and isinstance(error, (ConnectionResetError, http.client.BadStatusLine)):
            return f"{str(error).strip() or 'the connection was closed'}; the router may want https://"
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return str(error).strip() or type(error).__name__

    def _connection(self) -> http.client.HTTPConnection:
        if self.scheme == "http":
            return http.client.HTTPConnection(self.host, self.port, timeout=_TIMEOUT)
        try:
            trusted = ssl.create_default_context(cafile=self.ca_cert)
        except OSError as error:
            raise ConfigError(f"--ca-cert {self.ca_cert}: {error.strerror or error}") from None
        return http.client.HTTPSConnection(self.host, self.port, timeout=_TIMEOUT, context=trusted)


class Readable(Protocol):
    """What is read of `http.client.HTTPResponse`. length: bytes that are still to come; None: nobody knows."""

    length: int | None

    def read1(self, n: int) -> bytes:
        """Return some bytes, as soon as there are any; b"" at the end."""


def whole(answer: Readable, until: float, clock: Callable[[], float] = time.monotonic) -> bytes:
    """Return the content of an answer, or the first `_MOST` bytes of it.

    Raises: TimeoutError, when it is not whole at `until`; http.client.IncompleteRead, when it is cut off.
    """
    pieces, size = [], 0
    while size < _MOST and (piece := answer.read1(min(_MOST - size, 65536))):
        pieces.append(piece)
        size += len(piece)
        if clock() > until:
            raise TimeoutError("the answer does not end")
    if size < _MOST and answer.length:
        raise http.client.IncompleteRead(b"".join(pieces), answer.length)
    return b"".join(pieces)


def told(reply: Reply) -> str:
    """Return what an error says, to be added to a sentence."""
    return f" It says: {reply.message}" if reply.message else ""


def new_parser(prog: str, about: str) -> OptionParser:
    """Return a parser with the options that all these commands have."""
    parser = OptionParser(prog=prog, description=about, epilog=STATUSES, allow_abbrev=False)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the router is."""
    parser.add_argument("--url", help=f"where the router is; by default the variable {URL_VARIABLE}, or {_URL}")
    about_key = f"a key of the control plane; by default the variable {KEY_VARIABLE}"
    parser.add_argument("--api-key", metavar="KEY", help=about_key)
    parser.add_argument("--ca-cert", metavar="FILE", help="trust the certificates in this file, for https")
    parser.add_argument("--json", action="store_true", help="print the router's answer as JSON, for programs")


def door_of(options: argparse.Namespace) -> Door:
    """Return where the options say that the router is. Raises: ConfigError."""
    key = (options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE, "")).strip()
    url = options.url or os.environ.get(URL_VARIABLE) or _URL
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in ("http", "https") or not host or "@" in parts.netloc or _UNSENDABLE.search(url):
        raise ConfigError(_NO_URL)
    if not key.isascii() or not key.isprintable():
        raise ConfigError("--api-key is not visible ASCII")
    return Door(scheme, host, port, parts.path.rstrip("/"), shown(url), key, options.ca_cert)


def quoted(text: str) -> str:
    """Return a text as one part of a path."""
    return quote(text, safe="", errors="surrogateescape")
