"""Cross-origin requests: decide which web pages may read the router's answers (fetch.spec.whatwg.org, "CORS protocol").

    browser                                                   router
    OPTIONS /v1/..   Origin, Access-Control-Request-Method -> preflight(): answered here, without a key
    POST /v1/..      Origin                                -> the request; fields() go into its answer, errors too

CORS only controls what a browser lets a page read; it does not protect the router, keys do. A page of another origin
still gets its answer, but without these fields, so its browser does not show the answer to the page.

Without --cors-allowed-origins there is no `Cors`, and the CORS fields of the workers' answers are passed on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sglang_router.wire.request import Headers, Request

_METHODS: Final = b"GET, POST, OPTIONS"
_FIELDS: Final = b"authorization, content-type"
"""Request header fields that are allowed when the preflight names none."""
_EXPOSED: Final = b"access-control-expose-headers: x-request-id, x-sglang-router-decision, x-sglang-router-worker\r\n"
"""The fields of answers that pages may read."""
_HOLDS_FOR: Final = b"3600"
"""Seconds for which a browser may cache the answer to a preflight."""


class Cors:
    """The origins whose pages may read answers, written as browsers send them; `*` allows all."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._anyone = b"*" in self._origins

    def fields(self, headers: Headers) -> bytes:
        """Return the CORS fields of an answer to a request with these headers, each with its CRLF."""
        allowed = self._allowed(headers)
        lines = [] if self._anyone else [b"vary: origin\r\n"]
        if allowed:
            lines += (b"access-control-allow-origin: ", allowed, b"\r\n")
            lines.append(_EXPOSED)
        return b"".join(lines)

    def allows(self, headers: Headers) -> bool:
        """Return whether the page that makes a request with these headers may read the answer."""
        return self._allowed(headers) != b""

    def preflight(self, request: Request) -> list[tuple[bytes, bytes]] | None:
        """Return the fields of the answer (200, no body) to a preflight request; None for any other request."""
        if request.method != b"OPTIONS":
            return None
        asked = {name: value for name, value in request.headers if name.startswith(b"access-control-request-")}
        if b"access-control-request-method" not in asked:
            return None
        fields = [(b"vary", b"origin, access-control-request-method, access-control-request-headers")]
        allowed = self._allowed(request.headers)
        if allowed:
            fields += (
                (b"access-control-allow-origin", allowed),
                (b"access-control-allow-methods", _METHODS),
                (b"access-control-allow-headers", asked.get(b"access-control-request-headers") or _FIELDS),
                (b"access-control-max-age", _HOLDS_FOR),
            )
        return fields

    def _allowed(self, headers: Headers) -> bytes:
        """Return the value of Access-Control-Allow-Origin; b"" when the origin is not allowed."""
        if self._anyone:
            return b"*"
        origin = next((value for name, value in headers if name == b"origin"), b"")
        return origin if origin in self._origins else b""
