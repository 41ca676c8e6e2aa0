"""Parse where a target listens, and write the start of each request head to it.

    origin_of("https://engine:8443/base", 2) --> Origin: host, port, TLS?, path prefix, fields of every head
    origin.start(b"POST", b"/generate")      --> b"POST /base/generate HTTP/1.1\\r\\nhost: engine:8443\\r\\n..."

The starts are cached, because a router sends the same few again and again.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

_ADDRESS: Final = re.compile(r"[0-9.]+|[0-9a-f.]*:[0-9a-f:.]*")
_THIS_MACHINE: Final = {"localhost", "127.0.0.1", "::1"}
_MAX_STARTS: Final = 256
"""Most starts cached per origin. Clients choose the paths, so there must be a limit."""
_LONGEST_KEY: Final = 256
"""Bytes of method and path up to which a start is cached."""


class Origin:
    """Where a target listens.

    is_name  `host` is a name to look up, not an address
    place    where it is, with one name for this machine: origins with the same place are one server under two URLs
    secure   requests go over TLS
    prefix   path of the base URL; it precedes the path of each request
    fields   header lines of every request: the host, and the data-parallel rank if the target is one
    """

    __slots__ = ("_starts", "fields", "host", "is_name", "place", "port", "prefix", "secure")

    def __init__(self, host: str, port: int, secure: bool, prefix: bytes, fields: bytes) -> None:
        self.host = host
        self.is_name = _ADDRESS.fullmatch(host) is None
        self.port = port
        self.place = ("localhost" if host in _THIS_MACHINE else host, port, prefix)
        self.secure = secure
        self.prefix = prefix
        self.fields = fields
        self._starts: dict[bytes, bytes] = {}

    def start(self, method: bytes, path: bytes) -> bytes:
        """Return the request line and `fields`. `path` may have a query; only starts without one are cached."""
        key = method + path
        start = self._starts.get(key)
        if start is None:
            start = b"%s %s%s HTTP/1.1\r\n%s" % (method, self.prefix, path, self.fields)
            if b"?" not in path and len(key) <= _LONGEST_KEY and len(self._starts) < _MAX_STARTS:
                self._starts[key] = start
        return start

    def __repr__(self) -> str:
        scheme = "https" if self.secure else "http"
        return f"<Origin {scheme}://{self.host}:{self.port}{self.prefix.decode()}>"


def origin_of(url: str, rank: int | None = None) -> Origin:
    """Split a base URL that `config.parse_worker_url` has checked.

    vLLM reads the data-parallel rank from a header; SGLang reads it there or in the body, where the leg's splice puts
    it (`routing.plan.PlannedLeg`).
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    fields = b"host: %s\r\n" % parts.netloc.encode()
    if rank is not None:
        fields += b"x-data-parallel-rank: %d\r\n" % rank
    port = parts.port or (443 if secure else 80)
    return Origin(parts.hostname or "", port, secure, parts.path.rstrip("/").encode(), fields)
