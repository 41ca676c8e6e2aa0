"""Workers come and go while the router serves: three commands of the first routers, the later REST family.

    POST   /add_worker?url=U[&api_key=K]    registers U, answers when it is healthy
    POST   /remove_worker?url=U
    GET    /list_workers
    POST   /workers   GET /workers          registers, answers at once; lists
    GET    PUT   DELETE  /workers/{id}      id: the worker's id, or its URL (percent-encoded)
    POST   /workers/{id}/drain   /resume    no new requests, but it stays and keeps its cached prefixes

With `dp_aware` an engine of several data-parallel ranks is as many workers, U@0, U@1 ...: see `core.ranks`. Each has
an id of its own; the commands take the engine's URL and mean all of them.

A removed worker gets no request from that moment on. Those under way there end as if nothing had happened:
they hold the worker by their leases, and nothing else does.

Keys go in and never come out.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sglang_router.admin.context import JSON, Context
from sglang_router.config import parse_worker_url
from sglang_router.core.worker import Health, HealthRules, Worker, WorkerSpec
from sglang_router.errors import (
    ConfigError,
    Conflict,
    InvalidJSON,
    InvalidRequest,
    ShuttingDown,
    Unprocessable,
    WorkerNotFound,
)

_Positive = Annotated[float, msgspec.Meta(gt=0, le=86400)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Priority = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
_URL = Annotated[str, msgspec.Meta(max_length=2048)]
_Key = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]*\Z")]
"""What may stand in a header; an empty one means no key."""
_LONGEST = 1 << 18
"""Bytes of a description."""


class Change(msgspec.Struct, kw_only=True):
    """What can be said of a worker at any time; None leaves it as it is. Times in seconds."""

    api_key: _Key | None = None
    model_id: str | None = None
    priority: _Priority | None = None
    cost: float | None = None
    labels: dict[str, str] | None = None
    health_check_timeout_secs: _Positive | None = None
    health_check_interval_secs: _Positive | None = None
    health_success_threshold: _Count | None = None
    health_failure_threshold: _Count | None = None
    disable_health_check: bool | None = None


class Registration(Change, kw_only=True):
    """The body of POST /workers. Fields of the reference that mean nothing to an HTTP router are let pass."""

    url: _URL
    worker_type: str = "regular"
    runtime: str | None = None
    bootstrap_port: int | None = None
    dp_aware: bool | None = None


# -- the three commands ----------------------------------------------------------------------------------


async def add(context: Context, request: Request) -> Response:
    """Answers when the worker is healthy; if that takes too long or the client leaves, it is out again."""
    url = _url_parameter(request)
    key = _key_parameter(request) or context.worker_api_key
    if context.fleet.entries(url):
        raise InvalidRequest(f"Worker {url} already exists", param="url")  # 400 since the first version
    spec = WorkerSpec(url=url, api_key=key, dp_aware=context.dp_aware, health=context.health)
    worker = context.fleet.add(spec, context.clock())
    context.prober.start(worker)
    healthy = False
    try:
        healthy = await _settled(context, worker)
    finally:  # also when the client leaves, which cancels this
        left = _successors(context, worker)
        if not healthy:
            _take_out(context, left)
    if not left:  # by someone else
        raise InvalidRequest(f"Worker {url} was removed before it became healthy", param="url")
    if not healthy and context.prober.released:
        raise ShuttingDown
    if not healthy:
        reason = f" ({worker.last_error})" if worker.last_error else ""
        limit = f"Timeout {context.startup_timeout:g}s"
        raise InvalidRequest(f"{limit} waiting for worker {url} to become healthy{reason}", param="url")
    return PlainTextResponse(f"Successfully added worker: {url}")


async def _settled(context: Context, worker: Worker) -> bool:
    """Waits until a worker is healthy, or the ranks that took its place are."""
    until = context.clock() + context.startup_timeout
    await context.prober.healthy(worker, context.startup_timeout)
    for entry in _successors(context, worker):
        await context.prober.healthy(entry, max(0.0, until - context.clock()))
    entries = _successors(context, worker)
    return bool(entries) and all(entry.health is Health.HEALTHY for entry in entries)


def _successors(context: Context, worker: Worker) -> list[Worker]:
    """A worker, or the ranks that took its place; not what somebody else registered there since."""
    return [entry for entry in context.fleet.entries(worker.spec.url) if entry is worker or entry.dp_rank is not None]


async def remove(context: Context, request: Request) -> Response:
    """Removes a worker; of an engine whose ranks are workers, all of them, or the one that is named."""
    url = request.query_params.get("url", "")
    rank = context.fleet.by_url(url)
    if rank is not None and rank.dp_rank is not None:
        entries = [rank]
    else:
        url = _url_parameter(request)
        entries = context.fleet.entries(url)
    if not entries:
        raise WorkerNotFound(f"Worker {url} is not registered", param="url")
    _take_out(context, entries)
    return PlainTextResponse(f"Successfully removed worker: {url}")


def _take_out(context: Context, workers: list[Worker]) -> None:
    for worker in workers:
        context.take_out(worker)


async def urls(context: Context, request: Request) -> Response:
    return JSON({"urls": [worker.url for worker in context.fleet]})


def _url_parameter(request: Request) -> str:
    url = request.query_params.get("url")
    if not url:
        raise InvalidRequest("Worker URL required. Provide 'url' query parameter", param="url")
    return _checked_url(url)


def _key_parameter(request: Request) -> str:
    try:
        return msgspec.convert(request.query_params.get("api_key", ""), _Key)
    except msgspec.ValidationError:
        message = "The API key holds characters that cannot stand in a header"
        raise InvalidRequest(message, param="api_key") from None


def _checked_url(url: str) -> str:
    try:
        return parse_worker_url(url)
    except ConfigError as exc:
        raise InvalidRequest(str(exc), param="url") from None


# -- the REST family -------------------------------------------------------------------------------------


async def create(context: Context, request: Request) -> Response:
    """Registers a worker and answers at once; the health checks let it take requests."""
    wanted = await _read(request, Registration)
    url = _checked_url(wanted.url)
    if wanted.worker_type != "regular" or wanted.bootstrap_port is not None:
        raise InvalidRequest("Only regular workers are supported.", param="worker_type")
    if context.fleet.entries(url):
        raise Conflict(f"Worker {url} already exists", param="url")
    aware = context.dp_aware if wanted.dp_aware is None else wanted.dp_aware
    blank = WorkerSpec(
        url=url, api_key=context.worker_api_key, runtime=wanted.runtime, dp_aware=aware, health=context.health
    )
    worker = context.fleet.add(_changed(blank, wanted), context.clock())
    context.prober.start(worker)
    location = f"/workers/{worker.id}"
    accepted = {"status": "accepted", "worker_id": worker.id, "url": url, "location": location}
    message = "The worker is registered and takes requests once it is healthy"
    return JSON({**accepted, "message": message}, 202, {"location": location})


async def index(context: Context, request: Request) -> Response:
    workers = [describe(context, worker) for worker in context.fleet]
    healthy = sum(worker.health is Health.HEALTHY for worker in context.fleet)
    kinds = {"prefill_count": 0, "decode_count": 0, "regular_count": len(workers)}
    return JSON({"workers": workers, "total": len(workers), "stats": {**kinds, "healthy_count": healthy}})


async def show(context: Context, request: Request) -> Response:
    return JSON(describe(context, named(context, request)))


async def change(context: Context, request: Request) -> Response:
    """Changes what an operator says of a worker; its load, health and cached prefixes stay."""
    wanted = await _read(request, Change)
    worker = named(context, request)
    _apply(context, worker, _changed(worker.spec, wanted))
    return JSON({"status": "accepted", "worker_id": worker.id, "message": "The worker is updated"}, 202)


async def delete(context: Context, request: Request) -> Response:
    worker = named(context, request)
    context.take_out(worker)
    message = f"The worker is removed; {worker.load} requests under way there go on to their end"
    return JSON({"status": "accepted", "worker_id": worker.id, "message": message}, 202)


async def drain(context: Context, request: Request) -> Response:
    worker = named(context, request)
    context.fleet.set_draining(worker, True)
    return JSON(describe(context, worker))


async def resume(context: Context, request: Request) -> Response:
    worker = named(context, request)
    context.fleet.set_draining(worker, False)
    return JSON(describe(context, worker))


def named(context: Context, request: Request) -> Worker:
    """The worker that the path names, by id or URL."""
    name = request.path_params["id"]
    worker = context.fleet.by_id(name) or context.fleet.by_url(name.rstrip("/"))
    if worker is None:
        raise WorkerNotFound(f"Worker {name} not found")
    return worker


async def _read(request: Request, shape: type[Any]) -> Any:
    """The body as one of the structs above.

    Raises: InvalidJSON (400), Unprocessable (422).
    """
    body = await request.body()
    if len(body) > _LONGEST:  # to read it would hold up every stream
        raise Unprocessable(f"The description of the worker is longer than {_LONGEST} bytes.")
    try:
        wanted = msgspec.json.decode(body, type=shape)
        # Once more, for what msgspec does not look at: bytes of fields it skips, and fields that come twice.
        json.loads(body.decode(), object_pairs_hook=_once)
    except msgspec.ValidationError as exc:
        raise Unprocessable(f"The description of the worker is not valid: {exc}.") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise InvalidJSON(f"The body is not a JSON object: {exc}.") from None
    return wanted


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless it is two things at once."""
    found: dict[str, Any] = {}
    for name, value in fields:
        if name in found:
            raise ValueError(f"the field {name[:64]!r} comes twice")
        found[name] = value
    return found


# -- what is said of a worker ----------------------------------------------------------------------------


def _changed(spec: WorkerSpec, wanted: Change) -> WorkerSpec:
    said = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    plain: dict[str, Any] = {name: said[name] for name in ("model_id", "priority", "cost", "labels") if name in said}
    if "api_key" in said:
        plain["api_key"] = said["api_key"] or None
    names = {
        "timeout": "health_check_timeout_secs",
        "interval": "health_check_interval_secs",
        "success_threshold": "health_success_threshold",
        "failure_threshold": "health_failure_threshold",
    }
    rules: dict[str, Any] = {name: said[field] for name, field in names.items() if field in said}
    if wanted.disable_health_check is not None:
        rules["enabled"] = not wanted.disable_health_check
    health: HealthRules = msgspec.structs.replace(spec.health, **rules)
    return msgspec.structs.replace(spec, health=health, **plain)


def _apply(context: Context, worker: Worker, spec: WorkerSpec) -> None:
    context.fleet.amend(worker, spec)
    if spec.health.enabled:
        context.prober.start(worker)
        context.prober.prod(worker)  # the new interval counts from now on
        return
    context.prober.stop(worker)
    for _ in range(spec.health.success_threshold):
        if worker.health is Health.HEALTHY:
            break
        context.fleet.probed(worker, None, context.clock())  # without checks a worker counts as well


def describe(context: Context, worker: Worker) -> dict[str, Any]:
    """A worker as GET /workers shows it: the reference's fields, then our own."""
    spec, rules = worker.spec, worker.spec.health
    tree = getattr(context.router.policy, "tree", None)  # some policies remember prefixes
    info: dict[str, Any] = {
        "id": worker.id,
        "url": worker.url,
        "model_id": spec.model_id or "unknown",
        "priority": spec.priority,
        "cost": spec.cost,
        "worker_type": spec.worker_type,
        "is_healthy": worker.health is Health.HEALTHY,
        "load": worker.load,
        "connection_mode": "HTTP",
        "metadata": spec.labels,
        "disable_health_check": not rules.enabled,
        "health": worker.health.value,
        "circuit_breaker": worker.breaker.value,
        "draining": worker.draining,
        "held_off": worker.held_off or None,
        "processed": worker.processed,
        "tree_size": tree.size(worker.slot) if tree is not None and worker.slot >= 0 else 0,
        "last_error": worker.last_error or None,
        "registered_secs": round(context.clock() - worker.since, 3),
        "engine": worker.report.known(),
    }
    if worker.dp_rank is not None:
        info |= {"base_url": spec.url, "dp_rank": worker.dp_rank}
    if spec.runtime is not None:
        info["runtime_type"] = spec.runtime
    if context.replicas is not None and (replica := context.replicas.describe(worker)) is not None:
        info["replica"] = replica
    if worker.health is Health.STARTING:
        info["job_status"] = _job(worker)
    return info


def _job(worker: Worker) -> dict[str, Any]:
    """The reference adds workers in a queue of jobs, which its clients poll; here the checks are the job."""
    return {
        "job_type": "AddWorker",
        "worker_url": worker.url,
        "status": "processing",
        "message": worker.last_error or "The worker is being checked",
        "timestamp": int(time.time()),
    }
