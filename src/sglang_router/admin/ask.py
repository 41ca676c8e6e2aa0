"""How handlers ask workers.

    reply = await ask(context, worker, b"GET", b"/health")
    failure(reply)      why it is not a 2xx answer, or None
    decoded(reply)      its JSON value
    passed_on(reply)    the same answer for the client

A worker that does not answer is no error here: the others are asked as well, and the handler decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from sglang_router.admin.context import Context
from sglang_router.routing.worker import Worker
from sglang_router.workers.fetch import Fetched, FetchError, fetch

T = TypeVar("T")

_BEGUN_AT_ONCE = 16
Reply = Fetched | FetchError
"""What came of asking a worker: an answer, or the reason why there is none."""


async def ask(
    context: Context,
    worker: Worker,
    method: bytes,
    target: bytes,
    *,
    body: bytes = b"",
    content_type: bytes = b"application/json",
    timeout: float | None = None,
) -> Reply:
    """Ask one worker, with its own key. A failure is returned, not raised, and makes the worker's next check due."""
    limit = context.timeouts.question if timeout is None else timeout
    try:
        return await fetch(
            context.pool, worker.target, method, target, body=body, content_type=content_type, timeout=limit
        )
    except FetchError as exc:
        if not worker.removed:
            context.checks.check_now(worker)
        return exc


async def get_from_all(context: Context, workers: Iterable[Worker], target: bytes) -> list[tuple[Worker, Reply]]:
    """Send a GET to several workers at the same time."""
    asked = tuple(workers)
    replies = await all_of(ask(context, worker, b"GET", target) for worker in asked)
    return list(zip(asked, replies, strict=True))


async def all_of(works: Iterable[Awaitable[T]]) -> list[T]:
    """Do all at the same time, but do not begin a thousand in one turn of the event loop; return their results."""
    tasks: list[asyncio.Future[T]] = []
    try:
        for work in works:
            tasks.append(asyncio.ensure_future(work))
            if not len(tasks) % _BEGUN_AT_ONCE:
                await asyncio.sleep(0)
        return list(await asyncio.gather(*tasks))
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        raise


def failure(reply: Reply) -> str | None:
    """Say in a few words why a reply is not a 2xx answer; None if it is one."""
    if isinstance(reply, FetchError):
        return str(reply)
    return None if reply.ok else f"HTTP {reply.status}"


def decoded(reply: Reply) -> Any:
    """The JSON value of a 2xx answer, else None."""
    if isinstance(reply, FetchError) or not reply.ok:
        return None
    try:
        return msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def passed_on(answer: Fetched) -> Response:
    """A worker's answer for the client: its status, body and content type, unchanged."""
    types = [value.decode("latin-1") for name, value in answer.headers if name == b"content-type"]
    headers = {"content-type": types[0]} if types else {}
    return Response(answer.body, answer.status, headers)
