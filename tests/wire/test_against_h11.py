"""Compare our parsers with h11: where the two disagree, the reason is known, listed here and judged.

Messages are the corpora, and valid messages with a few bytes inserted, removed or replaced. Each parser says `ok`,
`more` or `refused`, and what it understood. Then:

    both say `ok`                    they understood the same, also whether the connection persists
    one says `ok`, one `refused`     a table below has the reason, with its judgement
    one says `ok`, one `more`        never: they would see different messages
    one says `more`, one `refused`   one noticed earlier; neither passed a message on

So a disagreement of a new kind fails the test; and so does a row of a table that no message of the corpora needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_router.errors import UpgradeRefused, VersionNotSupported
from sglang_router.wire.limits import Limits
from sglang_router.wire.request import Headers
from wire_corpus import Case, corpus, each_case, pieces, read_requests, read_response


class Ruling(NamedTuple):
    """The judgement of one kind of disagreement. `right`: "we", "h11", or "both" where the RFC allows both."""

    right: str
    by: str
    why: str


REFUSED_BY_US = {
    # Two readers could find two different ends of the message (request smuggling).
    "Duplicate Content-Length.": Ruling("both", "RFC 9110 8.6", "h11 takes a second one that says the same"),
    "Invalid character in Content-Length.": Ruling("both", "RFC 9110 8.6", "h11 takes `5, 5`, which says one thing"),
    "Content-Length overflow.": Ruling("both", "RFC 9110 8.6", "h11 lets the coding win over any length"),
    "Transfer-Encoding can't be present with Content-Length.": Ruling("both", "RFC 9112 6.1", "h11: the coding wins"),
    "Content-Length can't be present with Transfer-Encoding.": Ruling("both", "RFC 9112 6.1", "or in a trailer"),
    "Invalid `Transfer-Encoding` header value.": Ruling("both", "RFC 9110 6.5.1", "in a trailer; h11 drops trailers"),
    "HTTP/1.0 has no Transfer-Encoding.": Ruling("we", "RFC 9112 6.1", "h11 reads chunks; servers of 1.0 do not"),
    "Expected CRLF after version.": Ruling("both", "RFC 9112 2.2", "bare LF behind the request line"),
    "Missing expected CR after header value.": Ruling("both", "RFC 9112 2.2", "bare LF behind a field"),
    "Invalid header field char.": Ruling("both", "RFC 9112 2.2", "bare LF for the empty line"),
    "Unexpected whitespace after header value.": Ruling("both", "RFC 9112 5.2", "h11 unfolds a folded line"),
    "Invalid character in chunk size.": Ruling("we", "RFC 9112 7.1", "white space behind the size"),
    "Expected LF after chunk size.": Ruling("we", "RFC 9112 2.2", "a bare CR in a chunk extension"),
    "Invalid character in chunk extensions.": Ruling("we", "RFC 9112 7.1.1", "h11 throws extensions away unread"),
    "Invalid character in chunk extensions name.": Ruling("we", "RFC 9112 7.1.1", "no token"),
    "Invalid character in chunk extensions value.": Ruling("we", "RFC 9112 7.1.1", "no token"),
    "Invalid character in chunk extensions quoted value.": Ruling("we", "RFC 9112 7.1.1", "a string without an end"),
    "Invalid character in chunk extensions quote value.": Ruling("we", "RFC 9112 7.1.1", "something behind a string"),
    "Data after `Connection: close`.": Ruling("both", "RFC 9112 9.6", "h11 stops reading there, and says nothing"),
    # What we do not support.
    "Invalid header value char.": Ruling("both", "RFC 9110 5.5", "control characters"),
    "The request line does not begin with a method.": Ruling(
        "h11", "RFC 9110 15.6.2", "any token is a method, if only to be answered 501; llhttp knows the registered ones"
    ),
    VersionNotSupported.message: Ruling("we", "RFC 9110 15.6.6", "h11 leaves the version to its user"),
    "Expected HTTP/2 Connection Preface.": Ruling("we", "RFC 9113 11.6", "PRI is no method"),
    UpgradeRefused.message: Ruling("both", "RFC 9110 9.3.6", "CONNECT; h11 leaves that to its user"),
    "The target has a fragment (#), which is not sent to servers.": Ruling("we", "RFC 9112 3.2", "as before"),
    "Invalid characters in url.": Ruling("we", "RFC 9112 3.2", "neither path nor URL; h11 takes any visible bytes"),
    "Unexpected start char in url.": Ruling("we", "RFC 9112 3.2", "as before"),
    "Unexpected char in url schema.": Ruling("we", "RFC 9112 3.2", "as before"),
    "Unexpected char in url server.": Ruling("we", "RFC 9112 3.2", "as before"),
}
"""Our reason -> the ruling. Requests that we refuse and h11 accepts."""

REFUSED_BY_H11 = {
    "no request line received": (rb"(^|\n)\r?\n", Ruling("we", "RFC 9112 2.2", "an empty line before a request")),
    "illegal chunk header": (rb"\n0{15,}[0-9a-fA-F]", Ruling("we", "RFC 9112 7.1", "a size may have leading zeros")),
}
"""h11's reason -> a pattern of the message, the ruling. Requests that we accept and h11 refuses."""

STRICTER_WITH_WORKERS = {
    "bare LF": (rb"(?<!\r)\n", Ruling("both", "RFC 9112 2.2", "")),
    "a folded line": (rb"\r\n[ \t]", Ruling("both", "RFC 9112 5.2", "a gateway may answer 502 or unfold")),
    "a second Content-Length": (
        rb"(?is)content-length:.*(content-length:|,)",
        Ruling("both", "RFC 9110 8.6", "h11 takes one that says the same"),
    ),
    "Content-Length beside Transfer-Encoding": (
        rb"(?is)content-length:.*\ntransfer-e|transfer-encoding:.*\ncontent-l",
        Ruling("we", "RFC 9112 6.3", "ought to be handled as an error"),
    ),
    "Transfer-Encoding in HTTP/1.0": (
        rb"(?is)HTTP/1\.0.*transfer-encoding",
        Ruling("we", "RFC 9112 6.1", "the framing is faulty"),
    ),
    "another version": (rb"HTTP/(?!1\.[01] )", Ruling("we", "RFC 9112 2.3", "what it frames how is not known")),
    "a status behind 599": (
        rb"HTTP/1\.[01] [6-9]",
        Ruling("both", "RFC 9110 15", "invalid; a client should take it for a 5xx, and so our 502 is one"),
    ),
    "control characters in the head": (
        rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]",
        Ruling("both", "RFC 9110 5.5", "may be kept where that is safe; what the client makes of them is not known"),
    ),
    "a Content-Length of 19 digits": (rb"(?i)content-length:[ \t]*[0-9]{19}", Ruling("both", "RFC 9110 8.6", "")),
    "white space behind a chunk's size": (rb"\n[0-9a-fA-F]+[ \t]", Ruling("we", "RFC 9112 7.1", "")),
    "a chunk's size of 16 digits": (
        rb"\n[0-9a-fA-F]{16}",
        Ruling("both", "RFC 9112 7.1", "other readers may count it modulo 2^64"),
    ),
    "a chunk extension that is no text": (
        rb"\n[0-9a-fA-F]+;[^\r\n]*[^\t\x20-\x7e\r\n]|\n[0-9a-fA-F]+;[^\r\n]*\r[^\n]",
        Ruling("we", "RFC 9112 7.1.1", "h11 throws extensions away unread"),
    ),
    "a line of over 4 KiB in a chunked body": (
        rb"(?s)\r\n\r\n.*[^\r\n]{4090}",
        Ruling("both", "RFC 9112 7.1.1", "a recipient ought to have a limit"),
    ),
    "more than 64 KiB of head or trailers": (
        rb"(?:[^\r\n]+\r\n){10000}|[^\r\n]{65400}",
        Ruling("both", "RFC 9110 5.4", "as before"),
    ),
}
"""Answers of workers that we refuse and h11 accepts: their pattern, the ruling. There is no table for the other
direction: what h11 refuses, we refuse."""


class Read(NamedTuple):
    """One request as a parser understood it. `stays` is true for all HTTP/1.0: h11 does not support its keep-alive."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes
    stays: bool


class Reading(NamedTuple):
    """What one parser understood of a client's bytes. `stopped`: it does not read beyond the end of a connection."""

    verdict: str
    reason: str
    requests: list[Read]


class Answer(NamedTuple):
    """What one parser understood of a worker's bytes. `end` is -1 where closing the connection ends the message."""

    verdict: str
    status: int = 0
    reason: bytes = b""
    headers: Headers = []  # noqa: RUF012  # never changed
    payload: bytes = b""
    end: int = -1


_NO_LIMITS = Limits(head_bytes=1 << 20, header_count=1 << 20, body_bytes=1 << 62)


# -- the two parsers, brought to one form ------------------------------------------------------------------------------


def our_requests(raw: bytes) -> Reading:
    asked = read_requests([raw], _NO_LIMITS)
    requests = [
        Read(
            request.method,
            request.target,
            _fields_of(request.headers),
            bytes(request.body),
            request.keep_alive or request.http10,
        )
        for request in asked.requests
    ]
    reason = str(asked.error or "").removeprefix("This is not a well-formed HTTP/1.1 request: ")
    return Reading("refused" if asked.error else asked.verdict, reason, requests)


def h11_requests(raw: bytes) -> Reading:
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    server.receive_data(raw)
    requests: list[Read] = []
    try:
        while (request := _h11_request(server)) is not None:
            server.send(h11.Response(status_code=404, headers=[("content-length", "0")]))
            server.send(h11.EndOfMessage())
            requests.append(request._replace(stays=request.stays or server.our_state is h11.DONE))
            if server.our_state is not h11.DONE:
                return Reading("stopped" if server.trailing_data[0].strip(b"\r\n") else "ok", "", requests)
            server.start_next_cycle()
    except h11.RemoteProtocolError as error:
        return Reading("refused", str(error), requests)
    between = server.their_state is h11.IDLE and not server.trailing_data[0]
    return Reading("ok" if between else "more", "", requests)


def _h11_request(server: h11.Connection) -> Read | None:
    """Return the next complete request; None where there is none."""
    head = server.next_event()
    if not isinstance(head, h11.Request):
        return None
    body = b""
    while not isinstance(event := server.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            return None
        if isinstance(event, h11.Data):
            body += event.data
    fields = _fields_of(list(head.headers))
    return Read(head.method, _origin_form(head.target), fields, body, head.http_version == b"1.0")


def _fields_of(headers: Headers) -> Headers:
    """Return fields as h11 has them: without trailing white space, and the transfer coding in lower case.

    An Upgrade is left out: we ignore it, and h11 leaves it to its user.
    """
    fields = ((name, value.strip(b" \t")) for name, value in headers if name != b"upgrade")
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in fields]


def _origin_form(target: bytes) -> bytes:
    rest = re.sub(rb"^[^:/?]+://[^/?]*", b"", target)
    return rest if rest.startswith(b"/") or rest == target else b"/" + rest


def our_answer(raw: bytes) -> Answer:
    answered = read_response([raw])
    if answered.verdict != "ok":
        return Answer("refused" if answered.invalid else "more")
    head = answered.head
    assert head is not None
    return Answer("ok", head.status, head.reason, _fields_of(head.headers), answered.payload, answered.end)


def h11_answer(raw: bytes) -> Answer:
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    head, payload, closed = None, b"", False
    try:
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                payload += event.data
            elif event is h11.NEED_DATA:
                if head is None or closed:
                    return Answer("more")
                closed = True
                client.receive_data(b"")
            elif not isinstance(event, h11.InformationalResponse):
                return Answer("more")
    except h11.RemoteProtocolError:
        return Answer("more" if closed else "refused")
    assert head is not None
    end = -1 if closed else len(raw) - len(client.trailing_data[0])
    return Answer("ok", head.status_code, bytes(head.reason), _fields_of(list(head.headers)), payload, end)


# -- what must hold ----------------------------------------------------------------------------------------------------


def compare_requests(raw: bytes) -> str:
    """Return the row of a table that explains why the parsers disagree; empty when they agree."""
    ours, theirs = our_requests(raw), h11_requests(raw)
    both = min(len(ours.requests), len(theirs.requests))
    assert ours.requests[:both] == theirs.requests[:both]
    if theirs.verdict == "stopped" and b"HTTP/1.0" in raw and len(ours.requests) >= both:
        return ""  # the client keeps its connection open; h11 did not read on
    if ours.verdict == "refused" and theirs.verdict in ("ok", "stopped"):
        assert ours.reason in REFUSED_BY_US, ours
        return ours.reason
    if (ours.verdict, theirs.verdict) == ("ok", "refused"):
        reason = next((reason for reason in REFUSED_BY_H11 if theirs.reason.startswith(reason)), theirs.reason)
        pattern, _ = REFUSED_BY_H11[reason]
        assert re.search(pattern, raw), theirs
        return reason
    if "ok" in (ours.verdict, theirs.verdict):
        assert ours == theirs
    return ""


def compare_answers(raw: bytes) -> set[str]:
    """Return the rows that may explain why we refuse what h11 accepts; empty when the parsers agree."""
    ours, theirs = our_answer(raw), h11_answer(raw)
    if (ours.verdict, theirs.verdict) == ("refused", "ok"):
        rows = {row for row, (pattern, _) in STRICTER_WITH_WORKERS.items() if re.search(pattern, raw)}
        assert rows, theirs
        return rows
    if "ok" in (ours.verdict, theirs.verdict):
        assert ours == theirs
    return set()


@each_case("requests.txt")
def test_requests_of_the_corpus(case: Case) -> None:
    compare_requests(case.raw)


@each_case("responses.txt")
def test_responses_of_the_corpus(case: Case) -> None:
    compare_answers(case.raw)


def test_every_row_is_judged() -> None:
    rulings = [*REFUSED_BY_US.values(), *(ruling for _, ruling in REFUSED_BY_H11.values())]
    rulings += [ruling for _, ruling in STRICTER_WITH_WORKERS.values()]
    for ruling in rulings:
        assert ruling.right in ("we", "h11", "both")
        assert re.fullmatch(r"RFC 911[023] \d+(\.\d+)*", ruling.by), ruling


def test_every_row_is_borne_out() -> None:
    reasons = {compare_requests(case.raw) for case in corpus("requests.txt")}
    assert reasons - {""} == REFUSED_BY_US.keys() | REFUSED_BY_H11.keys()


def test_every_row_of_the_workers_is_borne_out_alone() -> None:
    alone = {row for case in corpus("responses.txt") if len(rows := compare_answers(case.raw)) == 1 for row in rows}
    assert alone == STRICTER_WITH_WORKERS.keys()


# -- messages with faults ----------------------------------------------------------------------------------------------

_USUAL = (b"Accept: */*", b"A:b", b"B:  c \t", b"C:", b"Connection: close", b"Connection: keep-alive")
_ODD = (b"D: \x80\xff", b"Expect: 100-continue", b"Upgrade: h2c", b"TE: trailers", b"a_b!#$%&'*+.^`|~: c", b"E: " * 99)
_fields = st.lists(st.sampled_from(_USUAL + _ODD), max_size=3)
_contents = st.sampled_from([b"", b"hello", b"x" * 20, b"{}\r\n\r\n", b"0\r\n\r\n", b"GET /a HTTP/1.1\r\n\r\n"])
_extensions = st.sampled_from([b"", b";a", b";a=b", b';a="b c"', b";a;b=c"])
_sizes = st.sampled_from([b"%x", b"%X", b"%04x", b"%015x"])
_trailers = st.sampled_from([b"", b"", b"T: u\r\n", b"T:\r\nV: w\r\n"])
_snippets = st.sampled_from(
    [bytes([code]) for code in b'\0\1\t\n\v\r "#*+,-./015:;=?AG_a\x7f\x80\xff']
    + [b"\r\n", b"  ", b"\r\n ", b"http://", b"chunked", b"gzip, ", b"A: b\r\n", b"Host: y\r\n", b"HTTP/1.0"]
    + [b"Connection: close\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Upgrade: h2c\r\n"]
)
_places = st.floats(0, 1)
_faults = st.lists(st.tuples(_places, st.integers(0, 2), st.just(b"") | _snippets), max_size=3)
"""Position, number of bytes to remove, bytes to insert."""

_framings = st.sampled_from(
    [
        b"Content-Length: " + value
        for value in (b"0", b"5", b"+5", b"0x5", b"5, 5", b"", b"5_0", b"05", b"-1", b"9" * 20)
    ]
    + [b"Transfer-Encoding: " + value for value in (b"chunked", b"Chunked", b",chunked", b"chunked, chunked", b"gzip")]
    + [b"Transfer-Encoding: identity", b"Transfer-Encoding:", b"Transfer-Encoding : chunked", b"Content-Length : 5"]
    + [b"Content-Length:5\r\nContent-Length:5", b"Transfer-Encoding: \x0bchunked", b"Content-Length\x00: 5", b"Host: z"]
)
_LINE_FAULTS: dict[str, Callable[[list[bytes], int, bytes], list[bytes]]] = {
    "again": lambda lines, at, _: [*lines[:at], lines[at], *lines[at:]],
    "gone": lambda lines, at, _: lines[:at] + lines[at + 1 :],
    "swapped": lambda lines, at, _: [*lines[:at], *reversed(lines[at : at + 2]), *lines[at + 2 :]],
    "joined by LF": lambda lines, at, _: [*lines[:at], b"\n".join(lines[at : at + 2]), *lines[at + 2 :]],
    "joined by CR": lambda lines, at, _: [*lines[:at], b"\r".join(lines[at : at + 2]), *lines[at + 2 :]],
    "folded": lambda lines, at, _: [*lines[:at], b" " + lines[at], *lines[at + 1 :]],
    "upper case": lambda lines, at, _: [*lines[:at], lines[at].upper(), *lines[at + 1 :]],
    "lower case": lambda lines, at, _: [*lines[:at], lines[at].lower(), *lines[at + 1 :]],
    "spaced": lambda lines, at, _: [*lines[:at], lines[at].replace(b":", b" :", 1), *lines[at + 1 :]],
    "another framing": lambda lines, at, framing: [*lines[: at + 1], framing, *lines[at + 1 :]],
    "cut": lambda lines, at, _: lines[: at + 1],
}
"""How a line of a message may be changed: the name of the change, and a function that makes it."""
_line_faults = st.lists(st.tuples(st.sampled_from(sorted(_LINE_FAULTS)), _places, _framings), min_size=1, max_size=3)


@st.composite
def _framed(draw: st.DrawFn, version: bytes) -> tuple[list[bytes], bytes]:
    """Draw the fields and the body of a message."""
    fields, content = draw(_fields), draw(_contents)
    kind = draw(st.sampled_from(["none", "sized", "chunked"]))
    if kind == "sized":
        return [*fields, draw(st.sampled_from([b"Content-Length: %d", b"content-length:00%d"])) % len(content)], content
    if kind == "none" or version == b"1.0":
        return fields, b""
    cuts = draw(st.lists(st.integers(0, len(content)), max_size=2))
    parts = [part for part in pieces(content, cuts) if part]
    chunks = [b"%s%s\r\n%s\r\n" % (draw(_sizes) % len(part), draw(_extensions), part) for part in parts]
    last = b"%s%s\r\n%s\r\n" % (draw(st.sampled_from([b"0", b"000"])), draw(_extensions), draw(_trailers))
    return [b"Transfer-Encoding: chunked", *fields], b"".join((*chunks, last))


@st.composite
def _messages(draw: st.DrawFn, start: st.SearchStrategy[bytes], first: list[bytes]) -> bytes:
    line = draw(start)
    fields, body = draw(_framed(b"1.0" if b"HTTP/1.0" in line else b"1.1"))
    return b"\r\n".join((line, *draw(st.permutations([*first, *fields])), b"", body))


_requests = _messages(
    st.builds(
        lambda method, target, version: b"%s %s HTTP/%s" % (method, target, version),
        st.sampled_from([b"GET", b"POST", b"OPTIONS", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"TRACE"]),
        st.sampled_from([b"/", b"/generate?a=b", b"http://x/a?b", b"*", b"//a/../b", b"/%00%0d%0a?c=d&e", b"/" * 200]),
        st.sampled_from([b"1.1", b"1.1", b"1.0"]),
    ),
    [b"Host: x"],
)
_answers = st.builds(
    lambda interim, answer, behind: b"".join(interim) + answer + behind,
    st.lists(st.sampled_from([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n"]), max_size=2),
    _messages(
        st.builds(
            lambda version, status: b"HTTP/%s %s" % (version, status),
            st.sampled_from([b"1.1", b"1.1", b"1.0"]),
            st.sampled_from(
                [b"200 OK", b"404", b"503 Not \xe9", b"204 None", b"304 Same", b"206 ", b"301 To", b"599 \t"]
            ),
        ),
        [],
    ),
    st.sampled_from([b"", b"", b"!", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]),
)
_pipelines = st.lists(_requests, min_size=1, max_size=3).map(b"".join)


def _broken(raw: bytes, faults: list[tuple[float, int, bytes]]) -> bytes:
    for place, taken, put in faults:
        at = round(place * len(raw))
        raw = raw[:at] + put + raw[at + taken :]
    return raw


def _misshapen(raw: bytes, faults: list[tuple[str, float, bytes]]) -> bytes:
    lines = raw.split(b"\r\n")
    for kind, place, framing in faults:
        lines = _LINE_FAULTS[kind](lines, round(place * (len(lines) - 1)), framing) or [b"G"]
    return b"\r\n".join(lines)


@settings(max_examples=500, derandomize=True)
@given(_pipelines, _faults)
def test_requests_with_faults(raw: bytes, faults: list[tuple[float, int, bytes]]) -> None:
    compare_requests(_broken(raw, faults))


@settings(max_examples=400, derandomize=True)
@given(_pipelines, _line_faults)
def test_requests_with_faulty_lines(raw: bytes, faults: list[tuple[str, float, bytes]]) -> None:
    compare_requests(_misshapen(raw, faults))


@settings(max_examples=500, derandomize=True)
@given(_answers, _faults)
def test_responses_with_faults(raw: bytes, faults: list[tuple[float, int, bytes]]) -> None:
    compare_answers(_broken(raw, faults))


@settings(max_examples=400, derandomize=True)
@given(_answers, _line_faults)
def test_responses_with_faulty_lines(raw: bytes, faults: list[tuple[str, float, bytes]]) -> None:
    compare_answers(_misshapen(raw, faults))


@settings(max_examples=100, derandomize=True)
@given(_requests, _answers)
def test_good_messages_are_served_by_both(request: bytes, answer: bytes) -> None:
    assert our_requests(request).verdict == h11_requests(request).verdict == "ok"
    assert our_answer(answer) == h11_answer(answer)


@settings(max_examples=150, derandomize=True)
@given(_pipelines, _answers, _faults, st.lists(_places, max_size=6))
def test_how_reads_are_split_changes_nothing(
    requests: bytes, answer: bytes, faults: list[tuple[float, int, bytes]], places: list[float]
) -> None:
    raw = _broken(requests, faults)
    whole, split = read_requests([raw]), read_requests(_reads(raw, places))
    assert (split.requests, split.verdict) == (whole.requests, whole.verdict)
    raw = _broken(answer, faults)
    at_once, dripped = read_response([raw]), read_response(_reads(raw, places))
    assert (dripped.verdict, dripped.head) == (at_once.verdict, at_once.head)
    if not at_once.invalid:
        assert (dripped.payload, dripped.end) == (at_once.payload, at_once.end)


def _reads(raw: bytes, places: list[float]) -> list[bytes]:
    """Return the reads that end at these positions; byte by byte when there are none."""
    return pieces(raw, (round(place * len(raw)) for place in places) if places else range(1, len(raw)))
