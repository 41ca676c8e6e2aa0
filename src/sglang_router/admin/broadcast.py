"""Requests that go to all workers, or to those that a selector names: new weights, pause, continue, sleep, abort, ...

The body goes byte for byte to every registered worker, healthy or not: one that is unhealthy now may be healthy for
the next request, and must not have old weights then. An engine whose ranks are workers is asked once. The answer has
the result of every worker:

    all workers succeeded  200   "success"
    some                   207   "partial_success"      (flush_cache: 206, as the first routers answer)
    none                   502   "failed"
                           401   if all of them want another key (or 403)
    there are no workers   503   (flush_cache: 200, there is nothing to flush)
    nobody is selected     404

The fields `success` and `message` are those of an SGLang engine's own answer, so that its clients understand this one.

What is done to workers is followed (`admin.effects`): flushed caches and old weights have no prefixes any more, and a
paused worker gets no new requests. The query goes to the workers, too, without `selector`. Each worker gets its own
key, one without a key what inference would give it. What workers answer is shown without secrets, and no more than
64 KiB of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.redaction import redacted, text_without_secrets
from sglang_router.admin.ask import unauthorized
from sglang_router.admin.context import JSON, Context
from sglang_router.admin.orders import OrderResult, engine_path, give_all, order_of
from sglang_router.admin.selection import selected
from sglang_router.admin.shapes import BroadcastResult
from sglang_router.errors import NoWorkers
from sglang_router.routing.worker import Worker
from sglang_router.words import counted
from sglang_router.workers.fetch import Fetched

_MOST_SHOWN = 1 << 16
"""Bytes of a worker's answer that are shown."""
_OTHER_ENGINES = {
    "/flush_cache": "/reset_prefix_cache",  # vLLM, where its development endpoints are enabled
    "/load_lora_adapter": "/v1/load_lora_adapter",
    "/unload_lora_adapter": "/v1/unload_lora_adapter",
    "/v1/load_lora_adapter": "/load_lora_adapter",
    "/v1/unload_lora_adapter": "/unload_lora_adapter",
}
"""What engines are asked that do not know a path: SGLang and vLLM have other names for it."""
_STATUSES = {"success": 200, "partial_success": 207, "failed": 502}
_FLUSHED_PARTLY = 206


async def broadcast(context: Context, request: Request) -> Response:
    """Send the request to every selected worker, and answer with all results."""
    return await _to_all(context, request, request.state.path.encode())


async def question(context: Context, request: Request) -> Response:
    """The same for a request without a body."""
    return await _to_all(context, request, request.state.path.encode())


async def any_path(context: Context, request: Request) -> Response:
    """The same for any path of the engines: /v1/rl/engine/{path}."""
    return await _to_all(context, request, engine_path(request, 3))


async def _to_all(context: Context, request: Request, path: bytes) -> Response:
    workers = selected(context, request)
    return results_of(context, await ask_all(context, request, workers, path) if workers else [])


async def flush_cache(context: Context, request: Request) -> Response:
    """Flush the caches of all selected workers, and forget their prefixes."""
    return _flushed(await ask_all(context, request, selected(context, request), b"/flush_cache", b"POST"))


async def ask_all(
    context: Context, request: Request, workers: list[Worker], path: bytes = b"", method: bytes = b""
) -> list[OrderResult]:
    """Let these engines do what a request asks for, those that do not know the path under its other name.

    path    of the engines; b"": the request's own
    method  b"": the request's own
    """
    order = await order_of(context, request, path or request.state.path.encode())
    order = order._replace(method=method or order.method)
    given = {each.worker: each for each in await give_all(context, workers, order)}
    other = _OTHER_ENGINES.get(order.name)
    unknown = [each.worker for each in given.values() if isinstance(each.reply, Fetched) and each.reply.status == 404]
    if other is not None and unknown:
        flush = order.name == "/flush_cache"
        query, body = (b"", b"") if flush else (order.query, order.body)
        again = order._replace(path=other.encode(), name=other, query=query, body=body)
        given.update((each.worker, each) for each in await give_all(context, unknown, again))
    return [given[worker] for worker in workers]


def done_by(given: list[OrderResult]) -> list[Worker]:
    """Return the workers that did what they were asked to do."""
    return [each.worker for each in given if each.error is None]


def results_of(context: Context, given: list[OrderResult]) -> Response:
    """Return the answer that shows the result of each worker.

    Raises: NoWorkers, when none was asked.
    """
    if not given:
        raise NoWorkers(retry_after=5.0)
    succeeded, total = len(done_by(given)), len(given)
    status = _status(succeeded, total)
    keys = context.keys()
    answer = {
        "status": status,
        "success": succeeded == total,
        "message": f"Done by {succeeded} of {counted(total, 'worker')}",
        "succeeded": succeeded,
        "total_workers": total,
        "results": [_result(each, keys) for each in given],
    }
    return JSON(answer, _status_code(status, given, _STATUSES["partial_success"]))


def _flushed(given: list[OrderResult]) -> Response:
    """The answer of POST /flush_cache; its words are the reference's."""
    flushed = [each.worker.url for each in given if each.error is None]
    failed = [{"worker": each.worker.url, "error": each.error} for each in given if each.error is not None]
    total = len(given)
    totals = {"total_http_workers": total, "total_workers": total}
    status = _status(len(flushed), total)
    if status == "success":
        message = f"Successfully flushed cache on all {total} HTTP workers"
        if not total:
            message = "No HTTP workers available for cache flush"
        return JSON({"status": status, "message": message, "workers_flushed": total, **totals})
    message = f"The cache was flushed on {len(flushed)} of {total} HTTP workers"
    lists = {"successful": flushed, "failed": failed}
    return JSON({"status": status, "message": message, **lists, **totals}, _status_code(status, given, _FLUSHED_PARTLY))


def _status(succeeded: int, total: int) -> str:
    if succeeded == total:
        return "success"
    return "partial_success" if succeeded else "failed"


def _status_code(status: str, given: list[OrderResult], partly: int) -> int:
    """The HTTP status. When all engines want another key, theirs. partly: when some succeeded."""
    if given and all(unauthorized(each.reply) for each in given):
        return max(each.reply.status for each in given if isinstance(each.reply, Fetched))
    return partly if status == "partial_success" else _STATUSES[status]


def _result(given: OrderResult, keys: Collection[str]) -> BroadcastResult:
    worker, reply = given.worker, given.reply
    status, body = (reply.status, _readable(reply.body, keys)) if isinstance(reply, Fetched) else (None, None)
    return BroadcastResult(
        worker=worker.url, id=worker.id, status=status, body=body, error=given.error, seconds=given.seconds
    )


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
