"""Parse the base URL of a worker. Options, the control plane and discovery all use this function.

    http://Host:8000/base/   ->   http://host:8000/base

Workers are identified by the normal form: scheme and host in lower case, no slash at the end. The parser refuses
credentials (they would appear in logs and metrics), a query or fragment (the router appends paths), and everything
that two parsers could read differently.
"""

from __future__ import annotations

import ipaddress
import re

from sglang_router.errors import ConfigError

_ALLOWED = re.compile(r"[\x21-\x7e]+")
_CREDENTIALS = re.compile(r"(^|//)[^/]*(@)|(?<=\?).+", re.DOTALL)
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?")
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]*)(:(?P<port>[0-9]+))?")


def parse_worker_url(text: str) -> str:
    """Return the normal form of a worker's base URL.

    Raises: ConfigError with one sentence that says what to write instead. It never shows credentials.
    """
    text = text.strip()
    shown = repr(_CREDENTIALS.sub(lambda found: f"{found[1] or ''}***{found[2] or ''}", text))
    if not _ALLOWED.fullmatch(text) or any(character in text for character in '\\"<>^`{|}'):
        raise ConfigError(f"worker URL {shown} contains spaces or characters that are not allowed in a URL")
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme == "grpc" and separator:
        raise ConfigError(f"worker URL {shown}: only HTTP workers are supported; start the engine with HTTP")
    if scheme not in ("http", "https") or not separator:
        hint = "" if separator or "@" in text else f"; try http://{text.lstrip('/')}"
        raise ConfigError(f"worker URL {shown} must begin with http:// or https://{hint}")
    authority, slash, base = rest.partition("/")
    if "@" in authority:
        raise ConfigError(f"worker URL {shown} must not hold credentials; give the key with --worker-api-key")
    if "?" in text or "#" in text:
        raise ConfigError(f"worker URL {shown} must not have a query or a fragment")
    return f"{scheme}://{_authority(authority.lower(), shown)}{slash}{base}".rstrip("/")


def _authority(authority: str, shown: str) -> str:
    """Check host and port."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        hint = "; put an IPv6 address in brackets" if authority.count(":") > 1 else ""
        raise ConfigError(f"worker URL {shown}: host and port cannot be read{hint}")
    host, port = match["host"], match["port"]
    if not _is_host(host):
        raise ConfigError(f"worker URL {shown} has no valid host")
    if port is not None and not _is_port(port):
        raise ConfigError(f"worker URL {shown}: the port must be from 1 to 65535")
    return authority


def host_and_port(authority: str) -> tuple[str, int | None] | None:
    """Return host (an IPv6 address without its brackets) and port, if any, of HOST:PORT in lower case; None: it is
    neither a name nor an address, or the port is none."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or not _is_host(match["host"]) or not (match["port"] is None or _is_port(match["port"])):
        return None
    return match["host"].strip("[]"), None if match["port"] is None else int(match["port"])


def _is_host(host: str) -> bool:
    return _is_ip6(host[1:-1]) if host.startswith("[") else _HOST_NAME.fullmatch(host) is not None


def _is_port(port: str) -> bool:
    return len(port) <= 5 and 1 <= int(port) <= 65535


def _is_ip6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6 and "%" not in text
    except ValueError:
        return False
