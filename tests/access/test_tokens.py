"""Tokens of an identity provider: which ones count, what they may do here, and that nothing of them is shown."""

from __future__ import annotations

import base64
import hmac
import json
import math
import time
from hashlib import sha256
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from sglang_router.access.permissions import Access, AccessKind, Identity, Role, TokenReader
from sglang_router.access.tokens import TokenRules, WebTokens
from sglang_router.config.keys import ClientKey, ControlKey
from sglang_router.errors import AccessRefused, Forbidden, InvalidToken, MissingKey, TokenKeysMissing, Unauthorized
from tokens_made import AUDIENCE, Issuer, jwk_of, key_of

URL = "https://auth.example.com/realms/main"
ROLES = {"Ops": "admin", "Dev": "user"}


class Asked:
    """Counts how often the issuer was asked for its keys; answers that it is being asked, or not."""

    def __init__(self) -> None:
        self.times = 0
        self.asks = False

    def __call__(self) -> bool:
        self.times += 1
        return self.asks


class Rig:
    """Tokens of one issuer, whose keys the router has."""

    def __init__(self, algorithm: str = "ES256", roles: dict[str, str] | None = None) -> None:
        self.now = time.time()
        self.asked = Asked()
        self.issuer = Issuer(URL, algorithm)
        self.tokens = WebTokens(TokenRules(URL, AUDIENCE, ROLES if roles is None else roles), self._wall, self.asked)
        self.tokens.use(self.issuer.keys())

    def _wall(self) -> float:
        return self.now

    def identify(self, token: str | bytes) -> Identity | None:
        sent = token.encode() if isinstance(token, str) else token
        return self.tokens.identify(sent, sha256(sent).digest())

    def refusal(self, token: str) -> str:
        """Why a token does not count."""
        with pytest.raises(InvalidToken) as refused:
            self.identify(token)
        assert (refused.value.status, refused.value.code) == (401, "invalid_token")
        assert 'error="invalid_token"' in dict(refused.value.fields)["www-authenticate"]
        assert token not in str(refused.value)
        assert refused.value.__cause__ is None
        return str(refused.value).removeprefix("The token is not accepted: ").rstrip(".")


def told(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


# -- which count -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
def test_a_token_that_the_issuer_has_signed_counts(algorithm: str) -> None:
    rig = Rig(algorithm)
    found = rig.identify(rig.issuer.token(roles=["Ops"], name="Alice A."))
    assert found is not None
    assert (found.id, found.name, found.role) == ("jwt:alice", "Alice A.", Role.ADMIN)
    assert rig.asked.times == 0


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": int(time.time()) - 600}, "it has expired"),
        ({"exp": None}, "it must have the claims exp, iss and aud"),
        ({"exp": "soon"}, "it cannot be read"),
        ({"exp": float("nan")}, "it cannot be read"),
        ({"nbf": 10**400}, "it is not valid yet; do the clocks differ?"),
        ({"nbf": int(time.time()) + 600}, "it is not valid yet; do the clocks differ?"),
        ({"iat": int(time.time()) + 600}, "it is not valid yet; do the clocks differ?"),
        ({"iss": "https://other.example.com"}, "it is of another issuer than --jwt-issuer"),
        ({"iss": URL + "/"}, "it is of another issuer than --jwt-issuer"),
        ({"iss": None}, "it must have the claims exp, iss and aud"),
        ({"aud": "other"}, "it is for another audience than --jwt-audience"),
        ({"aud": ["other"]}, "it is for another audience than --jwt-audience"),
        ({"aud": []}, "it must have the claims exp, iss and aud"),
        ({"aud": None}, "it must have the claims exp, iss and aud"),
    ],
)
def test_what_a_token_says_must_be_right(claims: dict[str, Any], reason: str) -> None:
    rig = Rig()
    assert rig.refusal(rig.issuer.token(roles=["Ops"], **claims)) == reason


def test_a_time_that_no_clock_can_show_is_no_fault() -> None:
    """Reading it ended the connection without an answer."""
    rig = Rig()
    found = rig.identify(rig.issuer.token(exp=10**400))
    assert found is not None
    assert found.expires == math.inf


def test_clocks_may_differ_a_little() -> None:
    rig, now = Rig(), int(time.time())
    assert rig.identify(rig.issuer.token(exp=now - 5)) is not None
    assert rig.identify(rig.issuer.token(nbf=now + 5, aud=["else", AUDIENCE])) is not None


def test_nobody_else_can_sign() -> None:
    rig = Rig()
    assert rig.refusal(rig.issuer.token(private=key_of("ES256", 77))) == "its signature is wrong"
    good = rig.issuer.token(roles=["Dev"])
    head, _, signature = good.split(".")
    payload = {"iss": URL, "aud": AUDIENCE, "exp": int(time.time()) + 600, "roles": ["Ops"]}
    assert rig.refusal(f"{head}.{told(payload)}.{signature}") == "its signature is wrong"


def test_no_algorithm_but_those_of_the_key_counts() -> None:
    """`none`, a secret that is the public key's text, and another kind of key under the same name."""
    rig = Rig("RS256")
    payload = {"iss": URL, "aud": AUDIENCE, "exp": int(time.time()) + 600, "roles": ["Ops"]}
    unsigned = f"{told({'alg': 'none', 'kid': 'a'})}.{told(payload)}."
    assert rig.refusal(unsigned) == "its algorithm is not one of its key"
    public = rig.issuer.private.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = f"{told({'alg': 'HS256', 'kid': 'a'})}.{told(payload)}"
    mac = base64.urlsafe_b64encode(hmac.digest(pem, signed.encode(), "sha256")).rstrip(b"=").decode()
    assert rig.refusal(f"{signed}.{mac}") == "its algorithm is not one of its key"
    other = rig.issuer.token(private=key_of("ES256"), algorithm="ES256", roles=["Ops"])
    assert rig.refusal(other) == "its algorithm is not one of its key"


@pytest.mark.parametrize(
    "token", ["", "abc", "a.b", "a.b.c.d", "ä.b.c", "a b.c.d", "e30=.e30.e30", "x" * 20_000 + ".a.b"]
)
def test_what_has_not_the_form_of_a_token_is_none(token: str) -> None:
    assert Rig().identify(token.encode()) is None


@pytest.mark.parametrize("token", ["e30.e30.e30", "AAAA.e30.", "bnVsbA.bnVsbA.AAAA", "W10.e30.AAAA", "_.-._"])
def test_nonsense_in_the_form_of_a_token_is_refused(token: str) -> None:
    rig = Rig()
    assert rig.refusal(token) in ("it cannot be read", "its algorithm is not one of its key", "its signature is wrong")


def test_a_deeply_nested_token_is_refused() -> None:
    rig = Rig()
    rig.refusal(f"{base64.urlsafe_b64encode(b'[' * 6000).rstrip(b'=').decode()}.e30.AAAA")


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_new_key_of_the_issuer_counts_and_one_that_is_gone_does_not() -> None:
    rig = Rig()
    old = rig.issuer.token(roles=["Ops"])
    assert rig.identify(old) is not None
    rig.issuer.rotate("b")
    new = rig.issuer.token(roles=["Ops"])
    assert rig.refusal(new) == "its key is none of the issuer's"
    rig.asked.asks = True
    with pytest.raises(TokenKeysMissing) as later:
        rig.identify(new)
    assert (later.value.status, later.value.code, later.value.retry_after) == (503, "token_keys_unavailable", 1.0)
    assert rig.asked.times == 2
    assert rig.tokens.use(rig.issuer.keys()) == 2
    assert rig.identify(new) is not None
    assert rig.identify(old) is not None
    rig.issuer.rotate("c", keep=False)
    rig.tokens.use(rig.issuer.keys())
    rig.asked.asks = False
    assert rig.refusal(old) == "its key is none of the issuer's", "it was remembered, and is checked anew"


def test_a_key_of_the_same_name_replaces_the_one_before() -> None:
    rig = Rig()
    old = rig.issuer.token(roles=["Ops"])
    assert rig.identify(old) is not None
    rig.issuer.rotate("a", keep=False)
    rig.tokens.use(rig.issuer.keys())
    assert rig.refusal(old) == "its signature is wrong"


def test_a_token_without_the_name_of_its_key_needs_an_issuer_with_one_key() -> None:
    rig = Rig()
    token = rig.issuer.token(kid=None)
    assert rig.identify(token) is not None
    rig.issuer.rotate("b")
    rig.tokens.use(rig.issuer.keys())
    assert rig.refusal(rig.issuer.token(kid=None)) == "it does not name its key (kid)"


def test_before_there_are_keys_nobody_can_tell() -> None:
    tokens = WebTokens(TokenRules(URL, AUDIENCE, ROLES), time.time, Asked())
    token = Issuer(URL).token().encode()
    with pytest.raises(TokenKeysMissing):
        tokens.identify(token, sha256(token).digest())


def small() -> dict[str, Any]:
    return jwk_of(rsa.generate_private_key(public_exponent=65537, key_size=1024), "RS256", "small")


def test_entries_that_are_no_public_keys_for_signatures_are_left_out() -> None:
    issuer = Issuer(URL)
    entry = issuer.entries[0]
    private = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(issuer.private))
    useless: list[dict[str, Any]] = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
        {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"},
        {**entry, "kid": "enc", "use": "enc"},
        {**entry, "kid": "alg", "alg": "HS256"},
        {**entry, "kid": "alg", "alg": "RS256"},
        {**entry, "kid": "bad", "x": "AAAA"},
        {**entry, "kid": "bad", "x": 5},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "tiny"},
        {"kty": ["RSA"], "kid": "list"},
        {**private, "kid": "private"},
        small(),
        {},
    ]
    tokens = WebTokens(TokenRules(URL, AUDIENCE, ROLES), time.time, Asked())
    with pytest.raises(ValueError, match="no public key"):
        tokens.use(json.dumps({"keys": useless}).encode())
    assert tokens.use(json.dumps({"keys": [*useless, entry]}).encode()) == 1


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": [1]}', b"\xff", b"[" * 5000])
def test_what_is_no_document_of_keys_changes_nothing(document: bytes) -> None:
    rig = Rig()
    with pytest.raises(ValueError, match="no JWKS document"):
        rig.tokens.use(document)
    assert rig.identify(rig.issuer.token()) is not None


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_a_token_is_remembered_until_it_expires_and_not_longer() -> None:
    rig = Rig()
    token = rig.issuer.token(roles=["Ops"], exp=int(rig.now) + 10)
    first = rig.identify(token)
    assert rig.identify(token) is first
    rig.now += 100
    assert rig.identify(token) is not first, "it is checked anew: by PyJWT's own clock it is still valid"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_router.access.tokens._MOST_REMEMBERED", 3)
    rig = Rig()
    for number in range(6):
        rig.identify(rig.issuer.token(sub=str(number)))
    assert repr(rig.tokens) == f"<WebTokens of {URL}: 1 keys, 3 remembered>"


# -- roles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "role"),
    [
        ({}, Role.NONE),
        ({"roles": ["Other"]}, Role.NONE),
        ({"roles": ["admin"]}, Role.NONE),
        ({"roles": ["Dev", "Ops"]}, Role.ADMIN),
        ({"roles": "Dev"}, Role.USER),
        ({"role": "Ops"}, Role.ADMIN),
        ({"groups": ["Other", "Dev"]}, Role.USER),
        ({"group": "Ops"}, Role.ADMIN),
        ({"roles": ["Dev"], "groups": ["Ops"]}, Role.USER),
        ({"roles": ["Other"], "groups": ["Ops"]}, Role.ADMIN),
        ({"roles": {"Ops": 1}, "role": 5, "groups": [["Ops"], None, 7]}, Role.NONE),
    ],
)
def test_roles_are_found_in_the_usual_claims(claims: dict[str, Any], role: Role) -> None:
    rig = Rig()
    found = rig.identify(rig.issuer.token(**claims))
    assert found is not None
    assert found.role is role


def digest(subject: str) -> str:
    """What stands behind a name that another subject could have too: limits hang on it."""
    return "~" + sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"sub": "a\nb\u202ec", "name": "x\x00y"}, ("jwt:a?b?c" + digest("a\nb\u202ec"), "x?y")),
        ({"sub": "s" * 500, "email": "e@x"}, ("jwt:" + "s" * 100 + digest("s" * 500), "e@x")),
        ({"sub": "a?b~0"}, ("jwt:a?b~0" + digest("a?b~0"), "")),
        ({"sub": "\ud800"}, ("jwt:?" + digest("\ud800"), "")),
        ({"sub": None, "azp": "app", "name": 5}, ("jwt:app", "")),
        ({"sub": None}, ("jwt:", "")),
    ],
)
def test_names_are_fit_for_a_log_line(claims: dict[str, Any], expected: tuple[str, str]) -> None:
    rig = Rig()
    found = rig.identify(rig.issuer.token(**claims))
    assert found is not None
    assert (found.id, found.name) == expected


# -- beside keys -------------------------------------------------------------------------------------------------------

CLIENT, CONTROL = ClientKey("alice", "client-key"), ControlKey("ops", "Ops", "admin-key", "admin")


def verdicts(access: Access, token: str) -> list[str]:
    """What a token may do: inference, reading, changing."""
    found = []
    for kind in (AccessKind.INFERENCE, AccessKind.CONTROL_READ, AccessKind.CONTROL_CHANGE):
        try:
            found.append(access.check(kind, token.encode()).id)
        except AccessRefused as error:
            found.append(error.code)
    return found


def test_what_roles_may_do() -> None:
    rig = Rig()
    reader: TokenReader = rig.tokens
    admin, user, nobody = (rig.issuer.token(roles=[role]) for role in ("Ops", "Dev", "Other"))
    guarded = Access([CLIENT], [CONTROL], tokens=reader)
    assert verdicts(guarded, admin) == ["jwt:alice"] * 3
    assert verdicts(guarded, user) == ["jwt:alice", "jwt:alice", "forbidden"]
    assert verdicts(guarded, nobody) == ["forbidden"] * 3
    assert verdicts(guarded, "client-key") == ["alice", "forbidden", "forbidden"]
    assert verdicts(guarded, "admin-key") == ["forbidden", "ops", "ops"]
    assert verdicts(guarded, rig.issuer.token(aud="other")) == ["invalid_token"] * 3
    assert verdicts(guarded, "guess") == ["invalid_api_key"] * 3
    with pytest.raises(Forbidden, match="--jwt-role-mapping"):
        guarded.check(AccessKind.CONTROL_READ, nobody.encode())


def test_with_tokens_alone_the_control_plane_is_closed_and_inference_open() -> None:
    rig = Rig()
    access = Access(tokens=rig.tokens)
    assert access.guards_changes
    assert not access.consumes_key
    assert access.warnings("0.0.0.0") == []
    with pytest.raises(MissingKey):
        access.check(AccessKind.CONTROL_READ, None, True)
    with pytest.raises(Unauthorized):
        access.check(AccessKind.CONTROL_CHANGE, b"guess", True)
    assert access.check(AccessKind.INFERENCE, None).id == "anyone"
    assert verdicts(access, rig.issuer.token(roles=["Dev"])) == ["anyone", "jwt:alice", "forbidden"]


def test_who_it_was_also_when_it_was_refused() -> None:
    rig = Rig()
    access = Access(tokens=rig.tokens)
    assert access.identify(rig.issuer.token(roles=["Dev"]).encode()).id == "jwt:alice"
    for sent in (rig.issuer.token(aud="other").encode(), b"guess", b"", None):
        assert access.identify(sent).id == "anyone"


def test_a_token_for_this_router_reaches_no_worker() -> None:
    rig = Rig()
    withheld = Access(tokens=rig.tokens).withholds
    assert withheld is not None
    expired = rig.issuer.token(exp=1)
    for value in (f"Bearer {rig.issuer.token()}", f"token={expired}; a=b", expired):
        assert withheld(value.encode())
    for claims in ({"name": "\ud800"}, {"more": float("nan")}, {"aud": [AUDIENCE, "x"]}):
        token = rig.issuer.token(**claims)
        assert rig.identify(token) is not None, "it counts here"
        assert withheld(f"Bearer {token}".encode())
    others = (rig.issuer.token(aud="engine"), rig.issuer.token(iss="https://o"), "e30.bnVsbA.x", "e30.!.x", "sk-1")
    for value in others:
        assert not withheld(f"Bearer {value}".encode())
    beside_keys = Access([CLIENT], tokens=rig.tokens).withholds
    assert beside_keys is not None
    assert beside_keys(f"token={rig.issuer.token()}".encode())
    assert Access([CLIENT]).withholds is None
