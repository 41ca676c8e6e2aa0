"""The page for operators, and what it is fed with.

    GET /           a browser (Accept: text/html) gets the page; a program gets the name of the router, and links
    GET /overview   everything that the page shows, in JSON; as a stream for Accept: text/event-stream

The page is one file of the package, static/page.html, with its style and script in it. It contains no figure, so it is
for everybody; the figures are for those who may read the control plane. A key is typed into the page, is kept in the
browser's sessionStorage, and goes in the Authorization header: never in a URL or a cookie. As EventSource cannot send
that header, the page reads the stream with fetch.

The Content-Security-Policy allows this one script and this one style, by their hashes, and requests to the router.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang_router.access.permissions import AccessKind
from sglang_router.admin.context import JSON, Context
from sglang_router.admin.guard import permitted
from sglang_router.admin.live import Live
from sglang_router.errors import AccessRefused
from sglang_router.version import __version__

PATH = "/"
_LINKS = {
    "page": PATH,
    "overview": "/overview",
    "health": "/health",
    "readiness": "/readiness",
    "models": "/v1/models",
    "workers": "/workers",
    "decisions": "/decisions",
    "metrics": "/metrics",
    "openapi": "/openapi.json",
}
_STREAM = "text/event-stream"
_FRESH = {"cache-control": "no-store", "vary": "accept, authorization"}


async def home(context: Context, request: Request) -> Response:
    """Answer with the page, or say what this is."""
    if "text/html" in request.headers.get("accept", ""):
        page, policy = _page()
        fields = _FRESH | _PROTECTED | {"content-security-policy": policy}
        return Response(page, media_type="text/html", headers=fields)
    told: dict[str, Any] = {"name": "sglang-router", "links": _LINKS}
    if _may(context, AccessKind.CONTROL_READ, request) == "":
        told["version"] = __version__
    return JSON(told, headers=_FRESH)


async def overview(context: Context, request: Request) -> Response:
    """Answer with what the page shows, once or as a stream."""
    context.live.admit()
    if _STREAM not in request.headers.get("accept", ""):
        context.live.enter()
        try:
            _, frame = await context.live.next(0)
        finally:
            context.live.leave()
        return Response(frame, media_type="application/json", headers=_FRESH)
    return LiveStream(
        context.live,
        lambda: _may(context, AccessKind.CONTROL_READ, request) == "",
        lambda: _hello(_may(context, AccessKind.CONTROL_CHANGE, request)),
    )


def _hello(refusal: str) -> bytes:
    """Return the event that says whether the client may change something, or why not."""
    return b"event: hello\ndata: %b\n\n" % msgspec.json.encode({"changes": not refusal, "why": refusal})


class LiveStream(Response):
    """Frames until the client leaves, the router ends, or the key does not count any more.

    may_look  returns whether the client may see the next frame: keys expire, and are taken away while a stream lasts
    hello     returns the event that is sent first, and again when it has changed
    """

    media_type = _STREAM

    def __init__(self, live: Live, may_look: Callable[[], bool], hello: Callable[[], bytes]) -> None:
        super().__init__(headers=_FRESH)
        del self.headers["content-length"]
        self._live = live
        self._may_look = may_look
        self._hello = hello

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        live, seen, said = self._live, 0, self._hello()
        live.enter()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            more = scope["method"] != "HEAD"
            await send({"type": "http.response.body", "body": said, "more_body": more})
            while more:
                seen, frame = await live.next(seen)
                if not self._may_look():
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    return
                before, said = said, self._hello()
                news = said if said != before else b""
                more = not live.ending
                body = b"%bdata: %b\n\n" % (news, frame)
                await send({"type": "http.response.body", "body": body, "more_body": more})
        finally:
            live.leave()


def _may(context: Context, kind: AccessKind, request: Request) -> str:
    """Return why a client may not ask for this kind; "" if it may."""
    try:
        permitted(context, kind, request)
    except AccessRefused as error:
        return str(error)
    return ""


# -- the page ----------------------------------------------------------------------------------------------------------

_PROTECTED = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_INLINE = re.compile(rb"<(script|style)[^>]*>(.*?)</\1>", re.DOTALL)


@cache
def _page() -> tuple[bytes, str]:
    """Read the page; return it with its Content-Security-Policy."""
    page = (files("sglang_router.admin") / "static" / "page.html").read_bytes()
    hashes: dict[bytes, list[str]] = {b"script": [], b"style": []}
    for kind, text in _INLINE.findall(page):
        hashes[kind].append(f"'sha256-{b64encode(sha256(text).digest()).decode()}'")
    return page, "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes[b'script'])}",
            f"style-src {' '.join(hashes[b'style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
