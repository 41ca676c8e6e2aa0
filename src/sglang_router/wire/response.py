"""Reads a worker's HTTP/1.1 response (RFC 9112): the head into facts, the body only as far as its end must be known.

A router hands the worker's bytes to the client as they are, so it needs of a body just three things, for each read: is
it still well-formed, where exactly does the message end, and, should the worker break off here, how many bytes would
complete the chunk the client is in the middle of. llhttp tells none of the last two, so the framing is walked here:

    head  --parse_head()-->  ResponseHead  --framing_of()-->  Sized | Chunked | UntilClose
    body  --framing.feed(data)--> index in `data` just behind the message, or -1 while it goes on

The grammar is strict (no bare LF, no folding, no second length). What does not fit it raises WorkerInvalid: a worker
that is not understood is not guessed at.
"""

from __future__ import annotations

import re

import msgspec

from sglang_router.errors import WorkerInvalid
from sglang_router.wire.request import Headers

MAX_HEAD = 65536
"""Bytes of a response head; a worker that sends more is broken."""
_SHORT = 4096
"""Bytes in which the end of a head is looked for by matching the head itself."""
_MAX_LINE = 4096
"""Bytes of a chunk's size line with its extensions, and of one trailer field."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: (" + _VALUE + rb"))?"
    rb"((?:\r\n" + _TOKEN + rb":" + _VALUE + rb")*)\r\n\r\n"
)
_FIELD = re.compile(rb"\n(" + _TOKEN + rb"):[ \t]*([^\r\n]*)")
# Looked for in lower case: what tells the framing, and what is not passed on.
_NOTABLE = re.compile(
    rb"\n(content-length|connection|transfer-encoding|keep-alive|proxy-[a-z-]+|te|trailer|upgrade|x-request-id)"
    rb":[ \t]*([^\r\n]*)"
)
_BODYLESS = frozenset((204, 304))
_DIGITS = re.compile(rb"[0-9]{1,18}")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e]*)?\r\n")
_SIZE_LINE_CUT = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(?:;[\t\x20-\x7e]*)?\r?)?")
_TRAILER = re.compile(_TOKEN + rb":" + _VALUE + rb"\r\n")
_TRAILER_CUT = re.compile(rb"\r|(?:" + _TOKEN + rb"(?::" + _VALUE + rb"\r?)?)?")


class ResponseHead(msgspec.Struct, gc=False):
    """A response head.

    fields          the fields as they came, each with the CRLF before it
    plain           nothing among them concerns this connection only, and Content-Length tells the framing
    content_length  None when the head names none
    end             where the head ends in the bytes read
    """

    status: int
    reason: bytes
    fields: bytes
    plain: bool
    keep_alive: bool
    chunked: bool
    content_length: int | None
    end: int

    @property
    def headers(self) -> Headers:
        """The fields one by one, names in lower case."""
        return [(name.lower(), value.rstrip(b" \t")) for name, value in _FIELD.findall(self.fields)]

    def header(self, name: bytes) -> bytes | None:
        """The first value of a field, by its name in lower case."""
        if name not in self.fields.lower():
            return None
        return next((value for key, value in self.headers if key == name), None)


def parse_head(data: bytes, seen: int = 0) -> ResponseHead | None:
    """The head at the start of `data`, or None while it is not all there.

    Interim responses (1xx) come back like any other; the caller drops `data[:head.end]` and asks again. `seen`: for so
    many of these bytes the answer was None before; they are not looked through once more.

    Raises: WorkerInvalid for what is not HTTP/1.x, two lengths, an unknown transfer coding, 101, or a head over
    MAX_HEAD.
    """
    # To match a head of 64 KiB takes as long as to answer ten requests: not again for each byte of one that drips in.
    if (seen or len(data) > _SHORT) and data.find(b"\r\n\r\n", max(0, seen - 3)) < 0:
        _check_start(data, seen)
        return None
    match = _HEAD.match(data)
    if match is None:
        if b"\r\n\r\n" in data:
            raise WorkerInvalid
        _check_start(data, seen)
        return None
    minor, status, reason, fields = match.groups(b"")
    length: int | None = None
    plain, chunked, connection = True, False, b""
    for name, value in _NOTABLE.findall(fields.lower()):
        if name == b"content-length":
            value = value.rstrip(b" \t")
            if length is not None or not _DIGITS.fullmatch(value):
                raise WorkerInvalid
            length = int(value)
            continue
        plain = False
        if name == b"connection":
            connection += value + b","
        elif name == b"transfer-encoding":
            if chunked or value.rstrip(b" \t") != b"chunked" or minor == b"0":
                raise WorkerInvalid
            chunked = True
    code, end = int(status), match.end()
    if (chunked and length is not None) or code == 101 or end > MAX_HEAD:
        raise WorkerInvalid
    keep_alive = _persists(connection, minor == b"1")
    plain = plain and length is not None and code not in _BODYLESS
    return ResponseHead(code, reason, fields, plain, keep_alive, chunked, length, end)


def _check_start(data: bytes, seen: int) -> None:
    """Whether a head may begin so. Tells a bare LF: a head of such lines would be waited for until the time is up."""
    start = b"HTTP/1."
    if len(data) > MAX_HEAD or not (data.startswith(start) or start.startswith(data)):
        raise WorkerInvalid
    if data.count(b"\n", seen) != data.count(b"\r\n", max(0, seen - 1)):
        raise WorkerInvalid


def _persists(connection: bytes, default: bool) -> bool:
    """RFC 9112 9.3, for all Connection fields in one list: `close` wins over `keep-alive`."""
    if not connection:
        return default
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

    A line cut by the end of a read is kept and put before the next one; everything else is only counted. A read that
    breaks the framing changes nothing: `gap` then speaks of the reads before it, which are what the client was sent.
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
        cut = b""
        pos, size = 0, len(data)
        state, left = self._state, self._left
        while pos < size:
            if state == _SIZE:
                match = _SIZE_LINE.match(data, pos)
                if match is None or match.end() - pos > _MAX_LINE:
                    cut = _cut_line(_SIZE_LINE_CUT, data, pos)
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
                    cut = data[pos:]
                    if cut != b"\r":
                        raise WorkerInvalid
                    break
                pos += 2
                state = _SIZE
            elif data.startswith(b"\r\n", pos):  # the empty line behind the trailers
                self._state = _DONE
                return pos + 2 - kept
            else:
                match = _TRAILER.match(data, pos)
                if match is None or match.end() - pos > _MAX_LINE:
                    cut = _cut_line(_TRAILER_CUT, data, pos)
                    break
                self._trailer_bytes += match.end() - pos
                if self._trailer_bytes > MAX_HEAD:
                    raise WorkerInvalid
                pos = match.end()
        self._state, self._left, self._line = state, left, cut
        return -1

    @property
    def gap(self) -> int | None:
        if self._state == _DATA:
            return self._left + 2
        if self._state == _CRLF:
            return 2 - len(self._line)
        if self._state == _SIZE and not self._line:
            return 0
        return None


def _cut_line(beginning: re.Pattern[bytes], data: bytes, pos: int) -> bytes:
    """The rest of a read, which must be the beginning of a line."""
    line = data[pos:]
    if len(line) > _MAX_LINE or not beginning.fullmatch(line):
        raise WorkerInvalid
    return line


def framing_of(head: ResponseHead) -> Framing:
    """How the body behind `head` ends, for an answer to anything but HEAD."""
    if head.status in _BODYLESS or head.status < 200:
        return Sized(0)
    if head.chunked:
        return Chunked()
    if head.content_length is not None:
        return Sized(head.content_length)
    return UntilClose()
