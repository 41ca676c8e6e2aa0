"""CORS fields: which origins are told what, and when no field is sent."""

from __future__ import annotations

import pytest

from sglang_router.wire.cors import Cors
from sglang_router.wire.request import Headers, Request

HERE, THERE = (b"origin", b"https://a.example"), (b"origin", b"https://b.example")
METHOD = (b"access-control-request-method", b"POST")
LISTED, ANYONE = Cors(["https://a.example", "http://c:1"]), Cors(["*"])
VARY = b"vary: origin\r\n"
EXPOSED = b"access-control-expose-headers: x-request-id, x-sglang-router-decision, x-sglang-router-worker\r\n"


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
    """Return the fields of the answer to a preflight."""
    fields = cors.preflight(request)
    if fields is None:
        return None
    named = {name.decode(): value.decode() for name, value in fields}
    assert "access-control-request-headers" in named["vary"]
    return {name[15:]: value for name, value in named.items() if name.startswith("access-control-")}


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
