"""Find where the body of an HTTP/1.1 response ends (RFC 9112 6.3, 7.1); read and write the chunked coding.

The router passes a worker's bytes to the client unchanged. For each read it needs three facts: whether the framing is
still well-formed, where the message ends, and how many bytes would complete the current chunk. llhttp does not tell
the last two, so the framing is parsed here:

    framing.feed(data) -> index in `data` just after the message, or -1 while the message continues
    framing.gap        -> bytes missing until something else may follow

    chunk(data), LAST_CHUNK, fill(gap)     what the router itself writes in the chunked coding

The grammar is strict (no bare LF, no folding). Anything else raises WorkerInvalid: the router does not guess.
"""

from __future__ import annotations

import re
from typing import Final

from sglang_router.errors import WorkerInvalid
from sglang_router.wire.tokens import TOKEN, VALUE

MAX_TRAILERS: Final = 65536
"""Most bytes of all trailer fields of one body; an answer with more is invalid."""
_MAX_LINE: Final = 4096
"""Most bytes of a chunk's size line with its extensions, and of one trailer field."""
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e]*)?\r\n")
_SIZE_LINE_CUT: Final = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(?:;[\t\x20-\x7e]*)?\r?)?")
_SIZES: Final = {b"%x" % size: size for size in range(1, 2048)}
"""The size lines of usual chunks."""
_TRAILER: Final = re.compile(TOKEN + rb":" + VALUE + rb"\r\n")
_TRAILER_CUT: Final = re.compile(rb"\r|(?:" + TOKEN + rb"(?::" + VALUE + rb"\r?)?)?")

LAST_CHUNK: Final = b"0\r\n\r\n"
"""Ends a body in the chunked coding."""


def chunk(data: bytes) -> bytes:
    """Encode bytes as one chunk; b"" gives b"", because an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def fill(gap: int) -> bytes:
    """Return `gap` bytes that complete the current chunk, its CRLF included.

    They are newlines, which mean nothing between server-sent events.
    """
    return (b"\n" * max(0, gap - 2)) + b"\r\n"[max(0, 2 - gap) :] if gap else b""


class Framing:
    """Find where a response body ends. Each subclass is one way to mark the end (RFC 9112 6.3)."""

    __slots__ = ()

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Read the next bytes; return the index just after the message, or -1 while it continues.

        payload  a list, to which the content without its transfer coding is appended; None: not needed

        Raises: WorkerInvalid, when the framing is malformed.
        """
        raise NotImplementedError

    @property
    def gap(self) -> int | None:
        """Bytes missing until other content can follow in the same coding; None when none can follow."""
        return None

    @property
    def ends_at_close(self) -> bool:
        """Whether closing the connection is a valid end of the body here."""
        return False


class Sized(Framing):
    """A body of known length. left: bytes still to come."""

    __slots__ = ("left",)

    def __init__(self, length: int) -> None:
        self.left = length

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Count bytes; see `Framing.feed`."""
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
    """A body without a length: it ends when the worker closes the connection."""

    __slots__ = ()

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Take all bytes as content; see `Framing.feed`."""
        if payload is not None:
            payload.append(data)
        return -1

    @property
    def gap(self) -> int | None:
        """0: anything can follow at any byte."""
        return 0

    @property
    def ends_at_close(self) -> bool:
        """True: there is no other end."""
        return True


_SIZE, _DATA, _CRLF, _TRAILERS, _DONE = range(5)


class Chunked(Framing):
    """A chunked body (RFC 9112 7.1).

        SIZE --n--> DATA --> CRLF --> SIZE ...            each chunk
        SIZE --0--> TRAILERS --empty line--> DONE         the end

    An incomplete line at the end of a read is kept and joined with the next read; everything else is only counted. A
    malformed read changes nothing: `gap` then refers to the reads before it, which the client was sent.
    """

    __slots__ = ("_left", "_line", "_state", "_trailer_bytes")

    def __init__(self) -> None:
        self._state = _SIZE
        self._left = 0  # bytes of the chunk's data still to come, in DATA
        self._line = b""  # the beginning of an incomplete line
        self._trailer_bytes = 0

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Parse chunks and trailers; see `Framing.feed`."""
        kept = len(self._line)
        if self._state == _SIZE and not kept and payload is None:
            # The usual case: the read is exactly one chunk, so the state does not change.
            at = data.find(b"\r\n", 0, 5)
            if at > 0 and _SIZES.get(data[:at], -1) + at + 4 == len(data) and data.endswith(b"\r\n"):
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
            elif data.startswith(b"\r\n", pos):  # the empty line after the trailers
                self._state = _DONE
                return pos + 2 - kept
            else:
                match = _TRAILER.match(data, pos)
                if match is None or match.end() - pos > _MAX_LINE:
                    cut = _cut_line(_TRAILER_CUT, data, pos)
                    break
                self._trailer_bytes += match.end() - pos
                if self._trailer_bytes > MAX_TRAILERS:
                    raise WorkerInvalid
                pos = match.end()
        self._state, self._left, self._line = state, left, cut
        return -1

    @property
    def place(self) -> tuple[int, int, bytes]:
        """Where in the coding the bytes read so far end; two framings at the same place read the next bytes alike."""
        return self._state, self._left, self._line

    @property
    def gap(self) -> int | None:
        """Bytes that complete the current chunk; None inside a size line or the trailers."""
        if self._state == _DATA:
            return self._left + 2
        if self._state == _CRLF:
            return 2 - len(self._line)
        if self._state == _SIZE and not self._line:
            return 0
        return None


def _cut_line(beginning: re.Pattern[bytes], data: bytes, pos: int) -> bytes:
    """Return the rest of a read, which must be the beginning of a line.

    Raises: WorkerInvalid, when it is not.
    """
    line = data[pos:]
    if len(line) > _MAX_LINE or not beginning.fullmatch(line):
        raise WorkerInvalid
    return line
