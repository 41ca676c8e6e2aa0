"""Add, change and remove workers: the three commands of the first routers, and the later REST API.

    POST   /add_worker?url=U[&api_key=K]    registers U, answers when it is healthy (`admin.adding`)
    POST   /remove_worker?url=U
    GET    /list_workers
    POST   /workers   GET /workers          registers, answers at once; lists
    GET    PUT   DELETE  /workers/{id}      id: the worker's id, or its URL (percent-encoded)
    POST   /workers/{id}/drain   /resume    no new requests, but it stays and keeps its cached prefixes

With `dp_aware` each data-parallel rank of an engine is a worker, U@0, U@1 ...: see `workers.ranks`. Each has an id of
its own; the commands take the engine's URL and mean all of them.

The fleet tells its listeners of workers that are added or removed, and they start and stop the health checks. A removed
worker gets no new request; its requests in flight finish: only their leases hold the worker.

API keys are taken but never shown.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sglang_router.admin.context import JSON, Context
from sglang_router.admin.shapes import ModelNameOrNone
from sglang_router.admin.shared import in_slices
from sglang_router.config import parse_worker_url
from sglang_router.config.option import did_you_mean
from sglang_router.errors import (
    ConfigError,
    Conflict,
    InvalidJSON,
    InvalidRequest,
    Unprocessable,
    WorkerNotFound,
)
from sglang_router.routing.roles import ROLES
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.spec import HIGHEST_PORT, WorkerSpec
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.words import counted

T = TypeVar("T", bound=msgspec.Struct)

_Positive = Annotated[float, msgspec.Meta(gt=0, le=86400)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Priority = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=HIGHEST_PORT)]
_URL = Annotated[str, msgspec.Meta(max_length=2048)]
_Key = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]*\Z")]
"""Visible ASCII, so that it can be sent in a header; empty: no key."""
_MAX_BYTES = 1 << 18
"""The longest description of a worker."""


class Change(msgspec.Struct, kw_only=True):
    """What can be changed on a worker at any time; None leaves it as it is. Times in seconds.

    An empty `model_id` is none: the worker has only the names that its engine announces.
    """

    api_key: _Key | None = None
    model_id: ModelNameOrNone | None = None
    priority: _Priority | None = None
    cost: float | None = None
    labels: dict[str, str] | None = None
    health_check_timeout_secs: _Positive | None = None
    health_check_interval_secs: _Positive | None = None
    health_success_threshold: _Count | None = None
    health_failure_threshold: _Count | None = None
    disable_health_check: bool | None = None


class Registration(Change, kw_only=True):
    """The body of POST /workers. `bootstrap_port` counts while the worker is a prefill one: its engine may say so."""

    url: _URL
    worker_type: Literal["regular", "prefill", "decode"] = "regular"
    runtime: str | None = None
    bootstrap_port: _Port | None = None
    dp_aware: bool | None = None


IGNORED = ("tokenizer_path", "reasoning_parser", "tool_parser", "chat_template", "max_connection_attempts")
"""Fields of the reference's bodies that mean nothing to an HTTP router, and are ignored."""


# -- the commands ----------------------------------------------------------------------------------


async def remove(context: Context, request: Request) -> Response:
    """Remove a worker. If the ranks of an engine are workers: all of them, or the one that the URL names."""
    url = request.query_params.get("url", "")
    rank = context.fleet.by_url(url)
    if rank is not None and rank.dp_rank is not None:
        entries = [rank]
    else:
        url = url_parameter(request)
        entries = context.fleet.entries(url)
    if not entries:
        raise WorkerNotFound(f"Worker {url} is not registered", param="url")
    remove_all(context, entries)
    return PlainTextResponse(f"Successfully removed worker: {url}{context.removed(entries)}")


def remove_all(context: Context, workers: list[Worker]) -> None:
    for worker in workers:
        context.fleet.remove(worker)


async def urls(context: Context, request: Request) -> Response:
    """Return the URLs of all workers."""
    return JSON({"urls": [worker.url for worker in context.fleet]})


def url_parameter(request: Request) -> str:
    url = request.query_params.get("url")
    if not url:
        raise InvalidRequest("Worker URL required. Provide 'url' query parameter", param="url")
    return _checked_url(url)


def key_parameter(request: Request) -> str:
    try:
        return msgspec.convert(request.query_params.get("api_key", ""), _Key)
    except msgspec.ValidationError:
        message = "The API key has characters that cannot be sent in a header"
        raise InvalidRequest(message, param="api_key") from None


def _checked_url(url: str) -> str:
    try:
        return parse_worker_url(url)
    except ConfigError as exc:
        raise InvalidRequest(str(exc), param="url") from None


# -- the REST API ----------------------------------------------------------------------------------------


async def create(context: Context, request: Request) -> Response:
    """Register a worker and answer at once; it takes requests once a health check finds it healthy."""
    wanted = await _read(request, Registration)
    url = _checked_url(wanted.url)
    if context.fleet.entries(url):
        raise Conflict(f"Worker {url} already exists", param="url")
    rules = context.add_rules
    aware = rules.dp_aware if wanted.dp_aware is None else wanted.dp_aware
    spec = WorkerSpec(
        url=url,
        api_key=rules.api_key,
        worker_type=wanted.worker_type,
        bootstrap_port=wanted.bootstrap_port,
        runtime=wanted.runtime,
        dp_aware=aware,
        health=rules.health,
    )
    worker = context.fleet.add(_changed(spec, wanted), context.clock())
    location = f"/workers/{worker.id}"
    accepted = {"status": "accepted", "worker_id": worker.id, "url": url, "location": location}
    message = f"The worker is registered and takes requests once it is healthy{context.added(worker)}"
    return JSON({**accepted, "message": message}, 202, {"location": location})


async def index(context: Context, request: Request) -> Response:
    """Return all workers with their state."""
    # In slices, each worker encoded by itself: a thousand of them take some 20 ms.
    workers = await in_slices(msgspec.Raw(msgspec.json.encode(describe(context, each))) for each in list(context.fleet))
    healthy = sum(worker.health is Health.HEALTHY for worker in context.fleet)
    roles = Counter(worker.role for worker in context.fleet)
    kinds = {f"{role}_count": roles[role] for role in ROLES}
    answer = {"workers": workers, "total": len(workers), "stats": {**kinds, "healthy_count": healthy}}
    if context.discovery is not None:
        answer["discovery"] = context.discovery()
    return JSON(answer)


async def show(context: Context, request: Request) -> Response:
    """Return one worker."""
    return JSON(describe(context, named(context, request)))


async def change(context: Context, request: Request) -> Response:
    """Change what an operator says of a worker; its load, health and cached prefixes stay."""
    wanted = await _read(request, Change)
    worker = named(context, request)
    _apply(context, worker, _changed(worker.spec, wanted))
    return JSON({"status": "accepted", "worker_id": worker.id, "message": "The worker is updated"}, 202)


async def delete(context: Context, request: Request) -> Response:
    """Remove a worker; its requests in flight finish."""
    worker = named(context, request)
    context.fleet.remove(worker)
    message = f"The worker is removed; {counted(worker.own_load, 'request')} in flight may finish"
    message += context.removed([worker])
    return JSON({"status": "accepted", "worker_id": worker.id, "message": message}, 202)


async def drain(context: Context, request: Request) -> Response:
    """Stop new requests to a worker."""
    worker = named(context, request)
    context.fleet.set_draining(worker, True)
    return JSON(describe(context, worker))


async def resume(context: Context, request: Request) -> Response:
    """End the drain of a worker, and its pause, should the router have missed that the engine continues."""
    worker = named(context, request)
    context.fleet.set_draining(worker, False)
    for rank in context.fleet.entries(worker.spec.url):  # a pause is the engine's
        context.fleet.set_paused(rank, ())
    return JSON(describe(context, worker))


def named(context: Context, request: Request) -> Worker:
    """The worker that the path names, by id or URL."""
    name = request.path_params["id"]
    worker = context.fleet.by_id(name) or context.fleet.by_url(name.rstrip("/"))
    if worker is None:
        raise WorkerNotFound(f"Worker {name} not found")
    return worker


async def _read(request: Request, shape: type[T]) -> T:
    """The body, as a Change or a Registration.

    Raises: InvalidJSON (400), Unprocessable (422).
    """
    body = await request.body()
    if len(body) > _MAX_BYTES:  # decoding it would block the event loop, and with it every stream
        raise Unprocessable(f"The description of the worker is longer than {_MAX_BYTES} bytes.")
    try:
        wanted = msgspec.json.decode(body, type=shape)
        # Again, for what msgspec does not check: the bytes of fields that it skips, and duplicate fields.
        found = json.loads(body.decode(), object_pairs_hook=_unique)
    except msgspec.ValidationError as exc:
        raise Unprocessable(f"The description of the worker is not valid: {exc}.") from None
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise InvalidJSON(f"The body is not a JSON object: {exc}.") from None
    known = [field.name for field in msgspec.structs.fields(shape)]
    for name in found:
        if name not in known and name not in IGNORED:
            shown = json.dumps(name[:64])
            raise Unprocessable(f"The description of a worker has no field {shown}{did_you_mean(name[:64], known)}.")
    return wanted


def _unique(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these fields. Raises: ValueError, if one comes twice."""
    found: dict[str, Any] = {}
    for name, value in fields:
        if name in found:
            raise ValueError(f"the field {name[:64]!r} comes twice")
        found[name] = value
    return found


# -- changing and describing a worker --------------------------------------------------------------------

_HEALTH_FIELDS = {
    "timeout": "health_check_timeout_secs",
    "interval": "health_check_interval_secs",
    "success_threshold": "health_success_threshold",
    "failure_threshold": "health_failure_threshold",
}
"""Fields of HealthRules, and their names in a Change."""


def _changed(spec: WorkerSpec, wanted: Change) -> WorkerSpec:
    """A spec with the changes that are wanted."""
    given = {name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None}
    plain: dict[str, Any] = {name: given[name] for name in ("model_id", "priority", "cost", "labels") if name in given}
    if "api_key" in given:
        plain["api_key"] = given["api_key"] or None
    rules: dict[str, Any] = {name: given[field] for name, field in _HEALTH_FIELDS.items() if field in given}
    if wanted.disable_health_check is not None:
        rules["enabled"] = not wanted.disable_health_check
    health: HealthRules = msgspec.structs.replace(spec.health, **rules)
    return msgspec.structs.replace(spec, health=health, **plain)


def _apply(context: Context, worker: Worker, spec: WorkerSpec) -> None:
    """Give a worker its new spec, and start or stop its health checks. Without checks it counts as healthy."""
    context.membership.amend(worker, spec)
    if spec.health.enabled:
        context.checks.start(worker)
        context.checks.check_now(worker)  # the new interval starts now
        return
    context.checks.stop(worker)
    for _ in range(spec.health.success_threshold):
        if worker.health is Health.HEALTHY:
            break
        context.fleet.probed(worker, None, context.clock())


def describe(context: Context, worker: Worker) -> dict[str, Any]:
    """A worker as GET /workers shows it: the reference's fields, then our own."""
    spec = worker.spec
    info: dict[str, Any] = {
        "id": worker.id,
        "url": worker.url,
        "model_id": worker.model or "unknown",
        "priority": spec.priority,
        "cost": spec.cost,
        "worker_type": worker.role,
        "is_healthy": worker.health is Health.HEALTHY,
        "load": worker.own_load,
        "elsewhere": worker.elsewhere,
        "waiting": worker.waiting,
        "connection_mode": "HTTP",
        "metadata": spec.labels,
        "disable_health_check": not spec.health.enabled,
        "health": worker.health.value,
        "circuit_breaker": worker.breaker.value,
        "draining": worker.draining,
        "withheld": worker.withheld or None,
        "source": spec.source.value,
        "paused": list(worker.paused),
        "weight_version": worker.weights or None,
        "held_off": worker.ejected or None,
        "processed": worker.processed,
        "tree_size": context.fleet.pools.remembered(worker),
        "last_error": worker.reason or None,
        "registered_secs": round(context.clock() - worker.since, 3),
        "engine": worker.report.known(),
    }
    return info | _optional(context, worker)


def _optional(context: Context, worker: Worker) -> dict[str, Any]:
    """The fields that only some workers have."""
    info: dict[str, Any] = {}
    if worker.dp_rank is not None:
        info |= {"base_url": worker.spec.url, "dp_rank": worker.dp_rank}
    if worker.spec.origin:
        info["origin"] = {"name": worker.spec.origin, "instance": worker.spec.instance or None}
    if worker.spec.bootstrap_port is not None:
        info["bootstrap_port"] = worker.spec.bootstrap_port
    if worker.spec.runtime is not None:
        info["runtime_type"] = worker.spec.runtime
    if context.replicas is not None and (replica := context.replicas.describe(worker)) is not None:
        info["replica"] = replica
    if worker.health is Health.STARTING:
        info["job_status"] = _job(worker)
    return info


def _job(worker: Worker) -> dict[str, Any]:
    """The reference adds workers in a queue of jobs that clients poll; here the health checks are the job."""
    return {
        "job_type": "AddWorker",
        "worker_url": worker.url,
        "status": "processing",
        "message": worker.reason or "The worker is being checked",
        "timestamp": int(time.time()),
    }
