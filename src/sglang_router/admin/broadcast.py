"""What is said to all workers at once: forget your cache, take these weights, stop, go on.

The body goes to every registered worker byte for byte, whatever the checks say of it (one that is ill now may
be well by the next request, and must not have old weights then). Workers that are ranks of one engine are told
once. Every worker's result is in the answer:

    all workers did it     200   "success"
    some                   206   "partial_success"
    none                   502   "failed"
    there are no workers   503   (flush_cache: 200, for nothing is left cached)

A worker that emptied its cache, or has other weights, holds no prefix any more; the policy is told. The
request's query goes along; its credentials do not, each worker gets its own key.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.context import JSON, Context, Reply, ask, trouble
from sglang_router.core.worker import Worker
from sglang_router.errors import NoWorkers
from sglang_router.net.fetch import Answer

_OUTCOMES = {"success": 200, "partial_success": 206, "failed": 502}


class Result(msgspec.Struct):
    """What one worker did. `status` is None and `error` says why when it did not answer."""

    worker: str
    status: int | None
    body: Any
    error: str | None


async def broadcast(context: Context, request: Request) -> Response:
    """Tells every worker, and answers with what each said."""
    return await _broadcast(context, request, forget=False)


async def update_weights(context: Context, request: Request) -> Response:
    """The same for new weights: what was computed with the old ones is worthless."""
    return await _broadcast(context, request, forget=True)


async def _broadcast(context: Context, request: Request, *, forget: bool) -> Response:
    replies = await _tell_all(context, request)
    if not replies:
        raise NoWorkers(retry_after=5.0)
    done = [worker for worker, reply in replies if trouble(reply) is None]
    if forget:
        for worker in done:
            context.forget_prefixes(worker)
    outcome = _outcome(len(done), len(replies))
    results = [_result(worker, reply) for worker, reply in replies]
    counts = {"succeeded": len(done), "total_workers": len(replies)}
    return JSON({"status": outcome, **counts, "results": results}, _OUTCOMES[outcome])


async def flush_cache(context: Context, request: Request) -> Response:
    """Empties the caches of all workers, and what the router remembers of them."""
    replies = await _tell_all(context, request)
    done, failed = [], []
    for worker, reply in replies:
        error = trouble(reply)
        if error is None:
            context.forget_prefixes(worker)
            done.append(worker.url)
        else:
            failed.append({"worker": worker.url, "error": error})
    total = len(replies)
    totals = {"total_http_workers": total, "total_workers": total}
    outcome = _outcome(len(done), total)
    if outcome == "success":
        message = f"Successfully flushed cache on all {total} HTTP workers"
        if not total:
            message = "No HTTP workers available for cache flush"
        return JSON({"status": outcome, "message": message, "workers_flushed": total, **totals})
    message = f"The cache was flushed on {len(done)} of {total} HTTP workers"
    lists = {"successful": done, "failed": failed}
    return JSON({"status": outcome, "message": message, **lists, **totals}, _OUTCOMES[outcome])


async def _tell_all(context: Context, request: Request) -> list[tuple[Worker, Reply]]:
    path = request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    body = await request.body()
    content_type = request.headers.get("content-type", "application/json").encode("latin-1")
    workers = context.engines()
    told = (_tell(context, worker, path, query, body, content_type) for worker in workers)
    return list(zip(workers, await asyncio.gather(*told), strict=True))


async def _tell(context: Context, worker: Worker, path: bytes, query: bytes, body: bytes, content_type: bytes) -> Reply:
    suffix = b"?" + query if query else b""
    limit = context.broadcast_timeout
    reply = await ask(context, worker, b"POST", path + suffix, body=body, content_type=content_type, timeout=limit)
    if path == b"/flush_cache" and isinstance(reply, Answer) and reply.status == 404:
        # vLLM's name for it, where its development endpoints are switched on.
        reply = await ask(context, worker, b"POST", b"/reset_prefix_cache", timeout=limit)
    return reply


def _outcome(done: int, total: int) -> str:
    if done == total:
        return "success"
    return "partial_success" if done else "failed"


def _result(worker: Worker, reply: Reply) -> Result:
    if not isinstance(reply, Answer):
        return Result(worker.url, None, None, str(reply))
    return Result(worker.url, reply.status, _readable(reply.body), trouble(reply))


def _readable(body: bytes) -> Any:
    """JSON as a value, everything else as text, nothing as None."""
    if not body:
        return None
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode("utf-8", "replace")
