"""Who may do what: a request's kind, its key and where it comes from, turned into an identity or a refusal.

    kind             --control-plane-api-keys        only --api-key           neither
    ---------------  ------------------------------  -----------------------  -----------------
    PUBLIC           everybody                       everybody                everybody
    INFERENCE        a client's key, if there are    a client's key           everybody
    CONTROL_READ     a control key                   a client's key           everybody
    CONTROL_CHANGE   a control key, role admin       a client's key, locally  locally

"Locally" means from this machine; --control-plane-open lifts that, and nothing else. See `is_local` for what it takes.

Keys are looked up by their SHA-256. How long that takes tells nothing of a key: the digest is made of all the bytes
that were sent; the dict compares a keyed hash of the digest before any of its bytes; and nobody can choose a digest, so
no guess can come nearer to the right one step by step. There is one lookup for all keys, found or not.
"""

from __future__ import annotations

import ipaddress
from enum import Enum, IntEnum
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from sglang_router.errors import AccessRefused, Forbidden, MissingKey, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_router.config.keys import ClientKey, ControlKey

    Headers = Iterable[tuple[bytes, bytes]]


class Kind(IntEnum):
    """What a request asks for, as far as access is concerned."""

    PUBLIC = 0
    INFERENCE = 1
    CONTROL_READ = 2
    CONTROL_CHANGE = 3


class Role(Enum):
    NONE = ""
    CLIENT = "client"
    USER = "user"
    ADMIN = "admin"


class Identity(msgspec.Struct, frozen=True, gc=False):
    """Who asks, for logs. Nothing in it is secret."""

    id: str
    name: str = ""
    role: Role = Role.NONE


ANYONE = Identity("anyone")
LOOPBACK = Identity("loopback")


# -- the decision ------------------------------------------------------------------------------------------------------

_NOT_FOR_IT = {
    Kind.INFERENCE: "This key is for the control plane; models are asked with one of the clients' keys.",
    Kind.CONTROL_READ: "This key is a client's; the control plane has keys of its own.",
    Kind.CONTROL_CHANGE: "A change needs a key of the control plane with the role admin.",
}
_NOT_LOCAL = (
    "Changes are taken from this machine only: give the router --control-plane-api-keys to make them from elsewhere,"
    " or --control-plane-open where nobody else reaches it."
)


class _Rule(msgspec.Struct, frozen=True):
    """`allowed` maps digests of keys to whose they are; None: no key is asked for."""

    allowed: dict[bytes, Identity] | None = None
    locally: bool = False


class Access:
    """The keys and what each is good for; never changed, so new keys mean a new object.

    open  changes come from anywhere although there are no control keys
    """

    def __init__(
        self, client_keys: Iterable[ClientKey] = (), control_keys: Iterable[ControlKey] = (), *, open: bool = False
    ) -> None:
        clients = {_digest(each.key): Identity(each.name, role=Role.CLIENT) for each in client_keys}
        control = {_digest(each.key): Identity(each.id, each.name, Role(each.role)) for each in control_keys}
        admins = {digest: identity for digest, identity in control.items() if identity.role is Role.ADMIN}
        inference = _Rule(clients or None)
        if control:
            read, change = _Rule(control), _Rule(admins)
        else:
            read, change = inference, _Rule(clients or None, locally=not open)
        self._rules = (_Rule(), inference, read, change)
        self._known = clients | control

    @property
    def consumes_key(self) -> bool:
        """Whether the key of an inference request is meant for the router, and must not reach a worker."""
        return self._rules[Kind.INFERENCE].allowed is not None

    def check(self, kind: Kind, credentials: bytes | None, local: bool = False) -> Identity:
        """Whoever asks, if they may.

        credentials  what `credentials_of` found
        local        what `is_local` said; looked at for changes only

        Raises: AccessRefused
        """
        rule = self._rules[kind]
        if rule.allowed is None:
            identity = LOOPBACK if local else ANYONE
        elif not credentials:
            raise MissingKey
        else:
            digest = sha256(credentials).digest()
            found = rule.allowed.get(digest)
            if found is None:
                raise self._refusal(kind, digest)
            identity = found
        if rule.locally and not local:
            raise Forbidden(_NOT_LOCAL)
        return identity

    def _refusal(self, kind: Kind, digest: bytes) -> AccessRefused:
        """A key that is good for something else is told so: its owner has it already."""
        return Forbidden(_NOT_FOR_IT[kind]) if digest in self._known else Unauthorized()

    def identify(self, credentials: bytes | None) -> Identity:
        """Whose key this is, whatever it is good for."""
        return self._known.get(sha256(credentials or b"").digest(), ANYONE)


def _digest(key: str) -> bytes:
    return sha256(key.encode("ascii")).digest()


def credentials_of(headers: Headers) -> bytes | None:
    """The key in a request's fields (names in lower case): a bearer token, else x-api-key, as some clients send it."""
    other = None
    for name, value in headers:
        if name == b"authorization":
            if value[:7].lower() == b"bearer ":
                return value[7:].strip()
        elif name == b"x-api-key" and other is None:
            other = value
    return other


# -- from where --------------------------------------------------------------------------------------------------------

_PASSED_ON = frozenset(
    (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip")
)
"""Fields a proxy adds. They are never believed, only taken as a sign that the peer speaks for somebody else."""


def is_local(peername: object, headers: Headers) -> bool:
    """Whether a request was made on this machine, by a program that is free to make it.

    peername  what getpeername() gave: an IP address in a tuple, the text of a Unix socket, None when not known

    Not so if a proxy passed it on, or if a browser sent it for a page from elsewhere: a page on the web can make any
    browser send requests to 127.0.0.1, and even make its own name point there.
    """
    fields = dict(headers)
    return is_loopback(peername) and _PASSED_ON.isdisjoint(fields) and not _of_foreign_page(fields)


def is_loopback(peername: object) -> bool:
    """Whether a peer is on this machine: 127.0.0.0/8 (also as ::ffff:127.0.0.1), ::1, any Unix socket.

    None is not: a client that resets its connection at once leaves no address, though its request is read.
    """
    if isinstance(peername, (str, bytes)):
        return True
    return isinstance(peername, tuple) and len(peername) >= 2 and _loopback_address(str(peername[0]))


def _loopback_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def _of_foreign_page(fields: dict[bytes, bytes]) -> bool:
    """Browsers mark what pages make them send. A page of the router's own is fine, if it was loaded from loopback."""
    origin, site = fields.get(b"origin"), fields.get(b"sec-fetch-site")
    if origin is None and site is None:
        return False
    host = fields.get(b"host", b"").decode("latin-1")
    same_origin = origin is None or origin.decode("latin-1").partition("://")[2] == host
    return not (same_origin and site in (None, b"none", b"same-origin") and _loopback_host(host))


def _loopback_host(authority: str) -> bool:
    try:
        name = urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _loopback_address(name)


# -- the audit log -----------------------------------------------------------------------------------------------------


def audit_line(
    who: Identity, method: str, path: str, peer: str, status: int, code: str = "", target: str = ""
) -> tuple[str, dict[str, object]]:
    """Message and fields of the log line for a change, or for the attempt.

        POST /workers/7f0c/drain 200 by=ops name="Service Account" role=admin peer=10.0.0.9

    `path` comes without its query: `POST /add_worker` has a key there. `target` is the worker, if that is not in the
    path.
    """
    fields: dict[str, object] = {"by": who.id, "name": who.name, "role": who.role.value}
    fields |= {"peer": peer, "target": target, "code": code}
    return f"{method} {path} {status}", {name: value for name, value in fields.items() if value}
