"""Origins: what a base URL means for a connection and for the head of each request."""

from __future__ import annotations

import pytest

from sglang_router.relay.origin import Origin, origin_of


def said(origin: Origin) -> tuple[str, bool, int, bool, bytes]:
    return origin.host, origin.is_name, origin.port, origin.secure, origin.prefix


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://engine:8000", ("engine", True, 8000, False, b"")),
        ("http://engine", ("engine", True, 80, False, b"")),
        ("https://engine/base", ("engine", True, 443, True, b"/base")),
        ("http://127.0.0.1:1", ("127.0.0.1", False, 1, False, b"")),
        ("http://[::1]:1", ("::1", False, 1, False, b"")),
    ],
)
def test_where_a_url_points(url: str, expected: tuple[str, bool, int, bool, bytes]) -> None:
    assert said(origin_of(url)) == expected


def test_the_start_of_a_head() -> None:
    assert origin_of("http://e:1/base").start(b"POST", b"/x") == b"POST /base/x HTTP/1.1\r\nhost: e:1\r\n"
    assert origin_of("http://e:1", 3).start(b"GET", b"/x?y") == (
        b"GET /x?y HTTP/1.1\r\nhost: e:1\r\nx-data-parallel-rank: 3\r\n"
    )


def test_starts_are_kept_up_to_a_limit_and_never_with_a_query() -> None:
    origin = origin_of("http://e:1")
    assert origin.start(b"GET", b"/x") is origin.start(b"GET", b"/x")
    assert origin.start(b"GET", b"/x?1") is not origin.start(b"GET", b"/x?1")
    for number in range(300):
        origin.start(b"GET", b"/%d" % number)
    assert origin.start(b"GET", b"/299") is not origin.start(b"GET", b"/299")
    assert origin.start(b"GET", b"/x") is origin.start(b"GET", b"/x")


def test_two_urls_of_one_server_have_one_place() -> None:
    same = ["http://localhost:8000", "http://127.0.0.1:8000", "http://[::1]:8000/"]
    assert len({origin_of(url).place for url in same}) == 1
    assert origin_of("http://engine").place == origin_of("http://engine:80").place
    others = ["http://localhost:8001", "http://127.0.0.2:8000", "http://localhost:8000/e1", "http://engine:8000"]
    assert len({origin_of(url).place for url in [*others, same[0]]}) == 5


def test_it_can_be_read_in_a_log() -> None:
    assert repr(origin_of("https://e/base")) == "<Origin https://e:443/base>"
