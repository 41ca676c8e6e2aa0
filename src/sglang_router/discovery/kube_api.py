"""The API of Kubernetes as far as discovery needs it: GET for an answer, or for a stream of lines, over HTTP/1.1.

    async with KubeLink(access, addresses) as link:          one connection, opened when it is needed
        body = await link.get("/api/v1/pods?limit=100")      a whole answer
        lines = await link.stream("/api/v1/pods?watch=1", within=65.0)
        async for line in lines: ...                         lines as they come, until the answer ends

Everything has a time limit and a largest size, for a connection can stay open and silent for ever. Each failure is a
`KubeError`, in words for an operator. The token is in no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from sglang_router.discovery.kube_config import KubeAccess
from sglang_router.errors import WorkerInvalid
from sglang_router.relay.addresses import Addresses
from sglang_router.relay.keepalive import probe_worker
from sglang_router.version import __version__
from sglang_router.wire.framing import Framing
from sglang_router.wire.response import ResponseHead, framing_of, parse_head

_CONNECT_WITHIN: Final = 5.0
"""Seconds to open a connection, TLS included."""
_SILENT_FOR: Final = 10.0
"""Seconds in which the head of an answer must come, and then some bytes of its body; a watch may be silent."""
_WHOLE_WITHIN: Final = 60.0
"""Seconds in which an answer must be complete that is no watch: one that comes byte by byte is none."""
_READ: Final = 1 << 16
_LARGEST_ANSWER: Final = 64 << 20
_LONGEST_LINE: Final = 16 << 20
"""Bytes. An object of the API has at most 1.5 MB as it is stored."""
_LARGEST_ERROR: Final = 1 << 16
_SHOWN: Final = 300
"""Characters of the API server's own words that a message shows."""
_AGENT: Final = f"sglang-router/{__version__}"


class KubeError(Exception):
    """The API server did not answer as it should. The text completes a log line.

    kind    a word for metrics: the status, or "unreachable", "silent", "broken", "invalid", "expired"
    status  its HTTP status; 0: there was no answer
    pause   seconds after which it wants to be asked again (Retry-After); 0.0: it does not say
    """

    def __init__(self, kind: str, text: str, status: int = 0, pause: float = 0.0) -> None:
        super().__init__(text)
        self.kind = kind
        self.status = status
        self.pause = pause


class StatusMessage(msgspec.Struct):
    """A `Status` of the API: why a request failed."""

    message: str | None = None
    code: int | None = None


class KubeLink:
    """One connection to the API server; see the module. Used by one task at a time."""

    def __init__(self, access: KubeAccess, addresses: Addresses) -> None:
        self._access = access
        self._addresses = addresses
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._seen = b""  # bytes that came after a head

    async def __aenter__(self) -> KubeLink:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def closing(self) -> bool:
        """Whether the API server has closed the connection."""
        if self._reader is None or self._writer is None:
            return False
        return self._writer.transport.is_closing() or self._reader.at_eof()

    def close(self) -> None:
        """Close the connection at once; a peer that does not answer cannot delay it."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    # -- requests ------------------------------------------------------------------------------------------------------

    async def get(self, path: str) -> bytes:
        """Return the body of a successful answer. Raises: KubeError."""
        until = asyncio.get_running_loop().time() + _WHOLE_WITHIN
        head, framing = await self._ask(path)
        return await self._body(head, framing, _LARGEST_ANSWER, until)

    async def stream(self, path: str, within: float) -> AsyncIterator[bytes]:
        """Return the lines of a successful answer; one that lasts longer than `within` is given up.

        Raises: KubeError, now and while lines are read.
        """
        until = asyncio.get_running_loop().time() + within
        head, framing = await self._ask(path)
        return self._lines(head, framing, until)

    async def _lines(self, head: ResponseHead, framing: Framing, until: float) -> AsyncIterator[bytes]:
        rest = bytearray()
        async for data in self._content(framing, until, math.inf):
            start = max(0, len(rest) - 1)
            rest += data
            if rest.find(b"\n", start) < 0:
                if len(rest) > _LONGEST_LINE:
                    raise KubeError("invalid", "the API server sends a line that is too long")
                continue
            *whole, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            for line in whole:
                if line.strip():
                    yield line
        if not head.keep_alive:
            self.close()

    async def _ask(self, path: str) -> tuple[ResponseHead, Framing]:
        """Send a request, and return the head of a successful answer. Raises: KubeError."""
        if self._writer is None or self.closing:
            self.close()
            await self._open()
        assert self._writer is not None
        access = self._access
        fields = [
            f"GET {access.prefix}{path} HTTP/1.1",
            f"host: {access.authority}",
            f"user-agent: {_AGENT}",
            "accept: application/json",
        ]
        if access.token:
            fields.append(f"authorization: Bearer {access.token}")
        self._writer.write("\r\n".join([*fields, "", ""]).encode("latin-1"))
        head = await self._head()
        framing = framing_of(head)
        if 200 <= head.status < 300:
            return head, framing
        body, until = b"", asyncio.get_running_loop().time() + _SILENT_FOR
        with contextlib.suppress(KubeError):
            body = await self._body(head, framing, _LARGEST_ERROR, until)
        self.close()
        raise self._refusal(head, body)

    async def _body(self, head: ResponseHead, framing: Framing, largest: int, until: float) -> bytes:
        parts, size = [], 0
        async for data in self._content(framing, until, _SILENT_FOR):
            parts.append(data)
            size += len(data)
            if size > largest:
                self.close()
                raise KubeError("invalid", f"the API server's answer is larger than {largest >> 20} MiB")
        if not head.keep_alive:
            self.close()
        return b"".join(parts)

    # -- the connection ------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        access = self._access
        try:
            self._reader, self._writer = link = await asyncio.wait_for(self._connect(), _CONNECT_WITHIN)
        except (TimeoutError, asyncio.TimeoutError):
            raise KubeError("unreachable", f"no connection to {access.url} within {_CONNECT_WITHIN:g} s") from None
        except (OSError, UnicodeError) as error:
            raise KubeError("unreachable", f"{access.url} cannot be reached: {_why(error)}") from None
        _, writer = link
        sock = writer.get_extra_info("socket")
        if sock is None or self.closing:  # reset as soon as it was open
            self.close()
            raise KubeError("broken", f"{access.url} closed the connection without an answer")
        probe_worker(sock)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first address that takes a connection. Raises: OSError, that of the last one."""
        access, failure = self._access, OSError("it has no address")
        how: dict[str, Any] = {} if access.tls is None else {"ssl": access.tls, "server_hostname": access.name}
        for address in await self._addresses.of(access.host):
            try:
                return await asyncio.open_connection(address, access.port, limit=4 * _READ, **how)
            except OSError as error:
                failure = error
        raise failure

    async def _read(self, silent: float, until: float) -> bytes:
        """Return what comes next; b"" at the end. Raises: KubeError, when nothing comes for so long, or in time."""
        now = asyncio.get_running_loop().time
        assert self._reader is not None
        assert self._writer is not None
        # Not `asyncio.wait_for`: before Python 3.12 it can swallow a cancellation, and this loop would never end.
        transport = self._writer.transport
        within = max(0.0, min(silent, until - now()))
        given_up = asyncio.get_running_loop().call_later(within, transport.abort)
        try:
            data = await self._reader.read(_READ)
        except OSError as error:
            self.close()
            raise KubeError("broken", f"the connection to {self._access.url} broke: {_why(error)}") from None
        finally:
            given_up.cancel()
        if not data and given_up.when() <= now():
            self.close()
            why = f"says nothing for {within:.0f} s" if within == silent else "takes too long for an answer"
            raise KubeError("silent", f"{self._access.url} {why}")
        return data

    async def _head(self) -> ResponseHead:
        data, until = b"", math.inf
        try:
            while True:
                head = parse_head(data) if data else None
                if head is not None and head.status >= 200:
                    self._seen = data[head.end :]
                    return head
                if head is not None:
                    data = data[head.end :]
                    continue
                more = await self._read(_SILENT_FOR, until)
                until = min(until, asyncio.get_running_loop().time() + _SILENT_FOR)
                if not more:
                    self.close()
                    raise KubeError("broken", f"{self._access.url} closed the connection without an answer")
                data += more
        except WorkerInvalid:
            self.close()
            raise KubeError("invalid", f"{self._access.url} does not answer in HTTP/1.1") from None

    async def _content(self, framing: Framing, until: float, silent: float) -> AsyncIterator[bytes]:
        """Yield the content of a body. until: when to give it up; silent: for how long nothing may come."""
        data, self._seen = self._seen, b""
        while True:
            payload: list[bytes] = []
            try:
                end = framing.feed(data, payload)
            except WorkerInvalid:
                self.close()
                raise KubeError("invalid", f"{self._access.url} does not answer in HTTP/1.1") from None
            if content := b"".join(payload):
                yield content
            if end >= 0:
                return
            data = await self._read(silent, until)
            if not data:
                self.close()
                if framing.ends_at_close:
                    return
                raise KubeError("broken", f"{self._access.url} closed the connection in the middle of an answer")

    def _refusal(self, head: ResponseHead, body: bytes) -> KubeError:
        """Return what an answer with an error status means."""
        said = _message(body)
        if head.status == 401:
            where = f"the token of {self._access.token_from}" if self._access.token else "a request without a token"
            return KubeError("401", f"{self._access.url} does not accept {where}: {said or 'Unauthorized'}", 401)
        pause = head.header(b"retry-after") or b""
        text = f"{self._access.url} answers {head.status}: {said or 'it does not say why'}"
        return KubeError(str(head.status), text, head.status, float(pause) if pause.isdigit() else 0.0)


def _message(body: bytes) -> str:
    try:
        text = msgspec.json.decode(body, type=StatusMessage).message or ""
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = body[:_SHOWN].decode("latin-1")
    return shown(text)


def shown(text: str) -> str:
    """Return what the API server says as a message may show it."""
    return "".join(each if each.isprintable() else " " for each in text[:_SHOWN]).strip()


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, ConnectionResetError):
        return "it was reset"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or error.__class__.__name__
