"""POST /add_worker: register a worker, and answer when it is healthy.

    /add_worker?url=U               200 when U is healthy; 400 when it is not in time, or no engine answers there, and
                                    then U is removed again
    /add_worker?url=U@1             the same for a rank that was removed
    /add_worker?url=U&wait=false    202 at once: U is registered, and is checked from now on
    /add_worker?url=U&wait=5        200 within 5 s, or else 202 with the reason why it is not healthy yet

How far a worker is, GET /workers/{id} tells at any time, and the log each minute. A client that leaves changes nothing.
"""

from __future__ import annotations

from typing import Annotated, NoReturn

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sglang_router.admin.context import Context
from sglang_router.admin.ranks import rank_to_add
from sglang_router.admin.workers import key_parameter, remove_all, url_parameter
from sglang_router.errors import InvalidRequest, ShuttingDown
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.workers.health_answers import ITSELF

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


async def add(context: Context, request: Request) -> Response:
    """Add a worker, and answer when it is healthy; with `wait`, answer after that time at the latest.

    A worker that does not become healthy in time is removed again, unless the client said how long it waits. A client
    that leaves changes nothing: the worker stays, as after POST /workers.
    """
    wait = _wait_parameter(request)
    rules = context.add_rules
    key = key_parameter(request) or rules.api_key
    spec = rank_to_add(context, request.query_params.get("url", ""), key)
    if spec is None:
        url = url_parameter(request)
        if known := context.fleet.entries(url):
            raise InvalidRequest(
                f"Worker {url} already exists{_progress(known[0])}", param="url"
            )  # 400 since version 1
        spec = WorkerSpec(url=url, api_key=key, dp_aware=rules.dp_aware, health=rules.health)
    worker = context.fleet.add(spec, context.clock())
    url = worker.url
    until = context.clock() + (rules.startup_timeout if wait is None else wait)
    healthy = await _healthy(context, worker, until)
    left = _successors(context, worker)
    if not left:  # removed by another request
        raise InvalidRequest(f"Worker {url} was removed before it became healthy", param="url")
    if not healthy:
        if wait is not None and not context.checks.released:
            return _registered(left[0], context.added(worker))
        no_engine = context.checks.found_no_engine(worker)
        remove_all(context, left)
        _refuse(context, worker, no_engine)
    return PlainTextResponse(f"Successfully added worker: {url}{context.added(worker)}")


async def _healthy(context: Context, worker: Worker, until: float) -> bool:
    """Wait until a worker, or each of the ranks that replaced it, is healthy; False when that takes too long."""
    await context.checks.until_healthy(worker, max(0.0, until - context.clock()))
    for entry in _successors(context, worker):
        await context.checks.until_healthy(entry, max(0.0, until - context.clock()))
    entries = _successors(context, worker)
    return bool(entries) and all(entry.health is Health.HEALTHY for entry in entries)


def _registered(worker: Worker, told: str) -> Response:
    """Say that a worker is registered, how far it is, what the other routers do, and where to look again."""
    location = f"/workers/{worker.id}"
    text = f"Worker {worker.spec.url} is registered and takes requests once it is healthy{_progress(worker)}{told}"
    return PlainTextResponse(f"{text}. See GET {location}", 202, {"location": location})


def _progress(worker: Worker) -> str:
    """How far a worker is that is not healthy yet; "" for one that was."""
    if worker.health is not Health.STARTING:
        return ""
    return f"; it is starting ({worker.reason})" if worker.reason else "; it is starting"


def _successors(context: Context, worker: Worker) -> list[Worker]:
    """A worker, or the ranks that replaced it; not a worker that somebody else registered at this URL since."""
    entries = context.fleet.entries(worker.spec.url)
    if worker.dp_rank is not None:
        return [entry for entry in entries if entry is worker]
    return [entry for entry in entries if entry is worker or entry.dp_rank is not None]


def _refuse(context: Context, worker: Worker, no_engine: bool) -> NoReturn:
    """Say why a worker was not added: it is no engine, did not become healthy in time, or the router shuts down."""
    if context.checks.released:
        raise ShuttingDown
    if worker.reason == ITSELF:
        raise InvalidRequest(f"Worker {worker.spec.url} is not added: {ITSELF}", param="url")
    reason = f" ({worker.reason})" if worker.reason else ""
    if no_engine:
        raise InvalidRequest(f"Worker {worker.spec.url} is not added: no engine answers there{reason}", param="url")
    limit = f"Timeout {context.add_rules.startup_timeout:g}s"
    raise InvalidRequest(f"{limit} waiting for worker {worker.spec.url} to become healthy{reason}", param="url")


def _wait_parameter(request: Request) -> float | None:
    """How many seconds the client waits for the worker; None: until it is healthy."""
    text = request.query_params.get("wait", "true").lower()
    if text in ("true", "false"):
        return None if text == "true" else 0.0
    try:
        return msgspec.convert(text, _Seconds, strict=False)
    except msgspec.ValidationError:
        message = "wait must be true, false, or a number of seconds from 0 to 86400"
        raise InvalidRequest(message, param="wait") from None
