"""How handlers ask workers.

    reply = await ask(context, worker, b"GET", b"/health")
    failure(reply)      why it is not a 2xx answer, or None
    unauthorized(reply) whether the engine wants another key
    decoded(reply)      its JSON value
    await passed_on(context, reply)     the same answer for the client, without secrets

Each worker is asked with its own key. One without a key gets the client's Authorization where inference would pass it
on, too: so engines that check the keys of their users answer these users here as well.

A worker that does not answer is no error here: the others are asked as well, and the handler decides.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Collection, Iterable
from typing import Any, TypeVar

from starlette.responses import Response

from sglang_router.access.redaction import MOST_BYTES, without_secrets
from sglang_router.admin.context import JSON, Context
from sglang_router.errors import WorkerInvalid
from sglang_router.routing.worker import Worker
from sglang_router.wire.gathering import Body
from sglang_router.workers.fetch import MOST_ANSWER, Fetched, FetchError, Sent, fetch

_PLAIN = Sent()
_SHORT = 1 << 15
"""Bytes of an answer that are searched for secrets at once."""

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
    body: Body = b"",
    sent: Sent = _PLAIN,
    timeout: float | None = None,
    max_bytes: int = MOST_ANSWER,
) -> Reply:
    """Ask one worker. A failure is returned, not raised, and makes the worker's next check due."""
    limit = context.timeouts.question if timeout is None else timeout
    try:
        return await fetch(
            context.pool,
            worker.target,
            method,
            target,
            body=body,
            sent=sent,
            timeout=limit,
            max_bytes=max_bytes,
        )
    except FetchError as exc:
        if not worker.removed:
            context.checks.check_now(worker)
        return exc


async def get_from_all(
    context: Context, workers: Iterable[Worker], target: bytes, sent: Sent = _PLAIN
) -> list[tuple[Worker, Reply]]:
    """Send a GET to several workers at the same time."""
    asked = tuple(workers)
    replies = await all_of(ask(context, worker, b"GET", target, sent=sent) for worker in asked)
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
    """The JSON value of a 2xx answer, else None. It is read as tolerantly as without_secrets does, and as bounded."""
    if isinstance(reply, FetchError) or not reply.ok or len(reply.body) > MOST_BYTES:
        return None
    try:
        return json.loads(reply.body)
    except (ValueError, RecursionError):
        return None


def unauthorized(reply: Reply) -> bool:
    """Whether an engine wants another key: its answer says more than any error of the router."""
    return isinstance(reply, Fetched) and reply.status in (401, 403)


async def passed_on(context: Context, answer: Fetched) -> Response:
    """A worker's answer for the client: its status, content type and body without secrets.

    Raises: WorkerInvalid, when the body of a 2xx answer cannot be searched for secrets. Of another answer the status
    is passed on.
    """
    try:
        body = await _searched(answer.body, context.keys())
    except WorkerInvalid as error:
        if answer.ok:
            raise
        return JSON({"error": {"message": f"The worker answered {answer.status}.", "code": error.code}}, answer.status)
    kept = (b"content-type", b"www-authenticate")
    fields = {name.decode(): value.decode("latin-1") for name, value in answer.headers if name in kept}
    return Response(body, answer.status, fields)


async def _searched(body: bytes, keys: Collection[str]) -> bytes:
    """The body without secrets. A long one is searched in a thread: streams go on meanwhile."""
    if len(body) <= _SHORT:
        return without_secrets(body, keys)
    return await asyncio.to_thread(without_secrets, body, keys)
