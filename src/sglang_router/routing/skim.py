"""Find the members of a large JSON object, in steps of bounded work.

    skim = Skim(body, wanted)
    while not skim.step(): ...        a step takes about a millisecond; other work is done in between
    skim.spans                        {b"model": (10, 13), ...}: where the values of the wanted members are
    skim.close                        where the object's closing brace is

Decoding a body of 50 MB takes 50 to 700 ms, in which the event loop serves nobody else; a thread does not help, because
the decoder keeps the interpreter's lock. So a large body is not decoded. Only the names of the outermost members and
the ends of their values are looked for, in one window of the body after the other, each with a few calls that run at
memory speed.

    {"model":"m","messages":[{"role":"user","content":"say \\"[\\""}, ...],"stream":true}
     '- STRING   '- STRING   '- NESTED: ends where the depth returns to 0  '- STRING   '- SCALAR

    a window of NESTED     [{"role":"user","content":"say \\"[\\""},...
    without escapes        [{"role":"user","content":"say ..[..."},...      each quote begins or ends a string
    outside of strings     [{::},...                                        every other piece between quotes
    brackets               001...                                           how deep is it; was it 0 in between?

What is inside a value is not checked: the engine does that, and the client gets its answer. So no body is refused that
some engine can read. Only a nesting that the readers of engines cannot follow is refused: they answer it with 500.
"""

from __future__ import annotations

import re
from collections.abc import Container
from itertools import accumulate
from operator import add
from typing import Final

import msgspec

from sglang_router.errors import InvalidJSON, InvalidRequest

Content = bytes | bytearray
"""The body of a request; a large one is a bytearray, which nobody changes once it is whole."""
Spans = dict[bytes, tuple[int, int]]
"""Where values begin and end, by the names of their members."""
WORK: Final = 500_000
"""Work of one step, about in nanoseconds; its last window may exceed that by a few hundred thousand."""
WINDOWS: Final = (256, 16384)
"""Bytes of the smallest and the largest window. They grow while a value goes on, so that a short value costs little."""
_PER_TOKEN, _PER_QUOTE, _PER_PAIR, _PER_BRACKET = 1000, 40, 20, 30
"""What they cost, about in nanoseconds; a byte costs one or two."""
_MOST_MEMBERS: Final = 10_000
"""Members of the outermost object above which it is refused: each costs microseconds, and no engine knows as many."""
_DEEPEST: Final = 1024
"""Depth of a value from about which on it is refused, as decoding does: readers that recurse give up there."""
_INNERMOST: Final = 3
"""How often the innermost pairs of brackets are taken out, before the depth is followed: mostly few remain."""
_LONGEST_NAME: Final = 256
"""Bytes above which a name is not that of a wanted member, even if each of its letters is escaped."""

_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_SCALAR: Final = re.compile(rb"[-+.0-9A-Za-z]*")  # NaN and Infinity as well: some readers know them
_TOKEN: Final = re.compile(rb'"[^"]*"?|[\[{]|([\]}])')
_BYTE_ORDER_MARK: Final[bytes] = b"\xef\xbb\xbf"  # some readers skip it
_OTHER_ENCODINGS: Final = b"\0\xfe\xff"  # how they begin; Python engines read them
_QUOTE, _OPENS_OBJECT, _CLOSES_OBJECT, _COMMA, _COLON = b'"{},:'
_OPENS: Final = b"[{"
_FOLD: Final = bytes.maketrans(b"[{]}", b"0011")
_TURNED: Final = bytes.maketrans(b"01", b"10")
_NOT_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")

BEGIN, NAME, FIRST_NAME, COLON, VALUE, STRING, NESTED, SCALAR, AFTER, REST, DONE = range(11)
"""What comes next: an object; the name of a member, or of the first one or the end; ...; white space; nothing."""
_STATES: Final = (
    "BEGIN",
    "NAME",
    "FIRST_NAME",
    "COLON",
    "VALUE",
    "STRING",
    "NESTED",
    "SCALAR",
    "AFTER",
    "REST",
    "DONE",
)


class Skim:
    """See the module.

    at     how many bytes are read
    spans  where the values of the wanted members begin and end, by name; of several with one name, the last
    close  where the closing brace is, once it is found
    """

    __slots__ = (
        "_begin",
        "_body",
        "_depth",
        "_inside",
        "_is_name",
        "_members",
        "_name",
        "_size",
        "_state",
        "_wanted",
        "_window",
        "_windows",
        "at",
        "close",
        "spans",
    )

    def __init__(self, body: Content, wanted: Container[bytes], windows: tuple[int, int] = WINDOWS) -> None:
        self._body = memoryview(body)
        self._size = len(body)
        self._wanted = wanted
        self._windows = windows
        self.spans: Spans = {}
        self.close = -1
        self._state = BEGIN
        self.at = 0
        self._members = 0
        # per token
        self._begin = 0  # where it begins
        self._window = windows[0]
        self._is_name = False  # STRING: it is the name of a member
        self._depth = 0  # NESTED: brackets that are open
        self._inside = False  # NESTED: in a string
        # per member
        self._name = b""  # if it is wanted

    @property
    def empty(self) -> bool:
        """Whether the object has no members."""
        return not self._members

    def __repr__(self) -> str:
        return f"<Skim {_STATES[self._state]} at {self.at} of {self._size}>"

    def step(self, work: int = WORK) -> bool:
        """Go on for about so many nanoseconds; return whether the end is reached.

        Raises: InvalidJSON, when the body is not a JSON object; InvalidRequest, when it has too many members.
        """
        while work > 0:
            before = self.at
            if self._state == STRING:
                self._string()
            elif self._state == NESTED:
                work -= self._nested()
            elif self._state == SCALAR:
                self._scalar()
            else:
                self._between()
            if self._state == DONE:
                return True
            work -= 2 * (self.at - before) + _PER_TOKEN
        return False

    def _wrong(self, what: str) -> InvalidJSON:
        self._body.release()
        return InvalidJSON(f"The body is not a JSON object: {what} (byte {self.at}).")

    # -- between values ------------------------------------------------------------------------------------------------

    def _between(self) -> None:
        """Skip white space, and take the character that follows it."""
        state, at = self._state, self.at
        if state == BEGIN and not at and self._body[:3] == _BYTE_ORDER_MARK:
            at = 3
        end = min(at + self._windows[1], self._size)
        at = self.at = _end_of(_SPACE, self._body, at, end)
        if at == end:
            if end < self._size:
                return  # more white space
            if state != REST:
                raise self._wrong("it is truncated")
            self._finish()
            return
        byte = self._body[at]
        if state == VALUE:
            self._value(byte, at)
        elif byte == _QUOTE and state in (NAME, FIRST_NAME):
            self._begin_string(at, True)
        elif byte == _COLON and state == COLON:
            self._move(VALUE)
        elif byte == _COMMA and state == AFTER:
            self._move(NAME)
        elif byte == _OPENS_OBJECT and state == BEGIN:
            self._move(FIRST_NAME)
        elif byte == _CLOSES_OBJECT and state in (AFTER, FIRST_NAME):
            self.close = at
            self._move(REST)
        elif at < 4 and byte in _OTHER_ENCODINGS:
            raise self._wrong("it is encoded in UTF-16 or UTF-32, and only smaller bodies may be")
        else:
            raise self._wrong(f"unexpected {chr(byte)!r}")

    def _move(self, state: int) -> None:
        """Go on in another state, behind a character."""
        self._state = state
        self.at += 1

    def _finish(self) -> None:
        self._state = DONE
        self._body.release()

    # -- values --------------------------------------------------------------------------------------------------------

    def _value(self, byte: int, at: int) -> None:
        """Begin a value, by its first character."""
        self._begin = at
        if byte == _QUOTE:
            self._begin_string(at, False)
        elif byte in _OPENS:
            self._state = NESTED
            self._window = self._windows[0]
            self._depth = 1
            self._inside = False
            self.at = at + 1
        else:
            self._state = SCALAR

    def _end_value(self) -> None:
        """End a value, behind its last character."""
        if self._name:
            self.spans[self._name] = (self._begin, self.at)
        self._state = AFTER

    def _scalar(self) -> None:
        """Skip a number or a word."""
        end = min(self.at + self._windows[1], self._size)
        self.at = _end_of(_SCALAR, self._body, self.at, end)
        if self.at < end or end == self._size:
            if self.at == self._begin:
                raise self._wrong("a value is missing")
            self._end_value()

    def _begin_string(self, at: int, is_name: bool) -> None:
        self._state = STRING
        self._window = self._windows[0]
        self._begin = at
        self._is_name = is_name
        self.at = at + 1

    def _string(self) -> None:
        """Skip a window of a string."""
        piece = self._next_window()
        quote = piece.find(b'"')
        if quote < 0:
            self.at += len(piece)
            return
        self.at += quote + 1
        if self._is_name:
            self._end_name()
        else:
            self._end_value()

    def _end_name(self) -> None:
        """End the name of a member, behind its quote."""
        self._members += 1
        if self._members > _MOST_MEMBERS:
            raise InvalidRequest(f"The body is a JSON object with more than {_MOST_MEMBERS} members.")
        self._state = COLON
        self._name = b""
        if self.at - self._begin <= _LONGEST_NAME:
            name = _decoded(bytes(self._body[self._begin : self.at]))
            if name in self._wanted:
                self._name = name

    def _nested(self) -> int:
        """Skip a window of an array or object; return what that cost beside its bytes."""
        piece = self._next_window()
        parts = piece.split(b'"')
        brackets = b"".join(parts[self._inside :: 2]).translate(_FOLD, _NOT_BRACKETS)
        closing = brackets.count(b"1")
        opening = len(brackets) - closing
        cost = _PER_QUOTE * len(parts)
        if (
            closing >= self._depth or self._depth + opening > _DEEPEST
        ):  # otherwise it is neither at its end nor too deep
            for _ in range(_INNERMOST):  # a pair that holds nothing does not lower the depth
                brackets = brackets.replace(b"01", b"")
            cost += _PER_PAIR * opening + _PER_BRACKET * len(brackets)
            if self._depth + opening > _DEEPEST and self._depth - _lowest(brackets.translate(_TURNED)) > _DEEPEST:
                raise self._wrong(f"it is nested deeper than {_DEEPEST}")
            if self._depth + _lowest(brackets) <= 0:
                self._end_nested(piece)
                return cost
        self._depth += opening - closing
        self._inside ^= len(parts) % 2 == 0
        self.at += len(piece)
        return cost

    def _end_nested(self, piece: bytes) -> None:
        """Find the end of an array or object, which is in this window: in smaller windows, until one is small."""
        if len(piece) > self._windows[0]:
            self._window = max(self._windows[0], len(piece) // 16)
            return
        at = piece.index(b'"') + 1 if self._inside else 0
        depth = self._depth
        for token in _TOKEN.finditer(piece, at):
            if token[1]:
                depth -= 1
                if not depth:
                    self.at += token.end()
                    self._end_value()
                    return
            elif token[0] in _OPENS:
                depth += 1
        raise AssertionError(f"no end in {piece!r}")

    def _next_window(self) -> bytes:
        """Return the next bytes of a string or nested value, with dots for escapes; the next window is larger.

        It never ends within an escape.
        """
        at, size = self.at, self._size
        end = min(at + self._window, size)
        if at == end:
            raise self._wrong("it is truncated")
        piece = bytes(self._body[at:end])
        if self._window < self._windows[1]:
            self._window *= 2
        if b"\\" not in piece:
            return piece
        piece = piece.replace(b"\\\\", b"..").replace(b'\\"', b"..")
        return piece[:-1] if piece.endswith(b"\\") and len(piece) > 1 else piece


def _end_of(pattern: re.Pattern[bytes], body: memoryview, at: int, end: int) -> int:
    match = pattern.match(body, at, end)
    assert match is not None
    return match.end()


def _depths(byte: int) -> list[int]:
    """Return the depth after each of the eight brackets that the bits of a byte stand for: 0 opens, 1 closes."""
    return list(accumulate(1 - 2 * int(bit) for bit in f"{byte:08b}"))


_NET: Final = tuple(_depths(byte)[-1] for byte in range(256))
_LOWEST: Final = tuple(min(_depths(byte)) for byte in range(256))


def _lowest(brackets: bytes) -> int:
    """Return the lowest depth that brackets lead to, or 0 for none. Eight of them make a byte, which is faster."""
    count = -(-len(brackets) // 8)
    packed = int(brackets.ljust(8 * count, b"0") or b"0", 2).to_bytes(count, "big")
    before = accumulate(map(_NET.__getitem__, packed), initial=0)
    return min(map(add, before, map(_LOWEST.__getitem__, packed)), default=0)


def _decoded(name: bytes) -> bytes:
    """Return the name of a member without quotes and escapes."""
    if b"\\" not in name:
        return name[1:-1]
    try:
        return msgspec.json.decode(name, type=str).encode()
    except (msgspec.DecodeError, UnicodeError):
        return b""
