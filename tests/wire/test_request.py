"""Requests: a corpus of what must be accepted and what refused, in every split; the limits; the memory."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import BadHTTP, HeadTooLarge, PayloadTooLarge, RouterError, Unauthorized, URITooLong
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Request, RequestParser
from wire_corpus import Case, each_case, pieces, read_requests, splits

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL = Limits(head_bytes=1000, header_count=10, body_bytes=100)


# -- what is served and what is refused --------------------------------------------------------------------------------


@each_case("requests.txt")
def test_verdict_in_every_split(case: Case) -> None:
    whole = read_requests([case.raw])
    assert (whole.verdict, whole.understood) == (case.verdict, case.understood)
    for reads in splits(case.raw):
        asked = read_requests(reads)
        assert asked.requests == whole.requests, reads
        assert (asked.verdict, type(asked.error), asked.state) == (whole.verdict, type(whole.error), whole.state), reads


def test_refusals_close_the_connection_and_say_why() -> None:
    error = read_requests([HEAD + b"Content-Length: +5\r\n\r\n"]).error
    assert isinstance(error, BadHTTP)
    assert error.close
    assert "Invalid character in Content-Length" in str(error)


def test_a_request_is_told_whole() -> None:
    (request,) = read_requests(
        [b"POST /generate?a=1 HTTP/1.1\r\nHost: x\r\nX-Two: 1\r\nX-TWO:2\r\nContent-Length: 2\r\n\r\nhi"]
    ).requests
    fields = [(b"host", b"x"), (b"x-two", b"1"), (b"x-two", b"2"), (b"content-length", b"2")]
    expected = Request(b"POST", b"/generate?a=1", b"/generate", fields)
    expected.body = b"hi"
    assert request == expected


@pytest.mark.parametrize(
    ("target", "origin_form"),
    [
        (b"http://other/generate?a=/b", b"/generate?a=/b"),
        (b"http://other:80//generate", b"//generate"),
        (b"http://other?a=b", b"/?a=b"),
        (b"http://other", b"/"),
        (b"/http://other/generate", b"/http://other/generate"),
        (b"/?a=http://other/b", b"/?a=http://other/b"),
        (b"*", b"*"),
    ],
)
def test_targets_are_brought_into_origin_form(target: bytes, origin_form: bytes) -> None:
    (request,) = read_requests([b"OPTIONS %s HTTP/1.1\r\nHost: x\r\n\r\n" % target]).requests
    assert (request.target, request.path) == (origin_form, origin_form.partition(b"?")[0])


def test_trailers_are_dropped() -> None:
    (request,) = read_requests([CHUNKED + b"2\r\nhi\r\n0\r\nAuthorization: Bearer stolen\r\n\r\n"]).requests
    assert request.headers == [(b"host", b"x"), (b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize(
    ("version", "connection", "stays"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.1", b"Connection: keep-alive, Close\r\n", False),
        (b"1.1", b"Connection: close\r\nConnection: keep-alive\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", True),
        (b"1.0", b"Connection: Keep-Alive\r\n", True),
        (b"1.0", b"Connection: close\r\n", False),
    ],
)
def test_whether_the_client_stays(version: bytes, connection: bytes, stays: bool) -> None:
    (request,) = read_requests([b"GET / HTTP/%s\r\nHost: x\r\n%s\r\n" % (version, connection)]).requests
    assert (request.keep_alive, request.http10) == (stays, version == b"1.0")


@given(st.lists(st.binary(max_size=40), max_size=5), st.booleans(), st.randoms(use_true_random=False))
def test_bodies_arrive_as_they_were_sent(bodies: list[bytes], chunked: bool, chance: random.Random) -> None:
    raw = b"".join(_request(body, chunked, chance) for body in bodies)
    asked = read_requests(pieces(raw, (chance.randint(0, len(raw)) for _ in range(4))))
    assert [request.body for request in asked.requests] == bodies
    assert (asked.error, asked.state) == (None, "")


def _request(body: bytes, chunked: bool, chance: random.Random) -> bytes:
    if not chunked:
        return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    parts = [part for part in pieces(body, (chance.randint(0, len(body)) for _ in range(3))) if part]
    return CHUNKED + b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_no_bytes_make_it_raise(reads: list[bytes]) -> None:
    read_requests(reads)
    read_requests([HEAD, *reads])
    read_requests([CHUNKED, *reads])


# -- Upgrade, and what stands in and before a request line -------------------------------------------------------------

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (b"Content-Length: 5\r\n\r\nhello", b"hello"),
        (b"Content-Length: 6\r\n\r\nhell\r\n", b"hell\r\n"),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"\r\n", b""),
    ],
)
@pytest.mark.parametrize("offer", [OFFER, b"Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: TLS/1.0\r\n"])
def test_case_5_an_upgrade_that_is_offered_is_ignored(offer: bytes, body: bytes, content: bytes) -> None:
    """Stock Java clients offer h2c with each request; they got 501."""
    raw = HEAD + offer + body + NEXT + HEAD + offer + body
    first, second, third = read_requests([raw]).requests
    assert (first.method, first.path, second.path) == (b"POST", b"/generate", b"/next")
    assert first == third
    assert first.keep_alive
    assert b"upgrade" not in dict(first.headers)
    assert first.body == content
    for reads in splits(raw):
        assert read_requests(reads).requests == [first, second, third], reads


def test_case_5_limits_and_checks_hold_behind_an_offer() -> None:
    assert isinstance(read_requests([HEAD + OFFER + b"Content-Length: 101\r\n\r\n"], SMALL).error, PayloadTooLarge)
    assert isinstance(read_requests([HEAD + OFFER + b"A: b\r\n" * 9 + b"\r\n"], SMALL).error, HeadTooLarge)
    assert isinstance(read_requests([HEAD + OFFER + b"Host: y\r\n\r\n"]).error, BadHTTP)
    refused = RequestParser(Limits(), lambda request, has_body: setattr(request, "refusal", Unauthorized()))
    (request,) = refused.feed(HEAD + OFFER + b"Content-Length: 5\r\n\r\nhello")
    assert isinstance(request, Request)
    assert not request.keep_alive


@pytest.mark.parametrize(
    "before", [b"", NEXT, HEAD + b"Content-Length: 2\r\n\r\n\n\n", CHUNKED + b"1\r\n\n\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize(
    ("odd", "fine"),
    [
        (b"\r\n\r\n" + NEXT, True),
        (b"\n" + NEXT, False),
        (b"\r" + NEXT, False),
        (b"\r\n\n" + NEXT, False),
        (NEXT.replace(b"GET ", b"GET  "), False),
        (NEXT.replace(b" HTTP", b"  HTTP"), False),
        (NEXT.replace(b"HTTP/1.1", b"RTSP/1.0"), False),
        (NEXT.replace(b"HTTP/1.1", b"ICE/1.1"), False),
        (NEXT.replace(b"next", b"next#top"), False),
    ],
)
def test_f41_a_request_line_is_exact_also_behind_another_request(before: bytes, odd: bytes, fine: bool) -> None:
    """llhttp takes two spaces, RTSP/1.0, and bare CR and LF before a request."""
    raw = before + odd
    for reads in ([raw], [before, odd], [raw[:-30], raw[-30:]], [raw[at : at + 1] for at in range(len(raw))]):
        read = read_requests([data for data in reads if data])
        assert [request.path for request in read.requests[1 if before else 0 :]] == ([b"/next"] if fine else []), reads
        assert (read.error is None) is fine, reads


# -- Expect ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "waits"),
    [
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", True),
        (HEAD + b"Expect: 100-Continue \t\r\nContent-Length: 2\r\n\r\n", True),
        (HEAD + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n", True),
        (HEAD + b"Expect: something-else\r\nContent-Length: 2\r\n\r\n", False),
        (HEAD + b"Content-Length: 2\r\n\r\n", False),
        (b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n", False),
    ],
)
def test_who_waits_for_100_continue(head: bytes, waits: bool) -> None:
    for reads in splits(head):
        assert read_requests(reads).state == ("body continue" if waits else "body")


def test_without_a_body_nobody_waits_for_100_continue() -> None:
    assert read_requests([HEAD + b"Expect: 100-continue\r\n\r\n"]).verdict == "ok"
    assert read_requests([HEAD + b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n"]).verdict == "ok"


def test_a_client_that_sends_its_body_waits_no_longer() -> None:
    assert read_requests([HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nh"]).state == "body"
    assert read_requests([HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", b"hi"]).state == ""


def test_a_body_over_the_limit_is_refused_before_it_is_sent() -> None:
    asked = read_requests([HEAD + b"Expect: 100-continue\r\nContent-Length: 101\r\n\r\n"], SMALL)
    assert (asked.verdict, asked.state) == ("413", "")


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 1001), URITooLong),
        (b"GET /%s" % (b"a" * 1100), URITooLong),
        (HEAD + b"A: %s\r\n\r\n" % (b"b" * 1001), HeadTooLarge),
        (HEAD + b"A: %s" % (b"b" * 1100), HeadTooLarge),
        (HEAD + b"%s: b\r\n\r\n" % (b"a" * 1001), HeadTooLarge),
        (HEAD + b"%s" % (b"a" * 1100), HeadTooLarge),
        (HEAD + b"A: %s\r\n" % (b"b" * 200) * 6 + b"\r\n", HeadTooLarge),
        (HEAD + b"A: b\r\n" * 10 + b"\r\n", HeadTooLarge),
        (HEAD + b"Content-Length: 101\r\n\r\n", PayloadTooLarge),
        (CHUNKED + b"32\r\n%s\r\n" % (b"x" * 50) * 2 + b"1\r\nx\r\n0\r\n\r\n", PayloadTooLarge),
        (CHUNKED + b"fff\r\n%s\r\n0\r\n\r\n" % (b"x" * 0xFFF), PayloadTooLarge),
        (CHUNKED + b"0\r\n" + b"A: b\r\n" * 11 + b"\r\n", HeadTooLarge),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value[:60]),
)
def test_over_a_limit_in_every_split(raw: bytes, error: type[RouterError]) -> None:
    for reads in [[raw], pieces(raw, range(1, len(raw))), *([raw[:cut], raw[cut:]] for cut in range(1, len(raw), 37))]:
        assert type(read_requests(reads, SMALL).error) is error, [len(data) for data in reads]


def test_at_a_limit_in_every_split() -> None:
    fields = b"A: b\r\n" * 8 + b"B: %s\r\n" % (b"c" * 800)
    raw = b"POST /aaaa HTTP/1.1\r\nHost: x\r\n" + fields.replace(b"A: b\r\n", b"", 1)
    raw += b"Content-Length: 100\r\n\r\n" + b"x" * 100
    for reads in [[raw * 3], pieces(raw * 2, range(1, 2 * len(raw)))]:
        asked = read_requests(reads, SMALL)
        assert (asked.verdict, {len(request.headers) for request in asked.requests}) == ("ok", {10})


def test_a_pipeline_may_be_longer_than_one_head() -> None:
    asked = read_requests([(HEAD + b"\r\n") * 200], SMALL)
    assert (len(asked.requests), asked.verdict) == (200, "ok")


def _forever(start: bytes, more: bytes) -> Iterator[bytes]:
    yield start
    while True:
        yield more


@pytest.mark.parametrize(
    ("start", "more", "most"),
    [
        (b"GET /", b"a", 1000),
        (HEAD + b"A: ", b"b", 1000),
        (HEAD, b"a", 1000),
        (HEAD + b"\r\n" + HEAD + b"A: ", b"b", 1000),
        (CHUNKED + b"5;", b"a", 1000),
        (CHUNKED + b"5\r\nhello\r\n0;", b"a", 1000),
        (CHUNKED + b"0\r\nA: ", b"b", 1000),
        (CHUNKED + b"0\r\n", b"a", 1000),
        (CHUNKED, b"0", 1000),
        (CHUNKED, b"1;%s\r\nx\r\n" % (b"a" * 200), 2000),
    ],
    ids=repr,
)
def test_what_never_ends_is_refused(start: bytes, more: bytes, most: int) -> None:
    """Neither a field nor a chunk extension nor a trailer is collected without bound: the limit bounds the memory."""
    parser, size = RequestParser(SMALL), 0
    for data in _forever(start, more):
        if any(isinstance(item, RouterError) for item in parser.feed(data)):
            break
        size += len(data)
        assert size <= len(start) + most
    parser.close()


def test_a_body_in_tiny_chunks_is_no_abuse() -> None:
    limits = Limits(head_bytes=1000, body_bytes=5000)
    chunk = b"1;a=b\r\nx\r\n"
    asked = read_requests([CHUNKED, *[chunk] * 4000, b"0\r\n\r\n"], limits)
    assert [request.body for request in asked.requests] == [b"x" * 4000]
    asked = read_requests(pieces(CHUNKED + chunk * 4000 + b"0\r\n\r\n", range(1, 40_000, 3)), limits)
    assert [request.body for request in asked.requests] == [b"x" * 4000]


def test_a_long_head_does_not_count_against_the_body() -> None:
    head = HEAD + b"A: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % (b"b" * 850)
    raw = head + b"1;%s\r\nx\r\n0\r\n\r\n" % (b"a" * 900)
    assert read_requests(pieces(raw, range(1, len(raw))), SMALL).verdict == "ok"


# -- its own life ------------------------------------------------------------------------------------------------------


def test_after_an_error_nothing_is_read() -> None:
    parser = RequestParser(Limits())
    (error,) = parser.feed(b"nonsense\r\n\r\n")
    assert isinstance(error, BadHTTP)
    assert parser.feed(HEAD + b"\r\n") == []
    assert (parser.mid_head, parser.mid_body, parser.wants_continue) == (False, False, False)
    parser.close()
    assert parser.feed(HEAD + b"\r\n") == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        HEAD,
        HEAD + b"\r\n",
        HEAD + b"Content-Length: 5\r\n\r\nhel",
        CHUNKED + b"5\r\nhello\r\n",
        HEAD + b"Content-Length: +5\r\n\r\n",  # an error of llhttp
        b"GET / HTTP/1.1\r\n\r\n",  # an error of ours, raised in a callback
        HEAD + b"Content-Length: %s\r\n\r\n" % (b"0" * 5000),  # more digits than int() accepts
    ],
    ids=lambda raw: repr(raw[-30:]),
)
def test_close_leaves_no_cycle(raw: bytes) -> None:
    """The garbage collector does not run while the router serves, so an unused parser must be freed without it."""

    def parsers() -> int:
        """Count what must be gone; other threads of the tests may leave garbage of their own."""
        return sum(type(each) in (RequestParser, httptools.HttpRequestParser) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = parsers()
        parser = RequestParser(Limits())
        items = parser.feed(raw)
        assert parsers() > before
        parser.close()
        parser.close()
        del parser
        assert parsers() == before
        assert all(item.__traceback__ is None for item in items if isinstance(item, RouterError))
    finally:
        gc.enable()


# -- what is refused before its body -----------------------------------------------------------------------------------


def strict(request: Request, has_body: bool) -> None:
    """Refuse a request without the key."""
    request.client = f"body={has_body}"
    if (b"x-key", b"k") not in request.headers:
        request.refusal = Unauthorized()


GOOD = b"POST /generate HTTP/1.1\r\nhost: x\r\nx-key: k\r\ncontent-length: 2\r\n\r\nhi"
EMPTY = b"POST /generate HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("framing", [b"content-length: 5", b"transfer-encoding: chunked"])
def test_a_refused_request_is_whole_without_its_body_and_the_last_one(framing: bytes) -> None:
    refused = HEAD + b"expect: 100-continue\r\n" + framing + b"\r\n\r\n"
    for reads in ([GOOD + refused + b"hello" + GOOD], [bytes([byte]) for byte in GOOD + refused + b"hello"]):
        parser = RequestParser(Limits(), strict)
        ready = [item for read in reads for item in parser.feed(read)]
        good, bad = (item for item in ready if isinstance(item, Request))
        assert len(ready) == 2
        assert (good.body, good.refusal, good.client) == (b"hi", None, "body=True")
        assert isinstance(bad.refusal, Unauthorized)
        assert (bad.body, bad.keep_alive, parser.wants_continue) == (b"", False, False)
        assert parser.mid_body  # so the connection closes in a way that lets the client read its answer
        assert parser.feed(GOOD) == []
        parser.close()


def test_a_refused_request_without_a_body_leaves_the_connection_alone() -> None:
    first, second, good = RequestParser(Limits(), strict).feed(EMPTY + EMPTY + GOOD)
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    assert isinstance(good, Request)
    assert isinstance(first.refusal, Unauthorized)
    assert (first.keep_alive, first.client, good.refusal) == (True, "body=False", None)


def test_nothing_is_asked_of_what_is_no_request() -> None:
    asked: list[Request] = []
    parser = RequestParser(SMALL, lambda request, has_body: asked.append(request))
    (error,) = parser.feed(HEAD + b"content-length: 101\r\n\r\n")
    assert isinstance(error, PayloadTooLarge)
    assert asked == []


def test_a_refusal_leaves_no_cycle_behind() -> None:
    parser = RequestParser(Limits(), strict)
    gc.collect()
    gc.disable()
    try:
        (request,) = parser.feed(CHUNKED)
        assert isinstance(request, Request)
        assert request.refusal is not None
        assert request.refusal.__traceback__ is None
        parser.close()
        gone = weakref.ref(request.refusal)
        del request, parser
        assert gone() is None
    finally:
        gc.enable()
