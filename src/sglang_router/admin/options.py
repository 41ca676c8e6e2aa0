"""The configuration of the router: what is in effect, and reading it again.

GET  /config     all options, each with its origin
POST /reload     as SIGHUP, with the result as the answer: see `app.reload`
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.context import JSON, Context
from sglang_router.config.effective import effective
from sglang_router.errors import Conflict


async def index(context: Context, request: Request) -> Response:
    """Return the options in effect; secrets are hidden."""
    return JSON({"options": effective(context.args), "file": context.args.config})


async def reload(context: Context, request: Request) -> Response:
    """Read the configuration again. Raises: ConfigRefused, when nothing was changed; Conflict, while it stops."""
    if context.reload is None or context.ending:
        raise Conflict("The router is starting or stopping: it cannot read its configuration again now.")
    return JSON(context.reload("POST /reload"))
