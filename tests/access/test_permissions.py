"""Access: the table of who may do what, how keys are sent and found, what the log says."""

from __future__ import annotations

from base64 import b64encode

import pytest

from sglang_router.access.permissions import (
    Access,
    AccessKind,
    Identity,
    Role,
    audit_line,
    credentials_of,
)
from sglang_router.config.keys import client_keys, control_keys
from sglang_router.errors import AccessRefused, Forbidden, MissingKey, Unauthorized

CLIENTS = client_keys(["alice client-key", "bob other-key"])
CONTROL = control_keys(["ops:Service Account:admin:admin-key", "dev:Dev:user:user-key"])

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


# -- what operators are told, and what workers must not see ------------------------------------------------------------


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
    beside_clients = Access(CLIENTS, CONTROL).withholds  # those of clients end here, but other fields are forwarded
    assert beside_clients is not None
    assert beside_clients(b"token=admin-key")
    assert Access(CLIENTS).withholds is None
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
