"""By which name a browser asked: which requests a foreign page may have sent whose name was made to point here."""

from __future__ import annotations

import pytest

from sglang_router.access.host_names import OwnNames

BROWSER = (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0")
NAMES = OwnNames(["gpu-17.example.com", ".lab.example.com", "0.0.0.0"])
EVIL = b"evil.example:30000"


def foreign(host: bytes, *fields: tuple[bytes, bytes], names: OwnNames = NAMES, secure: bool = False) -> str:
    return names.foreign([(b"host", host), *fields], secure)


@pytest.mark.parametrize(
    "host",
    [
        *(b"127.0.0.1:30000", b"[::1]:30000", b"10.0.0.5", b"[fe80::1%25eth0]:80"),
        *(b"localhost:30000", b"router.localhost", b"LOCALHOST.", b"router", b"gpu-box:30000"),
        *(b"gpu-box.local", b"ip-10-0-0-5.ec2.internal:80", b"box.home.arpa"),
        *(b"gpu-17.example.com:30000", b"GPU-17.Example.com.", b"a.lab.example.com", b"lab.example.com"),
    ],
)  # fmt: skip
def test_names_that_nobody_else_can_own(host: bytes) -> None:
    assert foreign(host, BROWSER) == ""


@pytest.mark.parametrize(
    "host",
    [
        *(EVIL, b"localhost.evil.example", b"local.evil.example", b"notlocal.example", b"127.0.0.1.nip.io"),
        *(b"gpu-17.example.com.evil.example", b"x.gpu-17.example.com", b"evillab.example.com", b"xlocal.dev", b"[::1"),
        *(b"localhost@evil.example", b"10.0.0.5.evil.example", b"internal.evil"),
    ],
)
def test_names_that_somebody_else_can_own(host: bytes) -> None:
    assert foreign(host, BROWSER) == host.decode()
    assert foreign(host, BROWSER, names=OwnNames(["*"])) == ""
    assert foreign(host, BROWSER, secure=True) == ""


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ([], False),
        ([(b"user-agent", b"curl/8.5.0"), (b"accept", b"*/*")], False),
        ([(b"user-agent", b"Prometheus/3.1.0"), (b"accept-encoding", b"gzip")], False),
        ([(b"user-agent", b"python-requests/2.32"), (b"accept-encoding", b"gzip, deflate")], False),
        # Node's fetch is no browser, though it has a field of theirs.
        ([(b"user-agent", b"node"), (b"accept-language", b"*"), (b"sec-fetch-mode", b"cors")], False),
        # A page can change its User-Agent, but not take away all marks.
        ([(b"user-agent", b"curl/8.5.0"), (b"accept-language", b"en")], True),
        ([(b"user-agent", b"x"), (b"accept-language", b"")], True),
        ([(b"user-agent", b"curl/8.5.0"), (b"origin", b"http://evil.example:30000")], True),
        ([(b"user-agent", b"curl/8.5.0"), (b"origin", b"null")], True),
        ([(b"referer", b"http://evil.example:30000/page")], True),
        ([(b"cookie", b"a=b")], True),
        # Over TLS, as a proxy in front may end it: the browser has seen a certificate for the name.
        ([BROWSER, (b"sec-fetch-site", b"same-origin"), (b"sec-fetch-mode", b"cors")], False),
        # A page of another origin has no use of it: others look after these.
        ([BROWSER, (b"origin", b"http://ui.example")], False),
        ([BROWSER, (b"origin", b"http://EVIL.example:30000")], True),
    ],
)
def test_which_requests_a_page_may_have_sent(fields: list[tuple[bytes, bytes]], refused: bool) -> None:
    assert bool(foreign(EVIL, *fields)) is refused


def test_what_names_no_host_is_no_browsers() -> None:
    assert NAMES.foreign([BROWSER], secure=False) == ""
