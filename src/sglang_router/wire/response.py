"""Parse the head of a worker's HTTP/1.1 response (RFC 9112); `wire.framing` parses its body.

    parse_head(data) --> ResponseHead, or None while the head is not complete
    framing_of(head) --> Sized | Chunked | UntilClose

The grammar is strict: no bare LF, no folding, no second length. Anything else raises WorkerInvalid: the router does
not guess what a worker meant.
"""

from __future__ import annotations

import re
from typing import Final

from sglang_router.errors import WorkerInvalid
from sglang_router.wire.framing import Chunked, Framing, Sized, UntilClose
from sglang_router.wire.request import Headers
from sglang_router.wire.tokens import TOKEN, VALUE

MAX_HEAD: Final = 65536
"""Most bytes of a response head; a longer one is invalid."""
_SHORT: Final = 4096
"""Bytes up to which the whole head is matched without first looking for its end."""
_HEAD: Final = re.compile(
    rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: (" + VALUE + rb"))?"
    rb"((?:\r\n" + TOKEN + rb":" + VALUE + rb")*)\r\n\r\n"
)
_FIELD: Final = re.compile(rb"\n(" + TOKEN + rb"):[ \t]*([^\r\n]*)")
# Matched against the fields in lower case: those that set the framing, and those that are not passed on.
_NOTABLE: Final = re.compile(
    rb"\n(content-length|connection|transfer-encoding|keep-alive|proxy-[a-z-]+|te|trailer|upgrade|x-request-id)"
    rb":[ \t]*([^\r\n]*)"
)
_BODYLESS: Final = frozenset((204, 304))
_EVENTS: Final = b"text/event-stream"
_LINES: Final = (b"application/x-ndjson", b"application/ndjson")
_MOST_DIGITS: Final = 18
_DIGITS: Final = re.compile(rb"[0-9]{1,%d}" % _MOST_DIGITS)


class ResponseHead:
    """A response head.

    status          status code
    reason          reason phrase; b"" without one
    fields          the fields as they came, each with the CRLF before it
    plain           no field concerns this connection only, and Content-Length gives the framing
    keep_alive      the connection may be used again (RFC 9112 9.3)
    chunked         the body has the chunked coding
    content_length  bytes of the body; None when the head does not say
    end             index of the first byte after the head, in the bytes that were parsed
    """

    __slots__ = ("chunked", "content_length", "end", "fields", "keep_alive", "plain", "reason", "status")

    def __init__(
        self,
        status: int,
        reason: bytes,
        fields: bytes,
        plain: bool,
        keep_alive: bool,
        chunked: bool,
        content_length: int | None,
        end: int,
    ) -> None:
        self.status = status
        self.reason = reason
        self.fields = fields
        self.plain = plain
        self.keep_alive = keep_alive
        self.chunked = chunked
        self.content_length = content_length
        self.end = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ResponseHead) and self._facts() == other._facts()

    def _facts(self) -> tuple[object, ...]:
        framing = (self.plain, self.keep_alive, self.chunked, self.content_length, self.end)
        return (self.status, self.reason, self.fields, *framing)

    def __repr__(self) -> str:
        return f"<ResponseHead {self.status}>"

    @property
    def events(self) -> bool:
        """Whether the body is a stream of server-sent events that can be read: not one that is compressed."""
        if _EVENTS not in self.fields.lower():
            return False
        return (self.header(b"content-type") or b"").lower().startswith(_EVENTS) and not self._compressed

    @property
    def lines(self) -> bool:
        """Whether the body is a stream of lines of JSON that can be read: not one that is compressed."""
        kind = (self.header(b"content-type") or b"").lower()
        return kind.startswith(_LINES) and not self._compressed

    @property
    def _compressed(self) -> bool:
        return (self.header(b"content-encoding") or b"identity").lower() != b"identity"

    @property
    def headers(self) -> Headers:
        """The fields as a list, names in lower case."""
        return [(name.lower(), value.rstrip(b" \t")) for name, value in _FIELD.findall(self.fields)]

    def resized(self, length: int) -> ResponseHead:
        """Return the head of the same answer with another body, of `length` bytes and without a transfer coding."""
        return ResponseHead(self.status, self.reason, self.fields, False, self.keep_alive, False, length, 0)

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of a field, by its name in lower case; None without one."""
        if name not in self.fields.lower():
            return None
        return next((value for key, value in self.headers if key == name), None)


def json_head(status: int, length: int) -> ResponseHead:
    """Return the head of an answer with `length` bytes of JSON."""
    fields = b"\r\ncontent-type: application/json\r\ncontent-length: %d" % length
    return ResponseHead(status, b"", fields, True, True, False, length, 0)


_MOST_KNOWN: Final = 256
_LONGEST_KNOWN: Final = 512
_known: dict[bytes, ResponseHead] = {}
"""Short heads that were parsed lately, by their bytes without the value of Content-Length: an engine sends the same one
many times a second. A head that differs in that value only is made of the known one, at a third of the cost."""
_LENGTHS: Final = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")


def parse_head(data: bytes, seen: int = 0, switches: bool = False) -> ResponseHead | None:
    """Return the head at the start of `data`, or None while it is not complete.

    Interim responses (1xx) are returned like any other; the caller drops `data[:head.end]` and calls again.

    seen      bytes of `data` for which an earlier call returned None; they are not searched again
    switches  the request asked for another protocol, so that the answer may be 101

    Raises: WorkerInvalid for what is not HTTP/1.x, two lengths, an unknown transfer coding, 101 without `switches`, or
    a head over MAX_HEAD.
    """
    end = data.find(b"\r\n\r\n", 0, _LONGEST_KNOWN)
    if end < 0:
        return _parse(data, seen, switches)
    at = data.find(_LENGTHS[0], 0, end)
    if at < 0:
        at = data.find(_LENGTHS[1], 0, end)
    if at < 0:
        return _known.get(data[:end]) or _learn(data, seen, data[:end], switches)
    at += len(_LENGTHS[0])
    stop = data.find(b"\r", at)
    digits, key = data[at:stop], data[:at] + data[stop:end]
    known = _known.get(key)
    if known is None or not digits.isdigit() or len(digits) > _MOST_DIGITS:
        return _learn(data, seen, key, switches)
    fields = data[known.end - 4 - len(known.fields) : end]
    return ResponseHead(
        known.status, known.reason, fields, known.plain, known.keep_alive, known.chunked, int(digits), end + 4
    )


def _learn(data: bytes, seen: int, key: bytes, switches: bool) -> ResponseHead | None:
    """Parse a head, and keep it as a known one; but not a 101, which is no answer to other requests."""
    head = _parse(data, seen, switches)
    if head is not None and head.status != 101:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = head
    return head


def _parse(data: bytes, seen: int, switches: bool = False) -> ResponseHead | None:
    """Do what `parse_head` does, for a head that is not known."""
    # Matching a head of 64 KiB costs as much as answering ten requests: do not repeat it for each byte of a slow head.
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
    if (chunked and length is not None) or (code == 101 and not switches) or end > MAX_HEAD:
        raise WorkerInvalid
    keep_alive = minor == b"1"
    if connection:
        keep_alive = _persists(connection, keep_alive)
    if length is None or code in _BODYLESS:
        plain = False
    return ResponseHead(code, reason, fields, plain, keep_alive, chunked, length, end)


def _check_start(data: bytes, seen: int) -> None:
    """Check the beginning of an incomplete head.

    A bare LF is rejected here: the end of a head with such lines would never be found.

    Raises: WorkerInvalid, when no valid head begins like this.
    """
    start = b"HTTP/1."
    if len(data) > MAX_HEAD or not (data.startswith(start) or start.startswith(data)):
        raise WorkerInvalid
    if data.count(b"\n", seen) != data.count(b"\r\n", max(0, seen - 1)):
        raise WorkerInvalid


def _persists(connection: bytes, default: bool) -> bool:
    """Return whether the connection persists (RFC 9112 9.3); `connection` joins all Connection fields, `close` wins."""
    options = {option.strip() for option in connection.split(b",")}
    if b"close" in options:
        return False
    return default or b"keep-alive" in options


def framing_of(head: ResponseHead) -> Framing:
    """Return the framing of the body after `head`, for an answer to any method but HEAD. A 101 is followed by bytes."""
    if head.status in _BODYLESS or head.status < 200:
        return UntilClose() if head.status == 101 else Sized(0)
    if head.chunked:
        return Chunked()
    if head.content_length is not None:
        return Sized(head.content_length)
    return UntilClose()
