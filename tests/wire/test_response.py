"""Responses: a corpus of valid and invalid answers of workers, in every split; and chunked bodies of any shape."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import WorkerInvalid
from sglang_router.wire.framing import Chunked, Framing, Sized, UntilClose
from sglang_router.wire.response import MAX_HEAD, ResponseHead, _parse, framing_of, parse_head
from wire_corpus import Answered, Case, each_case, pieces, read_response, splits

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MAX_LINE = 4096


def head_of(raw: bytes) -> ResponseHead:
    head = parse_head(raw)
    assert head is not None
    return head


_LINES = (b"content-length: ", b"Content-Length: ", b"content-Length: ", b"x-content-length: ", b"X: ", b"connection: ")
_VALUES = (b"5", b"05", b"17", b"", b" 5", b"5 ", b"+5", b"5, 5", b"9" * 18, b"9" * 19, b"keep-alive", b"close")
_FIELDS = st.lists(st.sampled_from([line + value for line in _LINES for value in _VALUES]), max_size=3)
_HEADS = st.lists(st.tuples(st.sampled_from((b"200 OK", b"204", b"503 No")), _FIELDS), min_size=1, max_size=8)


@given(st.lists(st.tuples(st.sampled_from((b"200 OK", b"204", b"503 No")), _FIELDS), min_size=1, max_size=8))
def test_a_head_made_of_a_known_one_is_what_parsing_it_gives(
    heads: list[tuple[bytes, list[bytes]]],
) -> None:
    for status, fields in heads:
        raw = b"HTTP/1.1 %s\r\n%s\r\n" % (status, b"".join(field + b"\r\n" for field in fields))
        assert _told(parse_head, raw + b"body") == _told(_parse, raw + b"body")


def _told(parse: Callable[[bytes, int], ResponseHead | None], raw: bytes) -> ResponseHead | str | None:
    try:
        return parse(raw, 0)
    except WorkerInvalid:
        return "invalid"


# -- what is taken and what is not -------------------------------------------------------------------------------------


@each_case("responses.txt")
def test_verdict_in_every_split(case: Case) -> None:
    whole = read_response([case.raw])
    assert whole.verdict == case.verdict
    if case.verdict == "ok":
        assert whole.understood(len(case.raw)) == case.understood
    for reads in splits(case.raw):
        assert _facts(read_response(reads)) == _facts(whole), reads


def test_what_was_looked_through_is_not_looked_through_again() -> None:
    """Only new bytes can show the end or an error, but both may begin in the bytes that were searched before."""
    raw = OK + b"A: %s\r\nContent-Length: 5\r\n\r\nhello" % (b"b" * 5000)
    end = raw.index(b"hello")
    for seen in (1, 20, 4096, 4097, *range(end - 25, end)):
        assert parse_head(raw[:seen]) is parse_head(raw[:seen], seen - 1) is None
        assert parse_head(raw, seen) == parse_head(raw)
        line = raw[:seen].rstrip(b"\r\n")
        with pytest.raises(WorkerInvalid):
            parse_head(line + b"\n", len(line))


def test_a_head_that_drips_in_costs_no_more_than_its_bytes() -> None:
    """Ten thousand reads that each search all of 64 KiB would take twenty seconds of CPU."""
    raw = OK + b"A: b\r\n" * 10_000
    begun = time.process_time()
    for size in range(len(raw) - 10_000, len(raw)):
        assert parse_head(raw[:size], size - 1) is None
    assert time.process_time() - begun < 5.0


def _facts(answered: Answered) -> tuple[object, ...]:
    gap = answered.framing.gap if answered.framing is not None and answered.end < 0 else None
    return (answered.verdict, answered.head, answered.interim, answered.payload, answered.end, gap)


def test_a_head_is_told_whole() -> None:
    raw = b"HTTP/1.1 503 Not now\r\nX-Two: 1\r\nx-two:\t2 \r\nRetry-After: 3\r\nContent-Length: 07\r\n\r\nbody"
    head = head_of(raw)
    assert (head.status, head.reason, head.content_length, head.chunked) == (503, b"Not now", 7, False)
    assert head.headers == [(b"x-two", b"1"), (b"x-two", b"2"), (b"retry-after", b"3"), (b"content-length", b"07")]
    assert (head.header(b"retry-after"), head.header(b"x-two"), head.header(b"x")) == (b"3", b"1", None)
    assert head.header(b"retry") is None
    assert raw[head.end :] == b"body"


@pytest.mark.parametrize(
    ("version", "connection", "stays"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.1", b"connection:CLOSE \r\n", False),
        (b"1.1", b"Connection: keep-alive , Close\r\n", False),
        (b"1.1", b"Connection: x-close\r\n", True),
        (b"1.1", b"Connection: close\r\nConnection: keep-alive\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", True),
        (b"1.0", b"Connection: x, Keep-Alive\r\n", True),
        (b"1.0", b"Connection: keep-alive\r\nConnection: close\r\n", False),
    ],
)
def test_whether_the_worker_stays(version: bytes, connection: bytes, stays: bool) -> None:
    assert head_of(b"HTTP/%s 200 OK\r\n%sContent-Length: 0\r\n\r\n" % (version, connection)).keep_alive is stays


@pytest.mark.parametrize(
    ("raw", "kind", "ends_at_close"),
    [
        (OK + b"Content-Length: 5\r\n\r\n", Sized, False),
        (OK + b"\r\n", UntilClose, True),
        (CHUNKED, Chunked, False),
        (b"HTTP/1.1 204 No\r\n\r\n", Sized, False),
        (b"HTTP/1.1 304 No\r\nTransfer-Encoding: chunked\r\n\r\n", Sized, False),
    ],
)
def test_how_a_body_ends(raw: bytes, kind: type[Framing], ends_at_close: bool) -> None:
    framing = framing_of(head_of(raw))
    assert (type(framing), framing.ends_at_close) == (kind, ends_at_close)


@given(st.lists(st.binary(max_size=80), max_size=6))
def test_no_bytes_make_it_raise_anything_else(reads: list[bytes]) -> None:
    for start in (b"", b"HTTP/1.1 ", OK, CHUNKED, CHUNKED + b"0\r\n"):
        read_response([start, *reads])


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_head_of_the_full_size_is_read_in_every_split() -> None:
    raw = OK + b"A: %s\r\nContent-Length: 2\r\n\r\n"
    raw %= b"b" * (MAX_HEAD - len(raw) + 2)
    assert len(raw) == MAX_HEAD
    for cut in (1, 20, *range(MAX_HEAD - 25, MAX_HEAD)):
        assert read_response([raw[:cut], raw[cut:] + b"hi!"]).understood(len(raw) + 3) == "200 hi +1"


@pytest.mark.parametrize(
    "raw",
    [
        OK + b"A: %s\r\n\r\n" % (b"b" * MAX_HEAD),
        OK + b"A: %s" % (b"b" * MAX_HEAD),
        OK + b"%s" % (b"a" * MAX_HEAD),
        b"HTTP/1.1 200 %s" % (b"a" * MAX_HEAD),
        OK + b"A: b\r\n" * (MAX_HEAD // 6),
        CHUNKED + b"5;%s\r\nhello\r\n0\r\n\r\n" % (b"a" * MAX_LINE),
        CHUNKED + b"0\r\nA: %s\r\n\r\n" % (b"b" * MAX_LINE),
        CHUNKED + b"0\r\n" + b"A: %s\r\n" % (b"b" * 4000) * 17 + b"\r\n",
    ],
    ids=lambda raw: repr(raw[:60]),
)
def test_over_a_limit_in_every_split(raw: bytes) -> None:
    for reads in ([raw], [raw[:60], raw[60:]], [raw[:4000], raw[4000:]], pieces(raw, range(1000, len(raw), 1000))):
        assert read_response(reads).verdict == "502"


@pytest.mark.parametrize("line", [b"5;%s\r\nhello\r\n0\r\n\r\n", b"0\r\nA:%s\r\n\r\n"])
def test_a_line_of_the_full_size_in_every_split(line: bytes) -> None:
    raw = CHUNKED + line % (b"a" * (MAX_LINE - 4))
    for reads in ([raw], *([raw[:cut], raw[cut:]] for cut in range(len(raw) - 30, len(raw)))):
        assert read_response(reads).verdict == "ok"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"HTTP/1.1 200 ", b"a"),
        (OK, b"a"),
        (OK + b"A: ", b"b"),
        (CHUNKED + b"5;", b"a"),
        (CHUNKED + b"0\r\nA: ", b"b"),
        (CHUNKED + b"0\r\n", b"A: b\r\n"),
    ],
    ids=repr,
)
def test_what_never_ends_is_refused(start: bytes, more: bytes) -> None:
    assert read_response([start, *[more * 500] * (MAX_HEAD // 500 + 1)]).verdict == "502"


# -- chunked bodies of any shape ---------------------------------------------------------------------------------------


class Body(NamedTuple):
    """A complete chunked body, as a worker may send it."""

    chunks: list[tuple[bytes, bytes]]
    """Size line and content of each chunk, without the CRLF after them."""
    end: bytes
    """The last chunk, trailers and the empty line."""

    @property
    def raw(self) -> bytes:
        return b"".join(b"%s\r\n%s\r\n" % chunk for chunk in self.chunks) + self.end

    @property
    def content(self) -> bytes:
        return b"".join(content for _, content in self.chunks)

    def gap(self, cut: int) -> int | None:
        """Return the bytes missing for the next size line when only `cut` bytes came; None when none can follow."""
        for size, content in self.chunks:
            line, whole = len(size) + 2, len(size) + len(content) + 4
            if cut < whole:
                return 0 if cut == 0 else None if cut < line else whole - cut
            cut -= whole
        return None if cut else 0


_texts = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=8).map(str.encode)
_names = st.text("abcXYZ012-_!#$%&'*+.^`|~", min_size=1, max_size=6).map(str.encode)
_spellings = st.sampled_from([b"%x", b"%X", b"%04x", b"%015x"])
_chance = st.randoms(use_true_random=False)


@st.composite
def _size_lines(draw: st.DrawFn, size: int) -> bytes:
    return draw(_spellings) % size + draw(st.just(b"") | _texts.map(lambda text: b";" + text))


@st.composite
def _bodies(draw: st.DrawFn) -> Body:
    contents = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    trailers = b"".join(b"%s:%s\r\n" % field for field in draw(st.lists(st.tuples(_names, _texts), max_size=2)))
    return Body(
        [(draw(_size_lines(len(content))), content) for content in contents],
        draw(_size_lines(0)) + b"\r\n" + trailers + b"\r\n",
    )


def _some_reads(raw: bytes, chance: random.Random) -> list[bytes]:
    return pieces(raw, (chance.randint(0, len(raw)) for _ in range(4)))


@given(_bodies(), st.binary(max_size=20), _chance)
def test_the_end_is_exact_and_the_payload_equal(body: Body, behind: bytes, chance: random.Random) -> None:
    stream = body.raw + behind
    for reads in (_some_reads(stream, chance), pieces(stream, range(1, len(stream)))):
        decoding, passing = Chunked(), Chunked()
        payload: list[bytes] = []
        start, end = 0, -1
        for data in reads:
            end = decoding.feed(data, payload)
            assert passing.feed(data) == end
            if end >= 0:
                break
            start += len(data)
            assert passing.gap == decoding.gap == body.gap(start)
        assert start + end == len(body.raw)
        assert b"".join(payload) == body.content


@given(_bodies(), _chance)
def test_behind_the_gap_a_chunk_may_follow(body: Body, chance: random.Random) -> None:
    """Wherever a body breaks off: after `gap` bytes of filling, a new chunk is read as one."""
    sent = body.raw[: chance.randint(0, len(body.raw) - 1)]
    framing = Chunked()
    payload: list[bytes] = []
    for data in _some_reads(sent, chance):
        assert framing.feed(data, payload) == -1
    gap = framing.gap
    assert gap == body.gap(len(sent))
    if gap is not None:
        open_content = b"?" * max(0, gap - 2)
        added = open_content + b"\r\n"[max(0, 2 - gap) :] + b"5\r\nadded\r\n0\r\n\r\n"
        so_far = b"".join(payload)
        assert framing.feed(added, payload) == len(added)
        assert body.content.startswith(so_far)
        assert b"".join(payload) == so_far + open_content + b"added"


@given(_bodies(), st.sampled_from([b"zz\r\n", b"\n", b"\0", b"5 \r\n", b"\r\r"]), _chance)
def test_a_read_that_breaks_the_framing_changes_nothing(body: Body, junk: bytes, chance: random.Random) -> None:
    """The client was not sent that read: `gap` still refers to the reads before it."""
    cut = chance.randint(0, len(body.raw) - 1)
    framing = Chunked()
    for data in _some_reads(body.raw[:cut], chance):
        framing.feed(data)
    try:
        framing.feed(junk)
    except WorkerInvalid:
        assert framing.gap == body.gap(cut)
        assert framing.feed(body.raw[cut:]) == len(body.raw) - cut


@given(st.integers(0, 60), st.binary(max_size=60), _chance)
def test_a_sized_body_ends_at_its_size(size: int, stream: bytes, chance: random.Random) -> None:
    framing, start, end = Sized(size), 0, -1
    payload: list[bytes] = []
    for data in _some_reads(stream, chance):
        end = framing.feed(data, payload)
        if end >= 0:
            break
        start += len(data)
    assert b"".join(payload) == stream[:size]
    assert (start + end if end >= 0 else None) == (size if len(stream) >= size else None)
    assert framing.gap is None


def test_a_body_without_length_is_never_over() -> None:
    framing = UntilClose()
    payload: list[bytes] = []
    assert [framing.feed(data, payload) for data in (b"hel", b"lo")] == [-1, -1]
    assert (b"".join(payload), framing.gap, framing.ends_at_close) == (b"hello", 0, True)


def test_a_chunk_in_a_read_of_its_own() -> None:
    """The common case has a code path of its own, for reads without a payload; its result must be the same."""
    chunk = b"1000\r\n%s\r\n" % (b"x" * 4096)
    framing = Chunked()
    assert [framing.feed(chunk), framing.feed(chunk[:100]), framing.feed(chunk[100:])] == [-1, -1, -1]
    assert framing.gap == 0
    for broken in (chunk[:-2] + b"XX", chunk[:-2] + b"\n\n", chunk[:-2] + b"\r\r", b"0" * 13 + chunk):
        with pytest.raises(WorkerInvalid):
            framing.feed(broken)
    assert framing.gap == 0
    assert framing.feed(b"0\r\n\r\n") == 5
    assert Chunked().feed(b"0\r\n\r\nx\r\n") == 5


@pytest.mark.parametrize(
    ("fields", "events", "lines"),
    [
        ("Content-Type: text/event-stream; charset=utf-8", True, False),
        ("content-type: application/x-ndjson", False, True),
        ("Content-Type: Application/NDJSON; charset=utf-8", False, True),
        ("content-type: application/x-ndjson\r\ncontent-encoding: gzip", False, False),
        ("content-type: text/event-stream\r\nContent-Encoding: br", False, False),
        ("content-type: text/event-stream\r\ncontent-encoding: Identity", True, False),
        ("content-type: application/json\r\nx-as: application/x-ndjson, text/event-stream", False, False),
        ("x-nothing: 1", False, False),
    ],
)
def test_a_head_says_what_kind_of_stream_follows(fields: str, events: bool, lines: bool) -> None:
    head = parse_head(f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode())
    assert head is not None
    assert (head.events, head.lines) == (events, lines)
