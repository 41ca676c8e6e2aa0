"""Add members to a JSON object, or replace a value in a body, without changing its other bytes."""

from __future__ import annotations

from typing import Final

from sglang_router.wire.gathering import Body

_COPIED: Final = 65536
"""Bytes of a body up to which a copy is made."""


class Spliced:
    """A large body that was changed, as the pieces of which it consists, so that it is not copied.

    pieces  parts of the body as it came, and what is sent between and after them; none is empty
    """

    __slots__ = ("pieces",)

    def __init__(self, *pieces: memoryview) -> None:
        self.pieces = [piece for piece in pieces if len(piece)]

    def __len__(self) -> int:
        return sum([len(piece) for piece in self.pieces])


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
    view = memoryview(body)
    return Spliced(view[:end], memoryview(tail)) if end > _COPIED else bytes(view[:end]) + tail


def replace(body: Body, span: tuple[int, int], value: bytes) -> bytes | Spliced:
    """Return a body in which `value` stands at this place; a large one as pieces, without a copy of it."""
    begin, end = span
    view = memoryview(body)
    if len(body) > _COPIED:
        return Spliced(view[:begin], memoryview(value), view[end:])
    return b"".join((view[:begin], value, view[end:]))


def replace_and_splice(
    body: Body, span: tuple[int, int], value: bytes, place: tuple[int, bytes], members: bytes
) -> Spliced:
    """Return a large JSON object in which `value` stands at `span`, and `members` at the end; see `splice_at`."""
    begin, end = span
    close, separator = place
    view = memoryview(body)
    tail = b"%b%b}" % (separator, members)
    return Spliced(view[:begin], memoryview(value), view[end:close], memoryview(tail))
