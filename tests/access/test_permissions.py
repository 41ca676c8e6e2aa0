"""Access: the table of who may do what, how keys are sent and found, what counts as local, what the log says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from base64 import b64encode
from typing import Any

import pytest
import uvloop

from sglang_router.access.permissions import (
    Access,
    AccessKind,
    Identity,
    Role,
    audit_line,
    credentials_of,
    is_local,
    is_loopback,
)
from sglang_router.config.keys import client_keys, control_keys
from sglang_router.errors import AccessRefused, Forbidden, MissingKey, Unauthorized

CLIENTS = client_keys(["alice client-key", "bob other-key"])
CONTROL = control_keys(["ops:Service Account:admin:admin-key", "dev:Dev:user:user-key"])
HERE = ("127.0.0.1", 40000)
THERE = ("10.0.0.9", 40000)

CONFIGURED = {
    "none": Access(),
    "open": Access(open=True),
    "clients": Access(CLIENTS),
    "clients, open": Access(CLIENTS, open=True),
    "control": Access((), CONTROL),
    "both": Access(CLIENTS, CONTROL),
    "both, open": Access(CLIENTS, CONTROL, open=True),
}

# configured, kind: who gets in from elsewhere with no key, client-key, user-key, admin-key; then the same locally
TABLE = """
none           PUBLIC          + + + +   + + + +
none           INFERENCE       + + + +   + + + +
none           CONTROL_READ    + + + +   + + + +
none           CONTROL_CHANGE  F F F F   + + + +
open           CONTROL_CHANGE  + + + +   + + + +
clients        PUBLIC          + + + +   + + + +
clients        INFERENCE       M + I I   M + I I
clients        CONTROL_READ    M + I I   M + I I
clients        CONTROL_CHANGE  M F I I   M + I I
clients, open  CONTROL_CHANGE  M + I I   M + I I
control        PUBLIC          + + + +   + + + +
control        INFERENCE       + + + +   + + + +
control        CONTROL_READ    M I + +   M I + +
control        CONTROL_CHANGE  M I F +   M I F +
both           PUBLIC          + + + +   + + + +
both           INFERENCE       M + F F   M + F F
both           CONTROL_READ    M F + +   M F + +
both           CONTROL_CHANGE  M F F +   M F F +
both, open     CONTROL_READ    M F + +   M F + +
both, open     CONTROL_CHANGE  M F F +   M F F +
"""
SENT = (None, b"client-key", b"user-key", b"admin-key")


def verdict(access: Access, kind: AccessKind, credentials: bytes | None, local: bool) -> str:
    try:
        access.check(kind, credentials, local)
    except MissingKey:
        return "M"
    except Unauthorized:
        return "I"
    except Forbidden:
        return "F"
    return "+"


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_who_may_do_what(row: str) -> None:
    configured, rest = row[:15].strip(), row[15:].split()
    kind, expected = AccessKind[rest[0]], rest[1:]
    access = CONFIGURED[configured]
    assert [verdict(access, kind, sent, local) for local in (False, True) for sent in SENT] == expected


def test_who_it_is() -> None:
    access = Access(CLIENTS, CONTROL)
    assert access.check(AccessKind.INFERENCE, b"other-key") == Identity("bob", "", Role.CLIENT)
    assert access.check(AccessKind.CONTROL_CHANGE, b"admin-key") == Identity("ops", "Service Account", Role.ADMIN)
    assert access.check(AccessKind.CONTROL_READ, b"user-key") == Identity("dev", "Dev", Role.USER)
    assert Access().check(AccessKind.CONTROL_CHANGE, None, True).id == "loopback"
    assert Access().check(AccessKind.INFERENCE, b"whatever").id == "anyone"


@pytest.mark.parametrize(
    "wrong", [b"client-ke", b"client-keyy", b"Client-key", b"\xff", b"client-key\x00", b"x" * 65536]
)
def test_a_key_must_be_the_very_one(wrong: bytes) -> None:
    with pytest.raises(Unauthorized) as refused:
        Access(CLIENTS).check(AccessKind.INFERENCE, wrong)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    assert wrong not in refused.value.body()


def test_refusals_say_what_to_do_and_who_it_was() -> None:
    with pytest.raises(MissingKey) as missing:
        Access(CLIENTS).check(AccessKind.INFERENCE, b"")
    assert (missing.value.status, missing.value.code) == (401, "missing_api_key")
    assert missing.value.fields == (("www-authenticate", 'Bearer realm="sglang-router"'),)
    with pytest.raises(Forbidden, match="--control-plane-open") as remote:
        Access().check(AccessKind.CONTROL_CHANGE, None, False)
    assert (remote.value.status, remote.value.code) == (403, "forbidden")
    with pytest.raises(Forbidden, match="role admin"):
        Access((), CONTROL).check(AccessKind.CONTROL_CHANGE, b"user-key", True)
    with pytest.raises(Forbidden, match="for the control plane"):
        Access(CLIENTS, CONTROL).check(AccessKind.INFERENCE, b"admin-key")
    assert issubclass(MissingKey, AccessRefused)


def test_whose_key_it_is_also_when_it_is_refused() -> None:
    access = Access(CLIENTS, CONTROL)
    found = [access.identify(key).id for key in (None, b"", b"guess", b"client-key", b"user-key", b"admin-key")]
    assert found == ["anyone", "anyone", "anyone", "alice", "dev", "ops"]


def test_whether_the_key_is_the_routers_own() -> None:
    assert Access(CLIENTS).consumes_key
    assert not Access((), CONTROL).consumes_key


# -- how keys are sent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        ([(b"authorization", b"Bearer k")], b"k"),
        ([(b"host", b"h"), (b"authorization", b"bEARER   k ")], b"k"),
        ([(b"x-api-key", b"k")], b"k"),
        ([(b"x-api-key", b"k"), (b"authorization", b"Bearer l")], b"l"),
        ([(b"authorization", b"Basic dTpw"), (b"x-api-key", b"k")], b"k"),
        ([(b"authorization", b"Basic dTpw")], None),
        ([(b"authorization", b"k")], None),
        ([(b"authorization", b"Bearer ")], b""),
        ([(b"authorization", b"Bearerk")], None),
        ([(b"authorization", b"Bearer k"), (b"authorization", b"Bearer l")], b"k"),
        ([(b"x-api-key", b"k"), (b"x-api-key", b"l")], b"k"),
    ],
)
def test_the_key_in_a_request(headers: list[tuple[bytes, bytes]], expected: bytes | None) -> None:
    assert credentials_of(headers) == expected


# -- from where --------------------------------------------------------------------------------------------------------


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


def test_f39_what_operators_are_told_of_an_open_control_plane() -> None:
    """Nothing was said at the start of a router that others can reach and that has no control keys."""
    assert Access().warnings("127.0.0.1") == Access(open=True).warnings("::1") == Access().warnings("localhost") == []
    assert Access((), CONTROL).warnings("0.0.0.0") == []
    (read,) = Access().warnings("::")
    assert "may read its control plane" in read
    (change,) = Access(open=True).warnings("0.0.0.0")
    assert "may change its workers" in change
    (clients,) = Access(CLIENTS, open=True).warnings("0.0.0.0")
    assert "every client may read its control plane and change its workers" in clients


@pytest.mark.parametrize("name", b"host user-agent accept cache-control origin-id x-request-id content-type".split())
def test_f21_fields_of_local_programs_are_local(name: bytes) -> None:
    assert is_local(HERE, [(b"host", b"localhost"), (name, b"127.0.0.1")])


@pytest.mark.parametrize("host", [b"evil@localhost", b"evil\\@localhost", b"evil@127.0.0.1", b"2130706433", b"127.1"])
def test_f20_a_host_that_is_read_in_two_ways_is_not_local(host: bytes) -> None:
    assert not is_local(HERE, [(b"host", host)])


@pytest.mark.parametrize(
    "value", [b"Bearer admin-key ", b"Bearer\tadmin-key", b"Bearer x, Bearer admin-key", b"k=admin-key; l=1"]
)
def test_f32_a_key_of_the_control_plane_is_known_in_any_place(value: bytes) -> None:
    """With a blank behind it (`Bearer KEY `) it was forwarded."""
    access = Access((), CONTROL)
    assert access.is_control_key(value)
    assert access.is_control_key(b"Basic " + b64encode(b"user:admin-key"))
    assert not access.is_control_key(b"Basic admin")
    assert not access.is_control_key(b"x " * 30_000 + b"admin-key")  # bounded work


def test_f32_a_key_of_the_control_plane_is_known_in_any_scheme() -> None:
    withheld = Access((), CONTROL).withholds
    assert withheld is not None
    assert all(map(withheld, (b"Bearer admin-key", b"bearer  user-key", b"admin-key", b"Token admin-key")))
    assert not any(map(withheld, (b"Bearer other", b"", b"Bearer")))
    assert Access(CLIENTS, CONTROL).withholds is None  # no key of a client is forwarded
    assert Access().withholds is None


# -- the audit log -----------------------------------------------------------------------------------------------------


def test_audit_lines() -> None:
    access = Access(CLIENTS, CONTROL)
    who = access.check(AccessKind.CONTROL_CHANGE, b"admin-key")
    assert audit_line(who, "POST", "/workers/7f/drain", "10.0.0.9", 200) == (
        "POST /workers/7f/drain 200",
        {"by": "ops", "name": "Service Account", "role": "admin", "peer": "10.0.0.9"},
    )
    who = Access().check(AccessKind.CONTROL_CHANGE, None, True)
    assert audit_line(who, "POST", "/add_worker", "127.0.0.1", 200)[1] == {"by": "loopback", "peer": "127.0.0.1"}
    with pytest.raises(Unauthorized) as refused:
        access.check(AccessKind.CONTROL_CHANGE, b"guess")
    error = refused.value
    line = audit_line(access.identify(b"guess"), "POST", "/add_worker", "10.0.0.9", error.status, error.code)
    assert line[1] == {"by": "anyone", "peer": "10.0.0.9", "code": "invalid_api_key"}
