"""Reads a worker's HTTP/1.1 response (RFC 9112): the head into facts, the body only as far as its end must be known.

A router hands the worker's bytes to the client as they are, so it needs of a body just three things, for each read: is it
still well-formed, where exactly does the message end, and, should the worker break off here, how many bytes would
complete the chunk the client is in the middle of. llhttp tells none of the last two, so the framing is walked here:

    head  --parse_head()-->  ResponseHead  --framing_of()-->  Sized | Chunked | UntilClose
    body  --framing.feed(data)--> index in `data` just behind the message, or -1 while it goes on

The grammar is strict (no bare LF, no folding, no second length). What does not fit it raises WorkerInvalid: a worker that is
not understood is not guessed at.
"""

from __future__ import annotations

import re

import msgspec

from sglang_router.errors import WorkerInvalid
from sglang_router.wire.request import Headers

MAX_HEAD = 65536
"""Bytes of a response head; a worker that sends more is broken."""
_MAX_LINE = 4096
"""Bytes of a chunk's size line with its extensions, and of one trailer field."""

_TOKEN_CHARS = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e]*)?\r\n")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*\r\n")
_HOP_FACTS = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class ResponseHead(msgspec.Struct, gc=False):
    """A response head. `content_length` is None when the head names none; `end` is where the head ends in the bytes read."""

    status: int
    reason: bytes
    headers: Headers
    keep_alive: bool
    chunked: bool
    content_length: int | None
    end: int

    def header(self, name: bytes) -> bytes | None:
        """The first value of a field, by its name in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


def parse_head(data: bytes) -> ResponseHead | None:
    """The head at the start of `data`, or None while it is not all there.

    Interim responses (1xx) come back like any other; the caller drops `data[:head.end]` and asks again.

    Raises: WorkerInvalid for what is not HTTP/1.x, two lengths, an unknown transfer coding, 101, or a head over MAX_HEAD.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > MAX_HEAD or not _may_begin(data):
            raise WorkerInvalid
        return None
    first, *lines = data[:end].split(b"\r\n")
    start = _STATUS_LINE.fullmatch(first)
    if start is None or end > MAX_HEAD or _has_stray_bytes(data, end, len(lines)):
        raise WorkerInvalid
    minor, status, reason = start.groups(b"")
    headers: Headers = []
    length: int | None = None
    chunked = False
    keep_alive = minor == b"1"
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name.translate(None, _TOKEN_CHARS):
            raise WorkerInvalid
        name, value = name.lower(), value.strip(b" \t")
        headers.append((name, value))
        if name not in _HOP_FACTS:
            continue
        if name == b"content-length":
            if length is not None or not _DIGITS.fullmatch(value):
                raise WorkerInvalid
            length = int(value)
        elif name == b"connection":
            keep_alive = _persists(value.lower(), keep_alive)
        elif chunked or value.lower() != b"chunked" or minor == b"0":
            raise WorkerInvalid
        else:
            chunked = True
    code = int(status)
    if (chunked and length is not None) or code == 101:
        raise WorkerInvalid
    return ResponseHead(code, reason, headers, keep_alive, chunked, length, end + 4)


def _has_stray_bytes(data: bytes, end: int, breaks: int) -> bool:
    """Whether a CR, LF or NUL stands anywhere in the head but in its line ends."""
    return data.count(b"\r", 0, end) != breaks or data.count(b"\n", 0, end) != breaks or data.find(b"\0", 0, end) >= 0


def _may_begin(data: bytes) -> bool:
    start = b"HTTP/1."
    return data.startswith(start) or start.startswith(data)


def _persists(connection: bytes, default: bool) -> bool:
    options = {option.strip() for option in connection.split(b",")}
    if b"close" in options:
        return False
    return default or b"keep-alive" in options


class Framing:
    """Where a response body ends. One method; subclasses differ in how the end is told (RFC 9112 6.3)."""

    __slots__ = ()

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Walks over the next bytes; returns the index just behind the message, or -1 while it goes on.

        With a list as `payload`, the content without its transfer coding is appended to it.

        Raises: WorkerInvalid when the framing is broken.
        """
        raise NotImplementedError

    @property
    def gap(self) -> int | None:
        """Bytes missing until something else could follow in the same coding; None when nothing can."""
        return None

    @property
    def ends_at_close(self) -> bool:
        """Whether the closing of the connection is a proper end here."""
        return False


class Sized(Framing):
    """A body of known length."""

    __slots__ = ("left",)

    def __init__(self, length: int) -> None:
        self.left = length

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        size = len(data)
        if size < self.left:
            self.left -= size
            end = -1
        else:
            end, self.left = self.left, 0
        if payload is not None:
            payload.append(data if end < 0 else data[:end])
        return end


class UntilClose(Framing):
    """A body without any length: it lasts until the worker closes."""

    __slots__ = ()

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        if payload is not None:
            payload.append(data)
        return -1

    @property
    def gap(self) -> int | None:
        return 0

    @property
    def ends_at_close(self) -> bool:
        return True


_SIZE, _DATA, _CRLF, _TRAILERS, _DONE = range(5)


class Chunked(Framing):
    """A chunked body (RFC 9112 7.1).

        SIZE --n--> DATA --> CRLF --> SIZE ...            each chunk
        SIZE --0--> TRAILERS --empty line--> DONE         the end

    A line cut by the end of a read is kept and put before the next one; everything else is only counted.
    """

    __slots__ = ("_left", "_line", "_state", "_trailer_bytes")

    def __init__(self) -> None:
        self._state = _SIZE
        self._left = 0  # of the chunk's data, in DATA
        self._line = b""  # the beginning of a line that is not here wholly
        self._trailer_bytes = 0

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        kept = len(self._line)
        if self._state == _SIZE and not kept and payload is None:
            # As a rule a read holds one whole chunk, and nothing changes.
            match = _SIZE_LINE.match(data)
            if match is not None:
                left = int(match.group(1), 16)
                if left and match.end() + left + 2 == len(data) and data.endswith(b"\r\n") and match.end() <= _MAX_LINE:
                    return -1
        if kept:
            data = self._line + data
            self._line = b""
        pos, size = 0, len(data)
        state, left = self._state, self._left
        while pos < size:
            if state == _SIZE:
                match = _SIZE_LINE.match(data, pos)
                if match is None or match.end() - pos > _MAX_LINE:
                    self._keep(data, pos)
                    break
                pos = match.end()
                left = int(match.group(1), 16)
                state = _DATA if left else _TRAILERS
            elif state == _DATA:
                taken = left if left <= size - pos else size - pos
                if payload is not None:
                    payload.append(data[pos : pos + taken])
                pos += taken
                left -= taken
                if not left:
                    state = _CRLF
            elif state == _CRLF:
                if not data.startswith(b"\r\n", pos):
                    self._keep_crlf(data, pos)
                    break
                pos += 2
                state = _SIZE
            elif data.startswith(b"\r\n", pos):  # the empty line behind the trailers
                self._state = _DONE
                return pos + 2 - kept
            else:
                match = _TRAILER.match(data, pos)
                if match is None:
                    self._keep(data, pos)
                    break
                self._trailer_bytes += match.end() - pos
                if self._trailer_bytes > MAX_HEAD:
                    raise WorkerInvalid
                pos = match.end()
        self._state, self._left = state, left
        return -1

    def _keep(self, data: bytes, pos: int) -> None:
        line = data[pos:]
        if b"\n" in line or len(line) > _MAX_LINE:
            raise WorkerInvalid
        self._line = line

    def _keep_crlf(self, data: bytes, pos: int) -> None:
        if data[pos:] != b"\r":
            raise WorkerInvalid
        self._line = b"\r"

    @property
    def gap(self) -> int | None:
        if self._state == _DATA:
            return self._left + 2
        if self._state == _CRLF:
            return 2 - len(self._line)
        if self._state == _SIZE and not self._line:
            return 0
        return None


def framing_of(head: ResponseHead) -> Framing:
    """How the body behind `head` ends, for an answer to anything but HEAD."""
    if head.status in (204, 304) or head.status < 200:
        return Sized(0)
    if head.chunked:
        return Chunked()
    if head.content_length is not None:
        return Sized(head.content_length)
    return UntilClose()
