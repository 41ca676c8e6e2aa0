"""Who may do what: the kind of a request, its key and where it comes from give an identity, or an error.

    kind             --control-plane-api-keys        only --api-key           neither
    ---------------  ------------------------------  -----------------------  -----------------
    PUBLIC           everybody                       everybody                everybody
    INFERENCE        a client key, if there are any  a client key             everybody
    CONTROL_READ     a control key                   a client key             everybody
    CONTROL_CHANGE   a control key, role admin       a client key, locally    locally

"Locally" means from this machine; --control-plane-open lifts that, and nothing else. See `access.origins`.

Tokens of an identity provider (`access.tokens`) work beside the keys: the role admin is that of a control key, the role
user reads the control plane. Where clients need a key, a token with one of these roles is one as well. With tokens the
control plane needs a key or a token, as with --control-plane-api-keys.

Keys are looked up by their SHA-256. The time that takes tells nothing about a key: the digest is made of all bytes that
were sent; the dict compares a keyed hash of the digest before any of its bytes; and nobody can choose a digest, so no
guess can approach the right key step by step. There is one lookup for all keys, found or not.
"""

from __future__ import annotations

import math
import re
from base64 import b64decode
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, IntEnum
from hashlib import sha256
from types import MappingProxyType
from typing import Protocol

import msgspec

from sglang_router.access.origins import Headers, loopback_host
from sglang_router.config.keys import ClientKey, ControlKey, digest_of
from sglang_router.errors import AccessRefused, ExpiredKey, Forbidden, MissingKey, Unauthorized


class AccessKind(IntEnum):
    """What a request asks for, as far as access is concerned. The order is that of `Access._rules`."""

    PUBLIC = 0
    INFERENCE = 1
    CONTROL_READ = 2
    CONTROL_CHANGE = 3


class Role(Enum):
    """What a key permits."""

    NONE = ""
    CLIENT = "client"
    USER = "user"
    ADMIN = "admin"


class Identity(msgspec.Struct, frozen=True, gc=False):
    """Who sent a request, for logs. Nothing in it is secret.

    id       name of the client key, id of the control key, `jwt:` and the subject of a token, or one of the two below
    name     of the owner of a control key
    expires  when the key expires, in seconds since 1970; infinity: never
    """

    id: str
    name: str = ""
    role: Role = Role.NONE
    expires: float = math.inf


ANYONE = Identity("anyone")
LOOPBACK = Identity("loopback")


class TokenReader(Protocol):
    """Reads tokens of an identity provider, see `access.tokens`."""

    def identify(self, credentials: bytes, digest: bytes) -> Identity | None:
        """Return whose valid token this is; None when it looks like no token.

        digest  SHA-256 of the credentials

        Raises: AccessRefused, when it is not valid, or nobody can tell now.
        """

    def is_meant_for_us(self, credentials: bytes) -> bool:
        """Return whether this is a token for this router, valid or not."""


# -- the decision ------------------------------------------------------------------------------------------------------

_NOT_FOR_IT = {
    AccessKind.INFERENCE: "This key is for the control plane; inference needs a client key.",
    AccessKind.CONTROL_READ: "This is a client key; the control plane has keys of its own.",
    AccessKind.CONTROL_CHANGE: "A change needs a key of the control plane with the role admin.",
}
_NO_ROLE = "This token is valid, but has no role here: --jwt-role-mapping says which roles of the issuer count."
_NOT_LOCAL = (
    "Changes are accepted from this machine only: start the router with --control-plane-api-keys to make them from"
    " elsewhere, or with --control-plane-open where nobody else can reach it."
)


class _Rule(msgspec.Struct, frozen=True):
    """allowed: digests of keys and whose they are, None if no key is needed; locally: only from this machine."""

    allowed: dict[bytes, Identity] | None = None
    locally: bool = False


class Access:
    """The keys and what each allows.

    open    without control keys, changes are accepted from anywhere
    tokens  reads tokens of an identity provider; None: they are not accepted. Set it before `use`
    wall    returns seconds since 1970; without, no key expires
    """

    _rules: tuple[_Rule, ...]  # by kind; replaced as a whole, as `_known` is
    _known: dict[bytes, Identity]

    def __init__(
        self,
        client_keys: Iterable[ClientKey] = (),
        control_keys: Iterable[ControlKey] = (),
        *,
        open: bool = False,
        tokens: TokenReader | None = None,
        wall: Callable[[], float] | None = None,
    ) -> None:
        self._open = open
        self._tokens = tokens
        self._wall = wall or _long_ago
        self.use(client_keys, control_keys)

    def use(
        self,
        client_keys: Iterable[ClientKey],
        control_keys: Iterable[ControlKey],
        expires: Mapping[bytes, float] = MappingProxyType({}),
    ) -> None:
        """Let these keys count from now on, and no others. Requests that were let in before go on.

        expires  when keys expire that do: seconds since 1970, by their SHA-256
        """
        clients: dict[bytes, Identity] = {}
        for key in client_keys:
            digest = digest_of(key.key)
            clients[digest] = Identity(key.name, role=Role.CLIENT, expires=expires.get(digest, math.inf))
        control: dict[bytes, Identity] = {}
        for one in control_keys:
            digest = digest_of(one.key)
            control[digest] = Identity(one.id, one.name, Role(one.role), expires.get(digest, math.inf))
        admins = {digest: identity for digest, identity in control.items() if identity.role is Role.ADMIN}
        inference = _Rule(clients or None)
        if control or self._tokens is not None:
            read, change = _Rule(control), _Rule(admins)
        else:
            read, change = inference, _Rule(clients or None, locally=not self._open)
        self._rules = (_Rule(), inference, read, change)
        self._known = clients | control
        self._client_names = frozenset(identity.id for identity in clients.values())
        self._control = control

    def client_names(self) -> Collection[str]:
        """Return the names of the clients' keys."""
        return self._client_names

    @property
    def consumes_key(self) -> bool:
        """Whether the key of an inference request is meant for the router, so that it must not reach a worker."""
        return self._rules[AccessKind.INFERENCE].allowed is not None

    @property
    def guards_changes(self) -> bool:
        """Whether a change of the control plane needs a key."""
        return self._rules[AccessKind.CONTROL_CHANGE].allowed is not None

    def needs_key(self, kind: AccessKind) -> bool:
        """Return whether a request of this kind needs a key or a token."""
        return self._rules[kind].allowed is not None

    @property
    def withholds(self) -> Callable[[bytes], bool] | None:
        """Tells keys of the control plane, which must not reach a worker in any field; None when there are none."""
        return self.is_control_key if self._control or self._tokens is not None else None

    def is_control_key(self, value: bytes) -> bool:
        """Return whether a header field holds a key of the control plane or a token: alone, behind a scheme, in a list,
        as the value of a cookie, or as user name or password of Basic. Only the first words of a long value are looked
        at."""
        whole = value.strip()
        words = [whole, *_WORDS.split(whole, _MOST_WORDS)[:_MOST_WORDS]]
        if whole[:6].lower() == b"basic ":
            words += _of_basic(whole[6:])
        if any(sha256(word).digest() in self._control for word in words):
            return True
        return self._tokens is not None and any(map(self._tokens.is_meant_for_us, words))

    def warnings(self, host: str) -> list[str]:
        """Return what operators should know when the router listens on `host`, as far as the control plane goes."""
        if self._control or self._tokens is not None or loopback_host(f"[{host}]" if ":" in host else host):
            return []
        if self.consumes_key:
            may = "every client may read its control plane" + " and change its workers" * self._open
        elif self._open:
            may = "whoever reaches it may change its workers (--control-plane-open)"
        else:
            may = "whoever reaches it may read its control plane; changes are taken from this machine only"
        return [f"the router listens on {host} without --control-plane-api-keys: {may}"]

    def check(self, kind: AccessKind, credentials: bytes | None, local: bool = False) -> Identity:
        """Return who asks, if they may.

        credentials  what `credentials_of` found
        local        what `access.origins.is_local` said; it matters for changes only

        Raises: AccessRefused
        """
        rule = self._rules[kind]
        if rule.allowed is None:
            identity = LOOPBACK if local else ANYONE
        elif not credentials:
            raise MissingKey
        else:
            digest = sha256(credentials).digest()
            identity = rule.allowed.get(digest) or self._bearer(kind, credentials, digest)
            if identity.expires < math.inf and identity.expires <= self._wall():
                raise ExpiredKey
        if rule.locally and not local:
            raise Forbidden(_NOT_LOCAL)
        return identity

    def _bearer(self, kind: AccessKind, credentials: bytes, digest: bytes) -> Identity:
        """Return whose token this is, if it allows the request. Raises: AccessRefused."""
        found = None if self._tokens is None or digest in self._known else self._tokens.identify(credentials, digest)
        if found is None:
            raise self._refusal(kind, digest)
        if found.role is Role.NONE:
            raise Forbidden(_NO_ROLE)
        if kind is AccessKind.CONTROL_CHANGE and found.role is not Role.ADMIN:
            raise Forbidden(_NOT_FOR_IT[kind])
        return found

    def _refusal(self, kind: AccessKind, digest: bytes) -> AccessRefused:
        """Make the error. The owner of a key that allows something else is told so, for they have that key already."""
        return Forbidden(_NOT_FOR_IT[kind]) if digest in self._known else Unauthorized()

    def identify(self, credentials: bytes | None) -> Identity:
        """Return whose key or valid token this is, whatever it allows."""
        digest = sha256(credentials or b"").digest()
        found = self._known.get(digest)
        if found is None and credentials and self._tokens is not None:
            try:
                found = self._tokens.identify(credentials, digest)
            except AccessRefused:
                return ANYONE
        return found or ANYONE


def _long_ago() -> float:
    return -math.inf


_WORDS = re.compile(rb"[\s,;=]+")
_MOST_WORDS = 16


def _of_basic(text: bytes) -> list[bytes]:
    """Return user name and password of the scheme Basic (RFC 7617)."""
    try:
        return b64decode(text.strip()).split(b":", 1)
    except ValueError:
        return []


def credentials_of(headers: Headers) -> bytes | None:
    """Return the key in a request's header fields (names in lower case): a bearer token, else x-api-key."""
    other = None
    for name, value in headers:
        if name == b"authorization":
            if value[:7].lower() == b"bearer ":
                return value[7:].strip()
        elif name == b"x-api-key" and other is None:
            other = value
    return other


# -- the audit log -----------------------------------------------------------------------------------------------------


def audit_line(
    who: Identity, method: str, path: str, peer: str, status: int, code: str = "", target: str = ""
) -> tuple[str, dict[str, object]]:
    """Return message and fields of the log line for a change, or for an attempt that was refused.

        POST /workers/7f0c/drain 200 by=ops name="Service Account" role=admin peer=10.0.0.9

    `path` is without its query, because `POST /add_worker` has a key there. `target`: the worker, if the path does not
    name it.
    """
    fields: dict[str, object] = {"by": who.id, "name": who.name, "role": who.role.value}
    fields |= {"peer": peer, "target": target, "code": code}
    return f"{method} {path} {status}", {name: value for name, value in fields.items() if value}
