"""Parse a name of --discovery-dns: where its workers are looked up, and what they are.

engines.llm.svc:8000                          A and AAAA records, each address a worker at port 8000
https://engines.example:8443                  the same, over TLS
_http._tcp.engines.llm.svc                    SRV records, each target and port a worker
prefill=prefill.llm.svc:8000                  workers with the role `prefill`
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sglang_router.errors import ConfigError

_FORM = re.compile(
    r"(?:(?P<role>[a-z]+)=)?(?:(?P<scheme>https?)://)?(?P<name>[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}))(?::(?P<port>[0-9]{1,5}))?"
)
_SERVICE = re.compile(r"_[^.]+\._(tcp|udp)\..+")
_ROLES = ("regular", "prefill", "decode")
_HIGHEST_PORT = 65535


class DNSName(NamedTuple):
    """A name to look up. port: of its workers; None: SRV records tell it."""

    text: str
    role: str
    scheme: str
    name: str
    port: int | None


def parse_dns_name(text: str) -> DNSName:
    """Return what a name means. Raises: ConfigError with one sentence that says what to write instead."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not NAME:PORT or the name of SRV records, as in _http._tcp.engines.local")
    role, scheme, name, port = match["role"] or "regular", match["scheme"] or "http", match["name"], match["port"]
    if role not in _ROLES:
        raise ConfigError(f"{text!r}: the role before = must be one of {', '.join(_ROLES)}")
    service = _SERVICE.fullmatch(name) is not None
    if service and port is not None:
        raise ConfigError(f"{text!r}: SRV records tell the port; remove :{port}")
    if not service and port is None:
        raise ConfigError(f"{text!r} needs a port, as in {text}:8000")
    if port is not None and not 1 <= int(port) <= _HIGHEST_PORT:
        raise ConfigError(f"{text!r}: the port must be from 1 to {_HIGHEST_PORT}")
    return DNSName(text, role, scheme, name.rstrip(".").lower(), None if port is None else int(port))
