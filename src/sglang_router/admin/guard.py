"""Access to the control plane, and the audit log of changes.

    request --> permitted: key, is the client local, a browser's page --> handler --> answer
                   '-- AccessRefused: 401, 403                                          |
                        '----------------------- CONTROL_CHANGE: a line of the audit log '

Every change is logged, also one that is refused or fails. The line says who, what and from where, but never a key:
queries and bodies contain keys of workers, so only the worker's URL is taken from them.
"""

from __future__ import annotations

import logging

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.origins import is_local, of_another_site
from sglang_router.access.permissions import (
    AccessKind,
    Identity,
    audit_line,
    credentials_of,
)
from sglang_router.admin.context import Context
from sglang_router.admin.rows import Handler
from sglang_router.errors import AccessRefused, Forbidden, HostNotAllowed, InternalError, RouterError

log = logging.getLogger("sglang_router.audit")

_ANOTHER_SITE = "This change comes from a web page that is not the router's own: such pages need a key."
_CONTROL = (AccessKind.CONTROL_READ, AccessKind.CONTROL_CHANGE)
_LEFT = "client_left"
"""The code of a change whose client closed the connection before the answer."""


async def guarded(context: Context, kind: AccessKind, handler: Handler, request: Request) -> Response:
    """Call a handler if the client may ask it.

    Raises: AccessRefused, and what the handler raises.
    """
    try:
        who = permitted(context, kind, request)
    except AccessRefused as error:
        if kind is AccessKind.CONTROL_CHANGE:
            credentials = credentials_of(request.scope["headers"])
            _log_change(context.access.identify(credentials), request, error.status, error.code)
        raise
    if kind is AccessKind.CONTROL_CHANGE:
        return await _audited(context, handler, request, who)
    return await handler(context, request)


def permitted(context: Context, kind: AccessKind, request: Request) -> Identity:
    """Return who asks, if they may. Where the control plane needs no key, a browser must ask by a name that is nobody
    else's, and for a change be sent by the router's own page.

    Raises: AccessRefused.
    """
    fields = request.scope["headers"]
    local = kind is AccessKind.CONTROL_CHANGE and is_local(request.state.peername, fields)
    who = context.access.check(kind, credentials_of(fields), local)
    if kind in _CONTROL and not context.access.needs_key(kind):
        if name := context.own_names.foreign(fields, request.scope["scheme"] == "https"):
            raise HostNotAllowed(name)
        if kind is AccessKind.CONTROL_CHANGE and of_another_site(fields):
            raise Forbidden(_ANOTHER_SITE)
    return who


async def _audited(context: Context, handler: Handler, request: Request, who: Identity) -> Response:
    status, code, location = 0, _LEFT, ""
    try:
        response = await handler(context, request)
        status, code, location = response.status_code, "", response.headers.get("location", "")
    except RouterError as error:
        status, code = error.status, error.code
        raise
    except Exception:  # a fault of the handler: `admin.exchange` logs it and answers
        status, code = InternalError.status, InternalError.code
        raise
    finally:  # also when the client leaves: that cancels this coroutine
        _log_change(who, request, status, code, location)
    return response


def _log_change(who: Identity, request: Request, status: int, code: str, location: str = "") -> None:
    """`location`: the path of what was created."""
    peer = request.client.host if request.client is not None else ""
    url = request.query_params.get("url", "")
    target = location or ("" if "@" in url else url)  # a URL may have a password before the @
    path = request.scope["raw_path"].decode("latin-1")
    message, fields = audit_line(who, request.method, path, peer, status, code, target)
    log.log(logging.INFO if status < 400 else logging.WARNING, message, extra={"fields": fields})
