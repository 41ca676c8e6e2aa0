"""The router's errors for what llhttp refuses."""

from __future__ import annotations

import httptools

from sglang_router.errors import BadHTTP, RouterError, VersionNotSupported


def verdict(exc: httptools.HttpParserError) -> RouterError:
    """Return the router's error for one of llhttp's."""
    text = str(exc)
    if "PRI" in text or "HTTP version" in text:
        return VersionNotSupported()
    if isinstance(exc, httptools.HttpParserInvalidMethodError):
        return BadHTTP("The request line does not begin with a method.")
    return BadHTTP(f"This is not a well-formed HTTP/1.1 request: {text}.")
