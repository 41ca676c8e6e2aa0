"""Cross-origin requests: which web pages may read the router's answers (fetch.spec.whatwg.org, "CORS protocol").

    browser                                                   router
    OPTIONS /v1/..   Origin, Access-Control-Request-Method -> preflight(): answered here, without a key
    POST /v1/..      Origin                                -> the request; fields() go into its answer, errors too

Only what a browser lets a page read depends on this: it keeps nobody out, that is what keys are for. So a page
elsewhere gets its answer without the fields, and its browser keeps the answer from it.

Without --cors-allowed-origins there is no `Cors`, and answers of workers keep what they say themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_router.wire.headers import answer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_router.wire.request import Headers, Request

_METHODS = b"GET, POST, OPTIONS"
_FIELDS = b"authorization, content-type"
"""What a page may send if it does not say what it wants to."""
_HOLDS_FOR = b"3600"
"""Seconds for which a browser need not ask again."""


class Cors:
    """The origins whose pages may read answers, in the form browsers send them; `*` stands for all."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._anyone = b"*" in self._origins

    def fields(self, headers: Headers) -> bytes:
        """The fields of an answer to a request with these headers, each with its CRLF."""
        allowed = self._allowed(headers)
        lines = [] if self._anyone else [b"vary: origin\r\n"]
        if allowed:
            lines += (b"access-control-allow-origin: ", allowed, b"\r\n")
            lines.append(b"access-control-expose-headers: x-request-id\r\n")
        return b"".join(lines)

    def preflight(self, request: Request, request_id: bytes, connection: bytes) -> bytes | None:
        """The whole answer to a browser's question whether a page may send a request; None for anything else."""
        if request.method != b"OPTIONS":
            return None
        asked = {name: value for name, value in request.headers if name.startswith(b"access-control-request-")}
        if b"access-control-request-method" not in asked:
            return None
        extra = [
            (b"x-request-id", request_id),
            (b"vary", b"origin, access-control-request-method, access-control-request-headers"),
        ]
        allowed = self._allowed(request.headers)
        if allowed:
            extra += (
                (b"access-control-allow-origin", allowed),
                (b"access-control-allow-methods", _METHODS),
                (b"access-control-allow-headers", asked.get(b"access-control-request-headers") or _FIELDS),
                (b"access-control-max-age", _HOLDS_FOR),
            )
        return answer(200, b"", extra=extra, connection=connection)

    def _allowed(self, headers: Headers) -> bytes:
        """What the answer's field says, or nothing."""
        if self._anyone:
            return b"*"
        origin = next((value for name, value in headers if name == b"origin"), b"")
        return origin if origin in self._origins else b""
