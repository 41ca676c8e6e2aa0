"""One request to one engine, for operators and trainers: any method, any path that is no generation.

    POST /engine/{id}/update_weights_from_disk        id: the worker's id, or its percent-encoded URL
    GET  /engine/http%3A%2F%2F10.0.0.1%3A8000/server_info

The answer is the engine's: status, type and body. Secrets in it are replaced, and one that cannot be searched for them
is not passed on: longer than 1 MiB, and JSON or text. Other types pass as they are, up to 64 MiB.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.redaction import MOST_BYTES, text_without_secrets
from sglang_router.admin.ask import passed_on
from sglang_router.admin.context import Context
from sglang_router.admin.orders import engine_path, give, order_of
from sglang_router.errors import WorkerBroken, WorkerInvalid, WorkerNotFound, WorkerTimeout, WorkerUnreachable
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.worker import Worker
from sglang_router.workers.fetch import MOST_ANSWER, Fetched, FetchError


async def relay(context: Context, request: Request) -> Response:
    """Pass a request on to the engine of one worker: /engine/{id}/{path}."""
    return await _relay(context, request, before=2)


async def relay_rl(context: Context, request: Request) -> Response:
    """The same under the name that other routers use: /v1/rl/workers/{id}/engine/{path}."""
    return await _relay(context, request, before=5)


async def _relay(context: Context, request: Request, before: int) -> Response:
    """before: names in the path before that of the engine."""
    worker = _named(context, request, 1 if before == 2 else 3)
    order = await order_of(context, request, engine_path(request, before))
    given = await give(context, worker, order, MOST_ANSWER)
    if isinstance(given.reply, FetchError):
        _fail(given.reply)
    return await _answer(context, given.reply)


def _fail(failure: FetchError) -> NoReturn:
    """Raise the error that says why there is no answer."""
    if failure.outcome is Outcome.TIMEOUT:
        raise WorkerTimeout(str(failure))
    if failure.outcome is Outcome.INVALID:
        raise WorkerInvalid(str(failure))
    if failure.outcome in (Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNCONNECTED):
        raise WorkerUnreachable(str(failure))
    raise WorkerBroken(str(failure))


def _named(context: Context, request: Request, at: int) -> Worker:
    """Return the worker that a name in the path means. The path is read as it came: a URL has slashes, encoded."""
    raw: bytes = request.scope["raw_path"]
    name = unquote(raw.split(b"/")[at + 1].decode("latin-1")).rstrip("/")
    engines = context.fleet.entries(name)
    worker = context.fleet.by_id(name) or context.fleet.by_url(name) or (engines[0] if engines else None)
    if worker is None:
        raise WorkerNotFound(f"Worker {name[:256]} not found; a URL must be percent-encoded")
    return worker


async def _answer(context: Context, answer: Fetched) -> Response:
    kind = next((value for name, value in answer.headers if name == b"content-type"), b"").lower()
    if b"json" in kind or not kind:
        return await passed_on(context, answer)
    body = answer.body
    if kind.startswith(b"text/"):
        if len(body) > MOST_BYTES:
            raise WorkerInvalid(f"The worker's answer is longer than {MOST_BYTES} bytes, so it is not passed on.")
        text = await asyncio.to_thread(_searched, body.decode("utf-8", "replace"), context.keys())
        body = text.encode("utf-8", "replace")
    return Response(body, answer.status, {"content-type": kind.decode("latin-1")})


def _searched(text: str, keys: set[str]) -> str:
    """Return a text without secrets; line by line, as a long one with a hint of a secret is replaced as a whole."""
    return "".join(text_without_secrets(line, keys) for line in text.splitlines(keepends=True))
