"""Heads that leave the router: what gets to the other side, what never does, and that nobody can write into them."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_router.errors import InvalidJSON, MissingKey, NotFound, RouterError, Unavailable
from sglang_router.wire.headers import HOP_BY_HOP, WHITELIST, answer, error_answer, request_head, response_head
from sglang_router.wire.request import Headers, Limits, Request, RequestParser
from sglang_router.wire.response import parse_head

START = b"POST /generate HTTP/1.1\r\nhost: worker\r\n"

END_TO_END: Headers = [
    (b"user-agent", b"client/1"),
    (b"cookie", b"a=b"),
    (b"accept-encoding", b"gzip"),
    (b"x-forwarded-for", b"10.0.0.1"),
    (b"x-smg-target-worker", b"1"),
    (b"content-encoding", b"identity"),
]
"""Fields that reach the worker only with --forward-headers all."""

ONE_HOP: Headers = [
    (b"connection", b"keep-alive"),
    (b"keep-alive", b"timeout=5"),
    (b"proxy-authenticate", b"Basic"),
    (b"proxy-authorization", b"Basic c2VjcmV0"),
    (b"proxy-connection", b"keep-alive"),
    (b"te", b"trailers"),
    (b"trailer", b"x-sum"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"h2c"),
]


def leg(
    headers: Headers,
    body: bytes = b"{}",
    *,
    key: bytes | None = None,
    everything: bool = False,
    guarded: bool = False,
) -> Headers:
    """The fields of a leg as the worker reads them, without the Host that every leg begins with."""
    request = Request(b"POST", b"/generate", b"/generate", headers, body)
    head = request_head(request, START, b"id-1", key=key, everything=everything, guarded=guarded)
    (read,) = RequestParser(Limits()).feed(head + body)
    assert isinstance(read, Request)
    assert read.headers[0] == (b"host", b"worker")
    assert read.body == body
    return read.headers[1:]


def passed(headers: Headers, *, key: bytes | None = None, everything: bool = False) -> Headers:
    """The fields of the client that get through, and the worker's key."""
    fields = leg(headers, key=key, everything=everything)
    assert fields[:2] == [(b"x-request-id", b"id-1"), (b"content-length", b"2")]
    return fields[2:]


def answered(fields: bytes, framing: bytes = b"", connection: bytes = b"") -> Headers:
    """The fields of a worker's answer as the client reads them; `fields` with the CRLF behind each."""
    head = parse_head(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
    assert head is not None
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    client.send(h11.EndOfMessage())
    client.receive_data(response_head(head, b"id-1", framing=framing, connection=connection))
    event = client.next_event()
    assert isinstance(event, h11.Response)
    return list(event.headers)


_lines = st.lists(
    st.lists(
        st.sampled_from(
            [b"a", b"\x85", b"\xff", b" ", b"\t", b": ", b",", b"\r\n", b"\r\nX: y", b"\r", b"\n", b"\0", b"\r\n\r\n"]
        ),
        max_size=6,
    ).map(b"".join),
    min_size=1,
    max_size=3,
)
"""Values of fields, as good as any attempt to be more than that."""

# -- to the worker -----------------------------------------------------------------------------------------------------


def test_the_whitelist_passes_and_nothing_else() -> None:
    listed = [(name, b"v") for name in sorted(WHITELIST)]
    extra = [(b"x-request-id-tenant", b"v"), (b"x-request-id-", b"v")]
    mixed = [field for pair in zip(listed, [*END_TO_END, *END_TO_END], strict=False) for field in pair]
    assert passed([*mixed, *extra]) == [*listed, *extra]


def test_the_whitelist_holds_what_the_reference_forwards_and_the_media_types() -> None:
    reference = {b"traceparent", b"tracestate", b"x-correlation-id", b"x-smg-routing-key"}
    assert reference | {b"accept", b"content-type", b"request-id", b"x-trace-id"} == WHITELIST


def test_everything_is_every_end_to_end_field_in_its_order() -> None:
    fields = [*END_TO_END, (b"accept", b"*/*"), (b"x-two", b"1"), (b"x-two", b"2")]
    assert passed([*ONE_HOP, *fields], everything=True) == fields


@pytest.mark.parametrize("everything", [False, True])
def test_hop_by_hop_fields_never_pass(everything: bool) -> None:
    assert {name for name, _ in ONE_HOP} == HOP_BY_HOP
    assert passed(ONE_HOP, everything=everything) == []


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "connection",
    [
        b"x-secret, traceparent",
        b"keep-alive,\tX-Secret ,TraceParent",
        b"close, x-secret,traceparent,,",
        b"traceparent,x-secret",
    ],
)
def test_fields_named_by_connection_never_pass(connection: bytes, everything: bool) -> None:
    kept = (b"accept", b"*/*")
    fields = [
        (b"traceparent", b"00-1"),
        kept,
        (b"connection", connection),
        (b"x-secret", b"1"),
        (b"traceparent", b"00-2"),
    ]
    assert passed(fields, everything=everything) == [kept]


def test_several_connection_fields_count_together() -> None:
    fields = [(b"connection", b"close"), (b"accept", b"*/*"), (b"connection", b"accept"), (b"connection", b"x")]
    assert passed(fields) == []
    assert passed([*fields, (b"x", b"1"), (b"y", b"1")], everything=True) == [(b"y", b"1")]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("sent", "key", "expected"),
    [
        ([], None, []),
        ([], b"worker-key", [b"Bearer worker-key"]),
        ([b"Bearer client-key"], None, [b"Bearer client-key"]),
        ([b"Bearer client-key"], b"worker-key", [b"Bearer client-key"]),
        ([b"Bearer first", b"Bearer second"], b"worker-key", [b"Bearer first"]),
        ([b"Bearer same", b"Bearer same"], None, [b"Bearer same"]),
    ],
)
def test_authorization_exactly_once(
    sent: list[bytes], key: bytes | None, expected: list[bytes], everything: bool
) -> None:
    fields = passed([(b"authorization", value) for value in sent], key=key, everything=everything)
    assert fields == [(b"authorization", value) for value in expected]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("connection", [b"close", b"accept"])
def test_a_key_for_the_router_ends_here(everything: bool, connection: bytes) -> None:
    fields = [
        (b"authorization", b"Bearer client-key"),
        (b"x-api-key", b"client-key"),
        (b"connection", connection),
        (b"authorization", b"Basic client-key"),
    ]
    alone = leg(fields, guarded=True, everything=everything)
    assert [name for name, _ in alone] == [b"x-request-id", b"content-length"]
    own = leg(fields, guarded=True, everything=everything, key=b"worker-key")
    assert own[2:] == [(b"authorization", b"Bearer worker-key")]
    assert ((b"x-api-key", b"client-key") in leg(fields, everything=everything)) == everything


@pytest.mark.parametrize("everything", [False, True])
def test_an_authorization_for_one_hop_ends_here(everything: bool) -> None:
    fields = [(b"authorization", b"Bearer client-key"), (b"connection", b"authorization")]
    assert passed(fields, everything=everything) == []
    assert passed(fields, everything=everything, key=b"k") == [(b"authorization", b"Bearer k")]


@pytest.mark.parametrize("everything", [False, True])
def test_the_id_and_the_framing_are_ours_alone(everything: bool) -> None:
    fields = [
        (b"x-request-id", b"theirs"),
        (b"x-request-id", b"theirs too"),
        (b"content-length", b"7"),
        (b"host", b"router"),
        (b"expect", b"100-continue"),
    ]
    assert leg(fields, b"seven", everything=everything) == [(b"x-request-id", b"id-1"), (b"content-length", b"5")]
    assert leg(fields, b"", everything=everything) == [(b"x-request-id", b"id-1"), (b"content-length", b"0")]


def test_a_request_is_not_changed_by_being_sent() -> None:
    """A retry builds the head again, for another worker."""
    fields = [(b"connection", b"accept"), (b"accept", b"*/*"), (b"te", b"x")]
    request = Request(b"POST", b"/", b"/", fields, b"{}")
    heads = {request_head(request, START, b"id-1", key=key) for key in (None, b"k", None)}
    assert len(heads) == 2
    assert request.headers == [(b"connection", b"accept"), (b"accept", b"*/*"), (b"te", b"x")]


@given(_lines, st.booleans())
def test_a_client_cannot_write_into_the_leg(lines: list[bytes], everything: bool) -> None:
    """Whatever the parser lets through, another parser reads of the leg the fields that were passed on, and no more."""
    raw = b"POST /generate HTTP/1.1\r\nHost: x\r\n" + b"".join(b"Accept: %s\r\n" % line for line in lines) + b"\r\n"
    request = next(iter(RequestParser(Limits()).feed(raw)), None)
    if not isinstance(request, Request):
        return
    worker = h11.Connection(h11.SERVER)
    worker.receive_data(request_head(request, START, b"id-1", everything=everything))
    event = worker.next_event()
    assert isinstance(event, h11.Request)
    passing = (field for field in request.headers if field[0] == b"accept" or (everything and field[0] != b"host"))
    kept = [(name, value.strip()) for name, value in passing]
    assert list(event.headers)[1:] == [(b"x-request-id", b"id-1"), (b"content-length", b"0"), *kept]
    assert type(worker.next_event()) is h11.EndOfMessage
    assert worker.trailing_data == (b"", False)


# -- to the client -----------------------------------------------------------------------------------------------------


def test_an_answer_passes_with_one_id_and_our_framing() -> None:
    fields = b"Server: engine\r\nContent-Length: 5\r\nX-Request-Id: theirs\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
    ours = [(b"x-request-id", b"id-1"), (b"content-length", b"5"), (b"connection", b"close")]
    assert answered(fields, b"content-length: 5\r\n", b"connection: close\r\n") == [
        (b"server", b"engine"),
        (b"set-cookie", b"a"),
        (b"set-cookie", b"b"),
        *ours,
    ]


def test_a_plain_answer_has_each_field_once() -> None:
    fields = answered(b"Content-Type: text/plain\r\nContent-Length:\t5 \r\nDate: now\r\n", b"content-length: 5\r\n")
    assert sorted(fields) == [
        (b"content-length", b"5"),
        (b"content-type", b"text/plain"),
        (b"date", b"now"),
        (b"x-request-id", b"id-1"),
    ]


@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_what_the_router_says_of_origins_takes_the_place_of_what_the_worker_says(framing: bytes) -> None:
    fields = b"Access-Control-Allow-Origin: *\r\n" + framing + b"X: 1\r\nAccess-Control-Max-Age: 1\r\n"
    head = parse_head(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
    assert head is not None
    ours = b"access-control-allow-origin: https://a\r\n"
    made = response_head(head, b"id-1", framing=framing if not head.plain else b"", connection=b"", cors=ours)
    read = parse_head(made)
    assert read is not None
    kept = [field for field in framing.decode().lower().split("\r\n") if field]
    assert sorted(f"{name.decode()}: {value.decode()}" for name, value in read.headers) == sorted(
        ["access-control-allow-origin: https://a", "x: 1", "x-request-id: id-1", *kept]
    )


def test_a_stream_is_framed_anew() -> None:
    fields = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    assert answered(fields, b"transfer-encoding: chunked\r\n") == [
        (b"content-type", b"text/event-stream"),
        (b"x-request-id", b"id-1"),
        (b"transfer-encoding", b"chunked"),
    ]
    assert answered(fields, b"", b"connection: close\r\n")[-1] == (b"connection", b"close")


@pytest.mark.parametrize("spelling", [bytes.title, bytes.upper, bytes.lower])
@pytest.mark.parametrize("field", [pair for pair in ONE_HOP if pair[0] not in (b"transfer-encoding", b"upgrade")])
@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b""])
def test_an_answers_hop_by_hop_fields_never_pass(field: tuple[bytes, bytes], framing: bytes, spelling: object) -> None:
    assert callable(spelling)
    fields = b"A: b\r\n%s: %s\r\n%s" % (spelling(field[0]), field[1], framing)
    assert answered(fields) == [(b"a", b"b"), (b"x-request-id", b"id-1")]


def test_an_answers_upgrade_never_passes() -> None:
    assert answered(b"Upgrade: h2c\r\nContent-Length: 5\r\n") == [(b"x-request-id", b"id-1")]


@pytest.mark.parametrize(
    "connection", [b"x-inner", b"keep-alive, X-INNER", b"close,\tx-inner ,", b"x-other\r\nConnection: x-inner"]
)
def test_an_answers_connection_names_fields_before_and_behind_it(connection: bytes) -> None:
    fields = b"X-Inner: 1\r\nA: b\r\nConnection: %s\r\nx-inner: 2\r\nX-Innermost: 3\r\n" % connection
    assert answered(fields) == [(b"a", b"b"), (b"x-innermost", b"3"), (b"x-request-id", b"id-1")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK"),
        (b"HTTP/1.1 200 Fine", b"HTTP/1.1 200 Fine"),
        (b"HTTP/1.0 200 OK", b"HTTP/1.1 200 OK"),
        (b"HTTP/1.1 404", b"HTTP/1.1 404 Not Found"),
        (b"HTTP/1.1 404 ", b"HTTP/1.1 404 Not Found"),
        (b"HTTP/1.1 599", b"HTTP/1.1 599 "),
    ],
)
def test_the_status_line(line: bytes, expected: bytes) -> None:
    for fields in (b"", b"Content-Length: 0\r\n"):
        head = parse_head(line + b"\r\n" + fields + b"\r\n")
        assert head is not None
        sent = response_head(head, b"id-1", framing=fields.lower(), connection=b"")
        assert sent.startswith(expected + b"\r\n")
        assert sent.endswith(b"\r\n\r\n")


@given(_lines, st.booleans())
def test_a_worker_cannot_write_into_the_answer(lines: list[bytes], sized: bool) -> None:
    raw = b"HTTP/1.1 200 OK\r\n" + b"".join(b"A: %s\r\n" % line for line in lines)
    raw += b"Content-Length: 0\r\n\r\n" if sized else b"\r\n"
    try:
        head = parse_head(raw)
    except RouterError:
        return
    assert head is not None
    framing = b"" if head.content_length is None else b"content-length: 0\r\n"
    sent = response_head(head, b"id-1", framing=framing, connection=b"")
    again = parse_head(sent)
    assert again is not None
    assert again.end == len(sent)
    assert sorted(again.headers) == sorted([*head.headers, (b"x-request-id", b"id-1")])


# -- the router's own answers ------------------------------------------------------------------------------------------


def test_an_answer_of_the_router_itself() -> None:
    assert answer(
        404, b"no", content_type=b"text/plain", extra=[(b"a", b"b")], connection=b"connection: close\r\n"
    ) == (
        b"HTTP/1.1 404 Not Found\r\ncontent-type: text/plain\r\ncontent-length: 2\r\na: b\r\n"
        b"connection: close\r\n\r\nno"
    )


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (InvalidJSON(), 400, None),
        (NotFound("no\r\nA: b"), 404, None),
        (MissingKey(), 401, None),
        (Unavailable(), 503, None),
        (Unavailable(retry_after=0.0), 503, b"1"),
        (Unavailable(retry_after=0.2), 503, b"1"),
        (Unavailable(retry_after=1.0), 503, b"1"),
        (Unavailable(retry_after=1.1), 503, b"2"),
        (Unavailable(retry_after=2.0), 503, b"2"),
        (Unavailable(retry_after=59.5), 503, b"60"),
    ],
    ids=repr,
)
def test_an_error_answer(error: RouterError, status: int, retry_after: bytes | None) -> None:
    raw = error_answer(error, b"id-1", b"connection: close\r\n")
    head = parse_head(raw)
    assert head is not None
    assert (head.status, head.keep_alive, head.content_length) == (status, False, len(error.body()))
    assert raw[head.end :] == error.body()
    assert head.header(b"x-request-id") == b"id-1"
    assert head.header(b"x-smg-error-code") == error.code.encode()
    assert head.header(b"retry-after") == retry_after
    assert head.header(b"www-authenticate") == (error.challenge.encode() or None)
