"""From where a request comes: what counts as this machine, and as the router's own page."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

import pytest
import uvloop

from sglang_router.access.origins import is_local, is_loopback, of_another_site

HERE = ("127.0.0.1", 40000)
THERE = ("10.0.0.9", 40000)


@pytest.mark.parametrize(
    "peername",
    [HERE, ("127.8.9.1", 1), ("::1", 1, 0, 0), ("::ffff:127.0.0.1", 1, 0, 0), "", "/run/client.sock", b"\x00abstract"],
)
def test_loopback_peers(peername: object) -> None:
    assert is_loopback(peername)


@pytest.mark.parametrize(
    "peername",
    [
        THERE,
        ("::ffff:10.0.0.9", 1, 0, 0),
        ("::127.0.0.1", 1, 0, 0),
        ("fe80::1%eth0", 1, 0, 3),
        ("0.0.0.0", 1),
        ("localhost", 1),
        ("", 1),
        (),
        None,
    ],
)
def test_peers_elsewhere(peername: object) -> None:
    assert not is_loopback(peername)


def test_a_client_that_resets_at_once_does_not_pass_for_a_local_one() -> None:
    """Its request is read all the same, and uvloop knows no address for it."""
    seen: list[tuple[Any, bytes]] = []

    class Peer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            seen.append((self.transport.get_extra_info("peername"), data))

        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

    async def scene() -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            with socket.create_connection(listening.getsockname()) as client:
                client.sendall(b"POST /add_worker")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            server = await asyncio.get_running_loop().create_server(Peer, sock=listening.dup())
            await asyncio.wait_for(lost.wait(), 10.0)
            server.close()

    lost = asyncio.Event()
    with contextlib.closing(uvloop.new_event_loop()) as loop:
        loop.run_until_complete(scene())
    assert seen == [(None, b"POST /add_worker")]
    assert not is_local(seen[0][0], [])


PROXIES = "x-forwarded-for x-forwarded-port x-forwarded-server x-forwarded-prefix x-forwarded forwarded via x-real-ip"
MORE_PROXIES = "cf-connecting-ip true-client-ip x-client-ip x-envoy-external-address x-amzn-trace-id x-original-host"
RARE_PROXIES = (
    "x-forward-for x-varnish incap-client-ip akamai-origin-hop x-haproxy-x x-traefik-x x-ssl-cert ssl-client-dn"
)
RARE_PROXIES += (
    " x-proxied-by x-kong-proxy-latency x-edge-ip cdn-real-ip x-auth-request-user x-nginx-proxy x-rewrite-url"
)


@pytest.mark.parametrize("name", f"{PROXIES} {MORE_PROXIES} {RARE_PROXIES}".encode().split())
def test_f21_what_a_proxy_passes_on_is_not_local_whatever_it_says(name: bytes) -> None:
    assert is_local(HERE, [(b"host", b"127.0.0.1:30000")])
    assert not is_local(HERE, [(name, b"127.0.0.1")])
    assert not is_local(THERE, [(name, b"127.0.0.1")])


@pytest.mark.parametrize(
    ("host", "origin", "site", "local"),
    [
        (b"localhost:30000", None, None, True),
        (b"gpu-box:30000", None, None, False),
        (b"localhost:30000", b"http://localhost:30000", b"same-origin", True),
        (b"[::1]:30000", b"http://[::1]:30000", None, True),
        (b"127.0.0.1:30000", None, b"none", True),
        (b"localhost:30000", b"https://evil.example", b"cross-site", False),
        (b"localhost:30000", b"http://localhost:8080", b"same-site", False),
        (b"localhost:30000", b"null", None, False),
        (b"localhost:30000", None, b"cross-site", False),
        (b"evil.example:30000", b"http://evil.example:30000", b"same-origin", False),
        (b"evil.example:30000", None, b"same-origin", False),
        (b"[::1", None, b"none", False),
        (b"", None, b"none", False),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else str(value),
)
def test_a_page_from_elsewhere_cannot_use_the_browser_on_this_machine(
    host: bytes, origin: bytes | None, site: bytes | None, local: bool
) -> None:
    fields = ((b"host", host), (b"origin", origin), (b"sec-fetch-site", site))
    assert is_local(HERE, [(name, value) for name, value in fields if value is not None]) is local


@pytest.mark.parametrize(
    ("fields", "local"),
    [
        ({b"host": b"localtest.me:30000"}, False),
        ({b"host": b"localhost.evil.example"}, False),
        ({b"host": b"localhost:30000"}, True),
        ({b"host": b"[::1]:30000"}, True),
        ({b"host": b"10.0.0.1:30000"}, True),
        ({}, True),
        ({b"host": b"127.0.0.1:30000", b"referer": b"http://evil.example/page"}, False),
        ({b"host": b"127.0.0.1:30000", b"referer": b"http://127.0.0.1:30000/"}, True),
        ({b"host": b"127.0.0.1:30000", b"user-agent": b"Mozilla/5.0 (X11)"}, False),
        ({b"host": b"127.0.0.1:30000", b"user-agent": b"Mozilla/5.0 (X11)", b"sec-fetch-site": b"none"}, True),
        ({b"host": b"127.0.0.1:30000", b"user-agent": b"curl/8.5.0"}, True),
    ],
)
def test_f20_a_page_that_names_itself_as_this_machine_is_not_local(fields: dict[bytes, bytes], local: bool) -> None:
    """An image at http://localtest.me:PORT/flush_cache sends neither Origin nor Sec-Fetch-*, nor does DNS rebinding."""
    assert is_local(HERE, fields.items()) is local
    assert not is_local(THERE, fields.items())


def test_f20_no_page_reaches_a_unix_socket() -> None:
    assert is_local("/run/client.sock", [(b"host", b"router")])
    assert not is_local("/run/client.sock", [(b"host", b"router"), (b"origin", b"http://evil.example")])


@pytest.mark.parametrize("name", b"host user-agent accept cache-control origin-id x-request-id content-type".split())
def test_f21_fields_of_local_programs_are_local(name: bytes) -> None:
    assert is_local(HERE, [(b"host", b"localhost"), (name, b"127.0.0.1")])


@pytest.mark.parametrize("host", [b"evil@localhost", b"evil\\@localhost", b"evil@127.0.0.1", b"2130706433", b"127.1"])
def test_f20_a_host_that_is_read_in_two_ways_is_not_local(host: bytes) -> None:
    assert not is_local(HERE, [(b"host", host)])


# -- web pages ---------------------------------------------------------------------------------------------------------

CHROME = (b"user-agent", b"Mozilla/5.0")
HOST = (b"host", b"router.example:30000")


@pytest.mark.parametrize(
    ("fields", "foreign"),
    [
        ([HOST], False),
        ([HOST, (b"user-agent", b"curl/8")], False),
        ([HOST, CHROME], True),  # it does not say for which page: an image of any page sends this over plain HTTP
        ([HOST, CHROME, (b"x-sglang-router-page", b"1")], False),
        ([HOST, CHROME, (b"sec-fetch-site", b"same-origin")], False),
        ([HOST, CHROME, (b"sec-fetch-site", b"same-origin"), (b"origin", b"https://behind-a-proxy")], False),
        ([HOST, CHROME, (b"sec-fetch-site", b"cross-site"), (b"origin", b"http://router.example:30000")], True),
        ([HOST, CHROME, (b"sec-fetch-site", b"none")], False),  # somebody typed the address
        ([HOST, CHROME, (b"sec-fetch-site", b"cross-site")], True),
        ([HOST, CHROME, (b"sec-fetch-site", b"same-site")], True),
        ([HOST, CHROME, (b"sec-fetch-site", b"")], True),
        ([HOST, CHROME, (b"origin", b"http://router.example:30000")], False),
        ([HOST, CHROME, (b"origin", b"https://router.example:30000")], False),  # a proxy may end TLS
        ([HOST, CHROME, (b"origin", b"http://router.example")], True),
        ([HOST, CHROME, (b"origin", b"http://router.example:30000.evil.example")], True),
        ([HOST, CHROME, (b"origin", b"null"), (b"x-sglang-router-page", b"1")], True),
        ([CHROME, (b"origin", b"http://evil.example")], True),
        ([CHROME, (b"origin", b"null")], True),
    ],
)
def test_the_page_that_a_browser_sends_it_for(fields: list[tuple[bytes, bytes]], foreign: bool) -> None:
    assert of_another_site(fields) is foreign
