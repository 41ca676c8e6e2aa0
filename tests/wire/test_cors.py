"""What browsers are told: which origin, of which pages, and when nothing."""

from __future__ import annotations

import pytest

from sglang_router.wire.cors import Cors
from sglang_router.wire.request import Headers, Request
from sglang_router.wire.response import parse_head

HERE, THERE = (b"origin", b"https://a.example"), (b"origin", b"https://b.example")
METHOD = (b"access-control-request-method", b"POST")
LISTED, ANYONE = Cors(["https://a.example", "http://c:1"]), Cors(["*"])
VARY = b"vary: origin\r\n"
EXPOSED = b"access-control-expose-headers: x-request-id\r\n"


def asked(*fields: tuple[bytes, bytes], method: bytes = b"OPTIONS") -> Request:
    return Request(method, b"/v1/models", b"/v1/models", [(b"host", b"h"), *fields])


@pytest.mark.parametrize(
    ("cors", "fields", "expected"),
    [
        (LISTED, [], VARY),
        (LISTED, [HERE], VARY + b"access-control-allow-origin: https://a.example\r\n" + EXPOSED),
        (LISTED, [THERE], VARY),
        (LISTED, [(b"origin", b"https://a.example.evil")], VARY),
        (LISTED, [(b"origin", b"null")], VARY),
        (LISTED, [(b"origin", b"*")], VARY),
        (ANYONE, [], b"access-control-allow-origin: *\r\n" + EXPOSED),
        (ANYONE, [THERE], b"access-control-allow-origin: *\r\n" + EXPOSED),
    ],
)
def test_fields_of_an_answer(cors: Cors, fields: Headers, expected: bytes) -> None:
    assert cors.fields(fields) == expected


def told(cors: Cors, request: Request) -> dict[str, str] | None:
    """The fields of the answer to a preflight."""
    answer = cors.preflight(request, b"id-1", b"connection: close\r\n")
    if answer is None:
        return None
    head = parse_head(answer)
    assert head is not None
    assert (head.status, head.end) == (200, len(answer))
    fields = {name.decode(): value.decode() for name, value in head.headers}
    assert (fields["x-request-id"], fields["connection"], fields["content-length"]) == ("id-1", "close", "0")
    assert "access-control-request-headers" in fields["vary"]
    return {name[15:]: value for name, value in fields.items() if name.startswith("access-control-")}


def test_preflights() -> None:
    rest = {"allow-methods": "GET, POST, OPTIONS", "max-age": "3600"}
    usual = rest | {"allow-headers": "authorization, content-type"}
    assert told(LISTED, asked(HERE, METHOD)) == usual | {"allow-origin": "https://a.example"}
    assert told(ANYONE, asked(THERE, METHOD)) == usual | {"allow-origin": "*"}
    wanted = asked(HERE, METHOD, (b"access-control-request-headers", b"x-api-key"))
    assert told(LISTED, wanted) == rest | {"allow-origin": "https://a.example", "allow-headers": "x-api-key"}
    assert told(LISTED, asked(THERE, METHOD)) == {}
    assert told(LISTED, asked(METHOD)) == {}


def test_what_is_no_preflight() -> None:
    assert told(ANYONE, asked(HERE)) is None
    assert told(ANYONE, asked(HERE, METHOD, method=b"POST")) is None
