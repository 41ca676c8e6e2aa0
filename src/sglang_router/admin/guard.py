"""The door of the control plane: who may ask a row's handler, and the audit log of changes.

    request --> Access.check(kind of the row, key, is the client local) --> handler --> answer
                   '-- 401, 403                                                           |
                        '------------------------- CONTROL_CHANGE: a line of the audit log '

A change is told whatever came of it, also if it was refused. The line says who, what and from where, and never a key:
queries and bodies hold keys of workers, so of those only the worker's URL is told.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.context import Context, error_response
from sglang_router.core.access import Identity, Kind, audit_line, credentials_of, is_local
from sglang_router.errors import AccessRefused, RouterError

if TYPE_CHECKING:
    from sglang_router.admin.context import Handler

log = logging.getLogger("sglang_router.audit")

_LEFT = "client_left"
_FAULT = "internal_error"


async def guarded(context: Context, kind: Kind, handler: Handler, request: Request) -> Response:
    """The answer of a handler, or the refusal to ask it."""
    fields = request.scope["headers"]
    credentials = credentials_of(fields)
    local = kind is Kind.CONTROL_CHANGE and is_local(request.state.peername, fields)
    try:
        who = context.access.check(kind, credentials, local)
    except AccessRefused as error:
        if kind is Kind.CONTROL_CHANGE:
            _tell(context.access.identify(credentials), request, error.status, error.code)
        return error_response(error)
    if kind is Kind.CONTROL_CHANGE:
        return await _audited(context, handler, request, who)
    return await handler(context, request)


async def _audited(context: Context, handler: Handler, request: Request, who: Identity) -> Response:
    status, code, made = 0, _LEFT, ""
    try:
        response = await handler(context, request)
        status, code = response.status_code, response.headers.get("x-smg-error-code", "")
        made = response.headers.get("location", "")
    except RouterError as error:
        status, code = error.status, error.code
        raise
    except Exception:  # a fault of the router, which others answer and log
        status, code = 500, _FAULT
        raise
    finally:  # also when the client leaves, which cancels this
        _tell(who, request, status, code, made)
    return response


def _tell(who: Identity, request: Request, status: int, code: str, made: str = "") -> None:
    """`made`: the path of what was made."""
    peer = request.client.host if request.client is not None else ""
    url = request.query_params.get("url", "")
    target = made or ("" if "@" in url else url)
    path = request.scope["raw_path"].decode("latin-1")
    message, fields = audit_line(who, request.method, path, peer, status, code, target)
    log.log(logging.INFO if status < 400 else logging.WARNING, message, extra={"fields": fields})
