"""Check each head before its body is read: what may not come, or nobody takes, is answered unread.

    admit = admission(access, routes)
    admit(request, has_body)      may set `request.refusal`: then the body is not read, and the connection ends

    a relayed request without a valid key                 the answer is 401
    a change of the control plane, likewise               401 or 403
    a large body that no endpoint takes                   what the request gets without it: 404, 405, or the answer
    a chunked body that no endpoint takes                 read as far as it is small; 413 if it is not

So a client cannot fill the memory with what nobody uses. A small body is read, so that its connection can go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from sglang_router.access.permissions import Access, AccessKind, credentials_of
from sglang_router.admin.routes import ROUTES
from sglang_router.errors import AccessRefused, PayloadTooLarge
from sglang_router.relay.budget import SMALL
from sglang_router.relay.routes import Routes
from sglang_router.wire.headers import UpgradeRequest
from sglang_router.wire.request import Request
from sglang_router.wire.upgrade import key_of

_PARAMETER: Final = re.compile(r"\{[^}]*\}")


def admission(access: Access, routes: Routes) -> Callable[[Request, bool], int | None]:
    """Return the check. It returns the most bytes of a body that are read; None: as many as of any other."""
    closed = access.consumes_key
    guarded = closed or access.guards_changes

    def admit(request: Request, has_body: bool) -> int | None:
        inference = routes.relays(request)
        if inference and not closed:
            return None
        nobody = has_body and not inference and not _takes_body(request)
        if nobody and _length(request) > SMALL:
            request.refusal = PayloadTooLarge("The body is too large for this endpoint.")
        elif closed if inference else guarded and has_body:
            kind = AccessKind.INFERENCE if inference else AccessKind.CONTROL_CHANGE
            try:
                credentials = credentials_of(request.headers)
                if credentials is None and isinstance(request, UpgradeRequest):
                    credentials = key_of(request.headers)
                request.client = access.check(kind, credentials, local=True).id
            except AccessRefused as error:
                request.refusal = error.with_traceback(None)  # its frames refer to the request: avoid a cycle
        return SMALL if nobody else None

    return admit


def _takers() -> re.Pattern[bytes]:
    """Return what matches `METHOD PATH` of the endpoints of the control plane that may take a body."""
    lines = []
    for row in (row for rows in ROUTES.values() for row in rows):
        path = ".+".join(re.escape(part) for part in _PARAMETER.split(row.path))
        lines += [f"{method} {path}" for method in row.methods if method != "GET"]
    return re.compile("|".join(lines).encode())


_TAKERS: Final = _takers()


def _length(request: Request) -> int:
    """Return the announced length of a body; 0 when it is chunked."""
    return next((int(value) for name, value in request.headers if name == b"content-length"), 0)


def _takes_body(request: Request) -> bool:
    """Return whether the endpoint may take a body."""
    return _TAKERS.fullmatch(b"%b %b" % (request.method, request.path)) is not None
