"""Add members to a JSON object without changing its other bytes."""

from __future__ import annotations

from typing import Final

from sglang_router.wire.gathering import Body

_COPIED: Final = 65536
"""Bytes of a body up to which a copy is made."""


class Spliced:
    """A large body with members added, as two pieces, so that it is not copied.

    body  the body as it came
    end   how many bytes of it are sent
    tail  what is sent after them
    """

    __slots__ = ("body", "end", "tail")

    def __init__(self, body: Body, end: int, tail: bytes) -> None:
        self.body = body
        self.end = end
        self.tail = tail

    def __len__(self) -> int:
        return self.end + len(self.tail)


_LOOK_BACK: Final = 64
"""Bytes before the end in which the last member usually ends; white space makes it more."""


def splice(body: Body, members: bytes) -> bytes:
    """Return `body`, a JSON object, with `members` (such as b'"data_parallel_rank":1') added at its end.

    Engines use the last of several members with the same name, so these override the client's. The body is copied once.

    Raises: ValueError, when `body` has no "}".
    """
    end = body.rindex(b"}")
    comma = b"" if _last(body, end) == b"{" else b","
    with memoryview(body) as view:
        return b"".join((view[:end], comma, members, view[end:]))


def _last(body: Body, end: int) -> bytes:
    """Return the last byte before `end` that is not white space; b"" when there is none."""
    span = _LOOK_BACK
    while True:
        before = bytes(body[max(0, end - span) : end]).rstrip()
        if before or span >= end:
            return before[-1:]
        span *= 8


def splice_at(body: Body, place: tuple[int, bytes], members: bytes) -> bytes | Spliced:
    """Return the same for a large body without a copy of it; white space behind the closing brace is dropped.

    place  where the closing brace is, and what separates another member from those before
    """
    end, separator = place
    tail = b"%b%b}" % (separator, members)
    return Spliced(body, end, tail) if end > _COPIED else bytes(memoryview(body)[:end]) + tail
