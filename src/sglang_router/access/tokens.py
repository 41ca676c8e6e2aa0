"""Tokens of an identity provider (JWT, RFC 7519; OpenID Connect): whose they are, and which role they have here.

    tokens.use(document)            the issuer's public keys (JWKS, RFC 7517), as `app.issuer` has fetched them
    tokens.identify(credentials)    the Identity of a valid token

A token counts when one of the issuer's keys has signed it with an algorithm of that key, and `iss`, `aud`, `exp`, and
`nbf` and `iat` where they are there, are right; clocks may differ by 30 s. The algorithm is never chosen by the token
alone: each key has those that fit its type, all of them asymmetric. So there is no `none`, and nobody can sign with a
public key as if it were a secret.

Its role is that of the first claim of `roles`, `role`, `groups` and `group` with a role that the mapping knows; `admin`
if it knows several. A token without such a role is valid, and may do nothing.

Valid tokens are remembered by their SHA-256, at most `_MOST_REMEMBERED` of them and until they expire, because a
signature takes longer to check than all else about a request. New keys of the issuer make all of them be checked anew.

PyJWT (the extra `jwt`) checks them. No message, log line or `repr` holds a token or a claim of one.
"""

from __future__ import annotations

import json
import math
import re
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jwt
import msgspec
from jwt.algorithms import has_crypto

from sglang_router.access.permissions import Identity, Role
from sglang_router.config.keys import name_of_subject, printable
from sglang_router.errors import InvalidToken, TokenKeysMissing

if not has_crypto:  # PyJWT can be imported without it, and then knows secrets only
    raise ImportError("cryptography is missing")

_LONGEST = 16384
"""Bytes of a token that is looked at."""
_MOST_KEYS = 100
_MOST_REMEMBERED = 4096
_LEEWAY = 30.0
_MOST_ROLES = 1000
_RSA_BITS = range(2048, 8193)
"""Sizes of RSA keys: smaller ones are not safe, larger ones take too long."""
_FORM = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_CLAIMS = ("roles", "role", "groups", "group")
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_ALGORITHMS = {
    ("RSA", None): _RSA,
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
"""What a key may sign with, by its type and curve."""
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet; do the clocks differ?"),
    (jwt.InvalidIssuedAtError, "its time of issue cannot be read"),
    (jwt.InvalidAudienceError, "it is for another audience than --jwt-audience"),
    (jwt.InvalidIssuerError, "it is of another issuer than --jwt-issuer"),
    (jwt.MissingRequiredClaimError, "it must have the claims exp, iss and aud"),
    (jwt.InvalidAlgorithmError, "its algorithm is not one of its key"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
)


class TokenRules(NamedTuple):
    """What a token must say. roles: what the issuer's roles are here, `admin` or `user`."""

    issuer: str
    audience: str
    roles: Mapping[str, str]


class _Key(NamedTuple):
    public: Any
    algorithms: Sequence[str]


class WebTokens:
    """See the module.

    rules   what a token must say
    wall    returns seconds since 1970
    wanted  called for a key that is not known; returns whether the issuer is being asked for its keys
    """

    def __init__(self, rules: TokenRules, wall: Callable[[], float], wanted: Callable[[], bool]) -> None:
        self._rules = rules
        self._wall = wall
        self._wanted = wanted
        self._keys: dict[str, _Key] = {}
        self._known: OrderedDict[bytes, Identity] = OrderedDict()  # valid tokens, by SHA-256

    def __repr__(self) -> str:
        return f"<WebTokens of {self._rules.issuer}: {len(self._keys)} keys, {len(self._known)} remembered>"

    # -- the issuer's keys ---------------------------------------------------------------------------------------------

    def use(self, document: bytes) -> int:
        """Let the keys of a JWKS document count from now on, and no others; return how many are of use.

        Raises: ValueError with a reason, when none is; then the keys before stay.
        """
        try:
            entries = msgspec.json.decode(document, type=_KeySet).keys
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise ValueError("this is no JWKS document") from None
        keys: dict[str, _Key] = {}
        for entry in entries[:_MOST_KEYS]:
            key = _key_of(entry)
            if key is not None:
                keys[str(entry.get("kid", ""))] = key
        if not keys:
            raise ValueError("the document holds no public key for signatures")
        if keys.keys() != self._keys.keys() or any(key != self._keys[kid] for kid, key in keys.items()):
            self._known.clear()
        self._keys = keys
        return len(keys)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def identify(self, credentials: bytes, digest: bytes) -> Identity | None:
        """Return whose valid token this is; None when it has not the form of one. digest: its SHA-256.

        Raises: InvalidToken (401); TokenKeysMissing (503), while the issuer is asked for the key.
        """
        known = self._known.get(digest)
        if known is not None:
            if known.expires > self._wall():
                return known
            del self._known[digest]
        if len(credentials) > _LONGEST or not _FORM.fullmatch(credentials):
            return None
        identity = self._identity(self._claims(credentials.decode("ascii")))
        self._known[digest] = identity
        if len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        return identity

    def is_meant_for_us(self, credentials: bytes) -> bool:
        """Return whether something is a token for this router, valid or not: nobody else may see it."""
        if len(credentials) > _LONGEST or not _FORM.fullmatch(credentials):
            return False
        payload = credentials.split(b".")[1]
        try:  # as PyJWT reads it: what counts for that must not look like something else here
            claims = json.loads(urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
        except (RecursionError, ValueError):
            return False
        if not isinstance(claims, dict):
            return False
        found = claims.get("aud")
        audience = found if isinstance(found, list) else [found]
        return claims.get("iss") == self._rules.issuer and self._rules.audience in audience

    def _claims(self, token: str) -> dict[str, Any]:
        key = self._key(token)
        try:
            return jwt.decode(
                token,
                key.public,
                algorithms=key.algorithms,
                issuer=self._rules.issuer,
                audience=self._rules.audience,
                leeway=_LEEWAY,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            reason = next((text for kind, text in _REASONS if isinstance(error, kind)), "it cannot be read")
            raise InvalidToken(reason) from None

    def _key(self, token: str) -> _Key:
        """Return the key that a token names, or the only one when it names none."""
        try:
            kid = jwt.get_unverified_header(token).get("kid")
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise InvalidToken("it cannot be read") from None
        keys = self._keys
        if kid is None and len(keys) == 1:
            return next(iter(keys.values()))
        key = keys.get(kid) if isinstance(kid, str) else None
        if key is not None:
            return key
        if self._wanted() or not keys:
            raise TokenKeysMissing(retry_after=1.0)
        raise InvalidToken("its key is none of the issuer's" if kid is not None else "it does not name its key (kid)")

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        subject = next((claims[name] for name in ("sub", "azp", "client_id") if isinstance(claims.get(name), str)), "")
        name = next((claims[each] for each in ("name", "preferred_username", "email") if claims.get(each)), "")
        shown = name if isinstance(name, str) else ""
        return Identity(name_of_subject(subject), printable(shown), self._role(claims), _end(claims))

    def _role(self, claims: Mapping[str, Any]) -> Role:
        roles = self._rules.roles
        for claim in _CLAIMS:
            value = claims.get(claim)
            names = value[:_MOST_ROLES] if isinstance(value, list) else [value]
            found = {roles[name] for name in names if isinstance(name, str) and name in roles}
            if found:
                return Role.ADMIN if Role.ADMIN.value in found else Role.USER
        return Role.NONE


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


def _end(claims: Mapping[str, Any]) -> float:
    """Return when a token that PyJWT found valid is not valid any more."""
    try:
        return float(claims["exp"]) + _LEEWAY
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _key_of(entry: Mapping[str, Any]) -> _Key | None:
    """Return a public key for signatures; None for any other entry."""
    kind, curve, named = entry.get("kty"), entry.get("crv"), entry.get("alg")
    if not isinstance(kind, str) or not isinstance(curve, str | None) or not isinstance(named, str | None):
        return None
    algorithms = _ALGORITHMS.get((kind, curve), ())
    if named is not None:
        algorithms = tuple(each for each in algorithms if each == named)
    if not algorithms or "d" in entry or entry.get("use", "sig") != "sig":
        return None
    try:
        public = jwt.PyJWK(dict(entry), algorithms[0]).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    return _Key(public, algorithms) if kind != "RSA" or public.key_size in _RSA_BITS else None
