"""Bodies that come in pieces: whole whatever the pieces, and no larger in memory than they are."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from sglang_router.wire.gathering import Body, gather, whole
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Request, RequestParser

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


def gathered(pieces: list[bytes], announced: int) -> tuple[Body, int]:
    """Return the body that pieces make, and the most pieces that were kept."""
    body: Body = pieces[0]
    kept: list[bytes] = []
    size = most = 0
    for number, piece in enumerate(pieces):
        size += len(piece)
        if number:
            body = gather(body, kept, piece, announced, size == announced)
            most = max(most, len(kept))
    body = whole(body, kept)
    assert not kept
    return body, most


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=12), st.booleans())
def test_the_body_is_its_pieces(sizes: list[int], chunked: bool) -> None:
    pieces = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    content = b"".join(pieces)
    body, _ = gathered(pieces, -1 if chunked else len(content))
    assert body == content


def test_large_pieces_are_joined_once_and_make_bytes() -> None:
    pieces = [b"a" * 65536, b"b" * 65536, b"c" * 10]
    body, most = gathered(pieces, 131_082)
    assert type(body) is bytes
    assert most == 2


def test_tiny_pieces_are_not_kept_one_by_one() -> None:
    _, most = gathered([b"a" * 5000, b"b" * 5000, *[b"c"] * 500], 10_500)
    assert most == 1


def test_more_than_a_megabyte_is_one_buffer() -> None:
    body, most = gathered([b"a" * 65536] * 17, 17 * 65536)
    assert isinstance(body, bytearray)
    assert most == 0


def test_a_body_of_one_byte_reads_takes_its_own_size() -> None:
    size = 200_000
    parser = RequestParser(Limits())
    ready = parser.feed(HEAD % size)
    tracemalloc.start()
    try:
        for _ in range(size):
            ready = ready or parser.feed(b"x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (request,) = ready
    assert isinstance(request, Request)
    assert request.body == b"x" * size
    assert (
        peak < 3 * size
    )  # a buffer that moves is there twice for a moment; a list of its bytes takes 40 times as much
