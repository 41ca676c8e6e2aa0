"""An identity provider for tests: keys made on the spot, tokens signed with them, and documents that name the keys.

issuer = Issuer(url)
issuer.rotate("b")                          signs with another key from now on; `keep=False`: and forgets the others
issuer.token(roles=["admin"])               claims that are not given are those of a valid token; None leaves one out
issuer.documents()                          what it answers, by path: discovery and JWKS documents
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "router"
JSON = {"content-type": "application/json"}
DISCOVERY = "/.well-known/openid-configuration"
KEYS = "/keys"

_MADE: dict[str, Any] = {}


def key_of(algorithm: str, number: int = 0) -> Any:
    """Return a private key; making one of RSA takes a while, so it is made once."""
    name = f"{algorithm} {number}"
    if name not in _MADE:
        if algorithm == "RS256":
            _MADE[name] = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        elif algorithm == "ES256":
            _MADE[name] = ec.generate_private_key(ec.SECP256R1())
        else:
            _MADE[name] = ed25519.Ed25519PrivateKey.generate()
    return _MADE[name]


_WRITERS: Mapping[str, Any] = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}


def jwk_of(private: Any, algorithm: str, kid: str | None, **fields: Any) -> dict[str, Any]:
    """Return the public key as an entry of a JWKS document."""
    entry = json.loads(_WRITERS[algorithm].to_jwk(private.public_key()))
    return {**entry, **({} if kid is None else {"kid": kid}), **fields}


class Issuer:
    """See the module. url: what it is called."""

    def __init__(self, url: str, algorithm: str = "ES256") -> None:
        self.url = url
        self.entries: list[dict[str, Any]] = []
        self.algorithm = algorithm
        self._number = 0
        self.rotate("a")

    def rotate(self, kid: str, keep: bool = True) -> None:
        self.kid = kid
        self.private = key_of(self.algorithm, self._number)
        self._number += 1
        self.entries = [*(self.entries if keep else ()), jwk_of(self.private, self.algorithm, kid, use="sig")]

    def token(self, private: Any = None, algorithm: str | None = None, kid: str | None = "", **claims: Any) -> str:
        now = int(time.time())
        whole = {"iss": self.url, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 600, **claims}
        whole = {name: value for name, value in whole.items() if value is not None}
        header = {} if kid is None else {"kid": kid or self.kid}
        return jwt.encode(whole, private or self.private, algorithm or self.algorithm, headers=header)

    def keys(self) -> bytes:
        return json.dumps({"keys": self.entries}).encode()

    def documents(self) -> dict[str, tuple[int, Mapping[str, str], bytes]]:
        discovery = json.dumps({"issuer": self.url, "jwks_uri": self.url + KEYS, "more": 1}).encode()
        return {DISCOVERY: (200, JSON, discovery), KEYS: (200, JSON, self.keys())}
