"""Heads of answers: what is passed on, what never is, that workers cannot inject fields; the router's own answers."""

from __future__ import annotations

import json
import random
import re

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forged import forged_lines
from sglang_router.errors import (
    InvalidJSON,
    MethodNotAllowed,
    MissingKey,
    NotFound,
    ReservedField,
    RouterError,
    Unavailable,
)
from sglang_router.relay.answers import (
    Answers,
    app_head,
    connection_field,
    error_answer,
    plain_answer,
    worker_head,
)
from sglang_router.routing.plan import PlannedLeg, RequestTag, Route, Target
from sglang_router.wire.cors import Cors
from sglang_router.wire.request import Headers, Request
from sglang_router.wire.request_id import RequestIds
from sglang_router.wire.response import framing_of, parse_head
from sglang_router.wire.sse import error_event

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


def answered(fields: bytes, framing: bytes = b"", connection: bytes = b"") -> Headers:
    """Return the fields of a worker's answer as the client reads them; `fields` with the CRLF after each."""
    head = parse_head(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
    assert head is not None
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    client.send(h11.EndOfMessage())
    client.receive_data(worker_head(head, b"id-1", framing=framing, connection=connection))
    event = client.next_event()
    assert isinstance(event, h11.Response)
    return list(event.headers)


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
    made = worker_head(head, b"id-1", framing=framing if not head.plain else b"", connection=b"", cors=ours)
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
        sent = worker_head(head, b"id-1", framing=fields.lower(), connection=b"")
        assert sent.startswith(expected + b"\r\n")
        assert sent.endswith(b"\r\n\r\n")


@given(forged_lines, st.booleans())
def test_a_worker_cannot_write_into_the_answer(lines: list[bytes], sized: bool) -> None:
    raw = b"HTTP/1.1 200 OK\r\n" + b"".join(b"A: %s\r\n" % line for line in lines)
    raw += b"Content-Length: 0\r\n\r\n" if sized else b"\r\n"
    try:
        head = parse_head(raw)
    except RouterError:
        return
    assert head is not None
    framing = b"" if head.content_length is None else b"content-length: 0\r\n"
    sent = worker_head(head, b"id-1", framing=framing, connection=b"")
    again = parse_head(sent)
    assert again is not None
    assert again.end == len(sent)
    assert sorted(again.headers) == sorted([*head.headers, (b"x-request-id", b"id-1")])


# -- the router's own answers ------------------------------------------------------------------------------------------


def test_an_answer_of_the_router_itself() -> None:
    assert plain_answer(404, b"no", [(b"a", b"b")], b"connection: close\r\n", b"text/plain") == (
        b"HTTP/1.1 404 Not Found\r\ncontent-type: text/plain\r\ncontent-length: 2\r\na: b\r\n"
        b"connection: close\r\n\r\nno"
    )


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (InvalidJSON(), 400, None),
        (NotFound("no\r\nA: b"), 404, None),
        (MissingKey(), 401, None),
        (MethodNotAllowed(allow=("GET", "HEAD")), 405, None),
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
    for name, value in error.fields:
        assert head.header(name.encode()) == value.encode()


def test_an_error_of_a_head_request_has_no_body() -> None:
    whole = error_answer(NotFound(), b"id-1", b"")
    assert error_answer(NotFound(), b"id-1", b"", head=True) == whole.removesuffix(NotFound().body())


ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    501: "invalid_request_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    505: "invalid_request_error",
}


def every_error(of: type[RouterError] = RouterError) -> list[type[RouterError]]:
    return [of, *(kind for each in of.__subclasses__() for kind in every_error(each))]


@pytest.mark.parametrize("kind", every_error())
@pytest.mark.parametrize("path", [b"/v1/messages", b"/v1/messages/count_tokens"])
def test_case_18_errors_of_messages_have_anthropics_shape(kind: type[RouterError], path: bytes) -> None:
    """Clients of /v1/messages got OpenAI's shape, of which they read nothing."""
    error = kind("bootstrap_room") if kind is ReservedField else kind()
    asked = Request(b"POST", path + b"?beta=true", path, [(b"host", b"h")])
    raw = answers().error(error, asked, b"id-1", True)
    head = parse_head(raw)
    assert head is not None
    told = json.loads(raw[head.end :])
    named = ANTHROPIC.get(error.status, "invalid_request_error")
    assert told == {"type": "error", "error": {"type": named, "message": str(error)}}
    assert head.header(b"x-smg-error-code") == error.code.encode()
    assert answers().refusal(error, b"id-1", path).endswith(error.body(path))
    event = error_event(path, error)
    assert event == b"event: error\ndata: " + error.body(path) + b"\n\n"


@pytest.mark.parametrize("path", [b"", b"/v1/messagesx", b"/v1/chat/completions", b"/messages", b"/v1"])
def test_case_18_other_paths_have_openais_shape(path: bytes) -> None:
    assert "code" in json.loads(NotFound().body(path))["error"]


@pytest.mark.parametrize(
    ("keep_alive", "http10", "field"),
    [
        (True, False, b""),
        (True, True, b"connection: keep-alive\r\n"),
        (False, False, b"connection: close\r\n"),
        (False, True, b"connection: close\r\n"),
    ],
)
def test_the_connection_field(keep_alive: bool, http10: bool, field: bytes) -> None:
    assert connection_field(keep_alive, http10) == field


def test_the_head_of_the_control_plane() -> None:
    head = app_head(201, [(b"location", b"/workers/1")], b"id-1", b"content-length: 0\r\n")
    assert head == (b"HTTP/1.1 201 Created\r\nlocation: /workers/1\r\ncontent-length: 0\r\nx-request-id: id-1\r\n\r\n")


def answers(*origins: str) -> Answers:
    return Answers(RequestIds(random.Random(1).getrandbits), Cors(origins) if origins else None)


def asked(method: bytes, *fields: tuple[bytes, bytes], http10: bool = False) -> Request:
    return Request(method, b"/v1/models", b"/v1/models", [(b"host", b"h"), *fields], http10)


def test_a_preflight_is_answered_whole() -> None:
    wanted = asked(b"OPTIONS", (b"origin", b"https://a"), (b"access-control-request-method", b"POST"))
    answer = answers("https://a").preflight(wanted, b"id-1", False)
    assert answer is not None
    head = parse_head(answer)
    assert head is not None
    assert (head.status, head.end, head.keep_alive, head.content_length) == (200, len(answer), False, 0)
    assert head.header(b"x-request-id") == b"id-1"
    assert head.header(b"access-control-allow-origin") == b"https://a"
    assert answers().preflight(wanted, b"id-1", False) is None
    assert answers("https://a").preflight(asked(b"GET"), b"id-1", False) is None


def test_connection_and_origin_stand_in_each_error() -> None:
    sent = answers("https://a").error(NotFound(), asked(b"GET", (b"origin", b"https://a"), http10=True), b"id-1", True)
    assert b"\r\nconnection: keep-alive\r\nvary: origin\r\naccess-control-allow-origin: https://a\r\n" in sent
    assert answers().refusal(NotFound(), b"id-1") == error_answer(NotFound(), b"id-1", b"connection: close\r\n")


# -- what a client is told of the decision -----------------------------------------------------------------------------

TARGET = Target("http://10.0.0.7:30000", name="http://10.0.0.7:30000@1", worker_id="w-1")


def tag(explained: bool, request_id: bytes = b"id-1") -> RequestTag:
    named = (request_id, b"", b"", None, explained, None)
    return RequestTag(1, request_id, 0.0, Route("POST", "/generate", "generate"), named=named)


@pytest.mark.parametrize("by_id", [False, True])
def test_a_decision_is_told_to_who_asks_or_to_all(by_id: bool) -> None:
    leg = PlannedLeg(1, TARGET, "hit", 3000, 4000)
    told = b"x-sglang-router-worker: %s\r\n" % (b"w-1" if by_id else b"http://10.0.0.7:30000@1")
    whole = b'x-sglang-router-decision: hit; matched=3000; total=4000; attempt=3; id="id-1"\r\n' + told
    for always in (False, True):
        made = Answers(RequestIds(random.Random(1).getrandbits), None, always, by_id)
        assert made.decision(tag(True), leg, 2) == whole
        assert made.decision(tag(False), leg, 2) == (whole if always else b"")


@pytest.mark.parametrize(
    ("request_id", "item"),
    [
        (b"a b", b'"a b"'),
        (b'"\\', b'"\\"\\\\"'),
        ("f\u00fc\u4f60".encode(), b'%"f%c3%bc%e4%bd%a0"'),
        (b'50%"\t\x7f', b'%"50%25%22%09%7f"'),
        (b"\xfc", b'%"%c3%bc"'),
    ],
)
def test_an_id_is_an_item_of_a_structured_field_whatever_is_in_it(request_id: bytes, item: bytes) -> None:
    made, leg = Answers(RequestIds(random.Random(1).getrandbits)), PlannedLeg(1, TARGET, "hit", 3000, 4000)
    for planned in (leg, None):
        first, *_ = made.decision(tag(True, request_id), planned, 0).split(b"\r\n")
        assert first.endswith(b"; id=" + item)


@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_what_the_router_says_of_a_decision_takes_the_place_of_what_a_router_behind_it_says(framing: bytes) -> None:
    theirs = b"X-SGLang-Router-Decision: miss; id=1\r\nx-sglang-router-worker: http://inner\r\nServer: b\r\n"
    head = parse_head(b"HTTP/1.1 200 OK\r\n" + theirs + framing + b"\r\n")
    assert head is not None
    made, leg = answers(), PlannedLeg(1, TARGET, "hit", 3000, 4000)
    for asks in (True, False):
        told = made.decision(tag(asks), leg, 0)
        sent = parse_head(made.client_head(head, framing_of(head), asked(b"POST"), b"id-1", True, told)[0])
        assert sent is not None
        named = {b"x-sglang-router-decision", b"x-sglang-router-worker"}
        values = [value for name, value in sent.headers if name in named]
        ours = [b'hit; matched=3000; total=4000; attempt=1; id="id-1"', b"http://10.0.0.7:30000@1"]
        assert values == (ours if asks else [b"miss; id=1", b"http://inner"])
        assert (b"server", b"b") in sent.headers


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (b'"llama-8b"', b"llama-8b"),
        (b'"org\\/m"', b"org/m"),
        (b'"mod\xc3\xa8le 1"', b"mod%c3%a8le 1"),
        (b'"a\\r\\nX-Forged: 1"', b"a%0d%0aX-Forged: 1"),
        (b'"\\ud800"', b"\\ud800"),
    ],
)
def test_a_client_is_told_which_model_served_whether_it_asks_or_not(model: bytes, shown: bytes) -> None:
    leg = PlannedLeg(1, TARGET, "hit", 3000, 4000, model=model)
    field = b"x-sglang-router-model: %b\r\n" % shown
    assert answers().decision(tag(False), leg, 0) == field
    assert answers().decision(tag(True), leg, 0).endswith(field)


def test_what_a_router_behind_it_says_of_the_model_stays_unless_this_one_says_more() -> None:
    theirs = b"X-SGLang-Router-Model: inner\r\nx-sglang-router-worker: http://inner\r\nContent-Length: 5\r\n"
    head = parse_head(b"HTTP/1.1 200 OK\r\n" + theirs + b"\r\n")
    assert head is not None
    for model, expected in ((b"", [b"inner", b"http://inner"]), (b'"m"', [b"http://inner", b"m"])):
        told = answers().decision(tag(False), PlannedLeg(1, TARGET, "hit", model=model), 0)
        sent = parse_head(answers().client_head(head, framing_of(head), asked(b"POST"), b"id-1", True, told)[0])
        assert sent is not None
        assert [value for name, value in sent.headers if name.startswith(b"x-sglang-router-")] == expected


@pytest.mark.parametrize("head", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\nConnection: close\r\n"])
@pytest.mark.parametrize("http10", [False, True])
@given(request_id=st.from_regex(rb"[ -~]{1,256}", fullmatch=True))
def test_a_decision_stands_in_every_head_whatever_the_id(head: bytes, http10: bool, request_id: bytes) -> None:
    made, leg = answers("https://a"), PlannedLeg(1, TARGET, "hit", 3000, 4000)
    request = asked(b"POST", (b"origin", b"https://a"), http10=http10)
    theirs = parse_head(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
    assert theirs is not None
    told = made.decision(tag(True, request_id), leg, 0)
    framing = framing_of(theirs)
    both = [
        made.client_head(theirs, framing, request, b"id-1", True, told)[0],
        made.error(NotFound(), request, b"id-1", True, told),
    ]
    for sent in both:
        read = parse_head(sent)
        assert read is not None
        decision = read.header(b"x-sglang-router-decision") or b""
        start, _, quoted = decision.partition(b'id="')
        assert start == b"hit; matched=3000; total=4000; attempt=1; "
        assert re.sub(rb"\\(.)", rb"\1", quoted[:-1]) == request_id
        assert read.header(b"x-sglang-router-worker") == b"http://10.0.0.7:30000@1"
        assert read.header(b"access-control-allow-origin") == b"https://a"
