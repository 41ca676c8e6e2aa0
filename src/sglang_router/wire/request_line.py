"""Check request lines to the byte: METHOD SP TARGET SP HTTP/1.x CRLF, and nothing but CRLF before it (RFC 9112 2.2, 3).

llhttp is more tolerant: two spaces, `RTSP/1.0`, a bare LF or CR in front. It says what it understood, but not where
that stood; so the line that was meant must stand, to the byte, where the message begins. For the first message
of a read that is its first byte. Behind another message it is found by counting, or, behind a chunked body, by search.
"""

from __future__ import annotations

import re
from typing import Final

_EMPTY_LINES: Final = re.compile(rb"(?:\r\n)*")
_END_OF_HEAD: Final = b"\r\n\r\n"
_GAP: Final = 64
"""Bytes before a line that was searched for, in which bare CR and LF are looked for."""


class RequestLines:
    """Follows where request lines stand in the bytes of one connection. `read`, then the others, then `end`.

    In the usual case the parser does these two itself, for speed: a read between two requests is put into `raw`, `at`
    is 0; and when it ends with the last byte of a message that is no line end, or inside of a body, `raw` is emptied.

    raw     the bytes of this read, with those of a head that began earlier
    at      where the next line begins; after `check`: the end of the last line
    exact   `at` is that place, not only a place before it
    before  bytes of the body that came in earlier reads; negative: its head is in `raw`, before the body
    cr      the last read ended with a CR behind the last message: it belongs to the next one
    """

    __slots__ = ("at", "before", "cr", "exact", "raw")

    def __init__(self) -> None:
        self.raw = b""
        self.at = 0
        self.before = 0
        self.exact = True
        self.cr = False

    def read(self, data: bytes, mid_head: bool, before: int = 0) -> None:
        """Take the bytes of one read. before: bytes of the body that has begun."""
        if mid_head:
            self.raw += data
        else:
            self.go_on(b"\r" + data if self.cr else data, 0, before)
            self.cr = False

    def go_on(self, data: bytes, at: int, before: int = 0) -> None:
        """Continue in these bytes, behind a head that is not in them."""
        self.raw = data
        self.at = at
        self.before = before
        self.exact = True

    def follows(self, size: int, chunked: bool) -> None:
        """A message begins behind another one in the same read. size, chunked: of the other one's body."""
        if chunked:
            self.exact = False
        elif self.before < 0:
            self.at = self.raw.find(_END_OF_HEAD, self.at) + len(_END_OF_HEAD) + size
        else:
            self.at += size - self.before

    def check(self, method: bytes, target: bytes, http10: bool) -> bool:
        """Return whether this line stands where the message begins.

        Usually it is enough to see where the version stands: what is before it then has just the length it must have.
        """
        version = self.at + len(method) + 1 + len(target)
        if self.exact and self.raw.find(b" HTTP/1.", self.at) == version:
            self.at = version + 9
            self.before = -1
            return True
        return self._search(method + b" " + target + (b" HTTP/1.0\r\n" if http10 else b" HTTP/1.1\r\n"))

    def _search(self, line: bytes) -> bool:
        raw, at = self.raw, self.at
        if not self.exact:
            at = raw.find(line, at)
            if at < 0 or not self._only_empty_lines(at):
                return False
            self.exact = True
        elif not raw.startswith(line, at):
            empty = _EMPTY_LINES.match(raw, at)
            at = empty.end() if empty is not None else at
            if not raw.startswith(line, at):
                return False
        self.at = at + len(line) - 2
        self.before = -1
        return True

    def _only_empty_lines(self, end: int) -> bool:
        """Return whether the CR and LF before a place are whole pairs, behind a chunked body, which ends with CRLF."""
        start = max(self.at, end - _GAP)
        before = self.raw[start:end]
        gap = before[len(before.rstrip(b"\r\n")) :]
        if len(gap) == len(before) and start == self.at and self.before >= 0:
            gap = gap.removeprefix(b"\n")  # its CR came in an earlier read
        return gap.count(b"\r\n") * 2 == len(gap)

    def end(self, mid_head: bool, mid_body: bool, size: int = -1, chunked: bool = False) -> bool:
        """End a read; return whether there is nothing but empty lines behind the last message.

        Only a head that is not complete is kept. size, chunked: of the body of the last message; negative: none ended.
        """
        if mid_head:
            self.raw = self.raw[self.at :]
            self.at = 0
            return True
        fine = mid_body or not self.raw.endswith((b"\r", b"\n")) or self._ends_with_empty_lines(size, chunked)
        self.raw = b""
        self.exact = True
        return fine

    def _ends_with_empty_lines(self, size: int, chunked: bool) -> bool:
        if size >= 0:
            self.follows(size, chunked)
        end = len(self.raw)
        self.cr = self.raw.endswith(b"\r") and end > self.at
        end -= self.cr
        if not self.exact:
            return self._only_empty_lines(end)
        empty = _EMPTY_LINES.match(self.raw, self.at)
        return empty is not None and empty.end() >= end
