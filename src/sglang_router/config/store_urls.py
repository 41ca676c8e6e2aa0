"""Parse the URL of a store, in which routers tell each other what they know (--shared-state).

    redis://[USER:PASSWORD@]HOST[:6379][/DATABASE]                          one server
    redis+sentinel://[USER:PASSWORD@]HOST[:26379],HOST/SERVICE[/DATABASE]   the one that Sentinels name
    redis+cluster://[USER:PASSWORD@]HOST[:6379],HOST                        a cluster

`valkey` may stand for `redis`, and `rediss` or `valkeys` ask for TLS. User and password are percent-encoded.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote

from sglang_router.config.urls import host_and_port

SINGLE: Final = ""
SENTINEL: Final = "sentinel"
CLUSTER: Final = "cluster"

_SCHEME: Final = re.compile(r"(redis|valkey)(?P<tls>s?)(?:\+(?P<kind>sentinel|cluster))?")
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")
_PORTS: Final = {SINGLE: 6379, SENTINEL: 26379, CLUSTER: 6379}
_FORMS: Final = {
    SINGLE: "redis://HOST:PORT/DATABASE",
    SENTINEL: "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DATABASE",
    CLUSTER: "redis+cluster://HOST:PORT,HOST:PORT",
}


class StoreURL(NamedTuple):
    """A URL of a store in its parts.

    kind      SINGLE, SENTINEL or CLUSTER
    tls       whether connections are encrypted
    hosts     hosts and ports: one; or those of the Sentinels; or of any nodes of the cluster
    user      None: the store's default user
    password  None: none
    service   what Sentinels call the server; "" for the other kinds
    database  the number of the database
    """

    kind: str
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    user: str | None = None
    password: str | None = None
    service: str = ""
    database: int = 0

    @property
    def shown(self) -> str:
        """The URL for logs and answers: without user and password."""
        scheme = f"redis{'s' * self.tls}{'+' * bool(self.kind)}{self.kind}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        path = f"/{self.service}" if self.service else ""
        return f"{scheme}://{hosts}{path}{f'/{self.database}' if self.database else ''}"


def parse_store_url(text: str) -> StoreURL:
    """Return the parts of the URL of a store.

    Raises: ValueError with a sentence that never shows a part of the URL: it may hold a password.
    """
    scheme, separator, rest = text.strip().partition("://")
    match = _SCHEME.fullmatch(scheme.lower())
    if match is None or not separator:
        raise ValueError(
            "the URL of the store must begin with redis://, rediss://, redis+sentinel:// or redis+cluster://"
        )
    kind = match["kind"] or SINGLE
    if not _VISIBLE.fullmatch(rest) or "?" in rest or "#" in rest:
        raise ValueError(
            f"the URL of the store must be {_FORMS[kind]}, without spaces, query and fragment;"
            " write special characters of a password as %xx"
        )
    credentials, at, where = rest.rpartition("@")
    user, colon, password = credentials.partition(":")
    if at and not colon:
        raise ValueError("the URL of the store has a user without a password: write USER:PASSWORD@, or :PASSWORD@")
    authority, _, path = where.partition("/")
    service, database = _path(kind, path)
    hosts = tuple(_host(each, kind) for each in authority.split(","))
    if kind == SINGLE and len(hosts) > 1:
        raise ValueError(f"several hosts need {_FORMS[SENTINEL]} or {_FORMS[CLUSTER]}")
    return StoreURL(
        kind, bool(match["tls"]), hosts, unquote(user) or None, unquote(password) or None, service, database
    )


def store_url(text: str) -> str:
    """Check the URL of a store; return it as it is. Raises: ValueError."""
    parse_store_url(text)
    return text


def _host(text: str, kind: str) -> tuple[str, int]:
    found = host_and_port(text.lower())
    if found is None:
        raise ValueError(f"a host of the store's URL cannot be read; it must be {_FORMS[kind]}")
    host, port = found
    return host, _PORTS[kind] if port is None else port


def _path(kind: str, path: str) -> tuple[str, int]:
    """Return service and database."""
    parts = path.rstrip("/").split("/") if path.rstrip("/") else []
    service = unquote(parts.pop(0)) if kind == SENTINEL and parts else ""
    if kind == SENTINEL and not service:
        raise ValueError(f"the URL of the store must name the service: {_FORMS[SENTINEL]}")
    number = parts.pop(0) if parts and kind != CLUSTER else "0"
    if parts or not (number.isascii() and number.isdecimal() and len(number) <= 5):
        raise ValueError(f"what follows the hosts cannot be read; the URL of the store must be {_FORMS[kind]}")
    return service, int(number)
