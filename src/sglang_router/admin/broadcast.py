"""Requests that go to all workers: flush the cache, load new weights, pause, continue, abort, profile.

The body goes byte for byte to every registered worker, healthy or not: one that is unhealthy now may be healthy for
the next request, and must not have old weights then. An engine whose ranks are workers is asked once. The answer has
the result of every worker:

    all workers succeeded  200   "success"
    some                   206   "partial_success"
    none                   502   "failed"
                           401   if all of them want another key (or 403)
    there are no workers   503   (flush_cache: 200, there is nothing to flush)

A worker whose cache was flushed or whose weights are new has no prefixes any more; the policy is told. The query goes
to the workers, too. Each worker gets its own key, one without a key what inference would give it. What workers answer
is shown without secrets, and no more than 64 KiB of it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.redaction import redacted, text_without_secrets
from sglang_router.admin.ask import Reply, ask, failure, unauthorized
from sglang_router.admin.context import JSON, Context
from sglang_router.admin.shapes import BroadcastResult
from sglang_router.errors import NoWorkers
from sglang_router.routing.worker import Worker
from sglang_router.workers.fetch import Fetched

_MOST_SHOWN = 1 << 16
"""Bytes of a worker's answer that are shown."""
_OTHER_ENGINES = {
    b"/flush_cache": b"/reset_prefix_cache",  # vLLM, where its development endpoints are enabled
    b"/load_lora_adapter": b"/v1/load_lora_adapter",
    b"/unload_lora_adapter": b"/v1/unload_lora_adapter",
    b"/v1/load_lora_adapter": b"/load_lora_adapter",
    b"/v1/unload_lora_adapter": b"/unload_lora_adapter",
}
"""What engines are asked that do not know a path: SGLang and vLLM have other names for it."""
_STATUSES = {"success": 200, "partial_success": 206, "failed": 502}


async def broadcast(context: Context, request: Request) -> Response:
    """Send the request to every worker, and answer with all results."""
    return await _broadcast(context, request, forget=False)


async def update_weights(context: Context, request: Request) -> Response:
    """The same for new weights: what was computed with the old ones is stale."""
    return await _broadcast(context, request, forget=True)


async def _broadcast(context: Context, request: Request, *, forget: bool) -> Response:
    replies = await ask_all(context, request, context.engines())
    if forget:
        for worker in done_by(replies):
            context.forget_prefixes(worker)
    return results_of(context, replies)


def done_by(replies: list[tuple[Worker, Reply]]) -> list[Worker]:
    """Return the workers that did what they were asked to do."""
    return [worker for worker, reply in replies if failure(reply) is None]


def results_of(context: Context, replies: list[tuple[Worker, Reply]]) -> Response:
    """Return the answer that shows the result of each worker.

    Raises: NoWorkers, when none was asked.
    """
    if not replies:
        raise NoWorkers(retry_after=5.0)
    succeeded = done_by(replies)
    status = _status(len(succeeded), len(replies))
    keys = context.keys()
    results = [_result(worker, reply, keys) for worker, reply in replies]
    counts = {"succeeded": len(succeeded), "total_workers": len(replies)}
    return JSON({"status": status, **counts, "results": results}, _status_code(status, replies))


async def flush_cache(context: Context, request: Request) -> Response:
    """Flush the caches of all workers, and forget their prefixes."""
    replies = await ask_all(context, request, context.engines())
    flushed, failed = [], []
    for worker, reply in replies:
        error = failure(reply)
        if error is None:
            context.forget_prefixes(worker)
            flushed.append(worker.url)
        else:
            failed.append({"worker": worker.url, "error": error})
    return _flushed(flushed, failed, replies)


def _flushed(flushed: list[str], failed: list[dict[str, str]], replies: list[tuple[Worker, Reply]]) -> Response:
    """The answer of POST /flush_cache; its words are the reference's."""
    total = len(flushed) + len(failed)
    totals = {"total_http_workers": total, "total_workers": total}
    status = _status(len(flushed), total)
    if status == "success":
        message = f"Successfully flushed cache on all {total} HTTP workers"
        if not total:
            message = "No HTTP workers available for cache flush"
        return JSON({"status": status, "message": message, "workers_flushed": total, **totals})
    message = f"The cache was flushed on {len(flushed)} of {total} HTTP workers"
    lists = {"successful": flushed, "failed": failed}
    return JSON({"status": status, "message": message, **lists, **totals}, _status_code(status, replies))


async def ask_all(context: Context, request: Request, workers: list[Worker]) -> list[tuple[Worker, Reply]]:
    """Ask these engines at the same time."""
    body = await request.body()
    replies = await asyncio.gather(*(_ask(context, worker, request, body) for worker in workers))
    return list(zip(workers, replies, strict=True))


async def _ask(context: Context, worker: Worker, request: Request, body: bytes) -> Reply:
    path: bytes = request.state.path.encode()
    query: bytes = request.scope["query_string"]
    target = path + b"?" + query if query else path
    content_type = request.headers.get("content-type", "application/json").encode("latin-1")
    sent, limit = context.sent(request, content_type), context.timeouts.broadcast
    reply = await ask(context, worker, b"POST", target, body=body, sent=sent, timeout=limit)
    other = _OTHER_ENGINES.get(path)
    if other is not None and isinstance(reply, Fetched) and reply.status == 404:
        body = b"" if path == b"/flush_cache" else body
        reply = await ask(context, worker, b"POST", other, body=body, sent=sent, timeout=limit)
    return reply


def _status(succeeded: int, total: int) -> str:
    if succeeded == total:
        return "success"
    return "partial_success" if succeeded else "failed"


def _status_code(status: str, replies: list[tuple[Worker, Reply]]) -> int:
    """The HTTP status. When all engines want another key, theirs."""
    if replies and all(unauthorized(reply) for _, reply in replies):
        return max(reply.status for _, reply in replies if isinstance(reply, Fetched))
    return _STATUSES[status]


def _result(worker: Worker, reply: Reply, keys: Collection[str]) -> BroadcastResult:
    if not isinstance(reply, Fetched):
        return BroadcastResult(worker=worker.url, status=None, body=None, error=str(reply))
    body = _readable(reply.body, keys)
    return BroadcastResult(worker=worker.url, status=reply.status, body=body, error=failure(reply))


def _readable(body: bytes, keys: Collection[str]) -> Any:
    """A JSON body as its value, another one as text, an empty one as None; without secrets."""
    if not body:
        return None
    if len(body) > _MOST_SHOWN:
        return f"({len(body)} bytes)"
    try:
        return redacted(json.loads(body), keys)
    except (ValueError, RecursionError):
        return text_without_secrets(body.decode("utf-8", "replace"), keys)
