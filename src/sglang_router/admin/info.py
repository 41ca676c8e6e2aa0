"""What the router and its workers are, and how they do: health, readiness, models, loads, metrics.

`/health` and `/liveness` speak of the router alone, `/readiness` of whether a request would find a worker,
and `/health_generate` of whether a worker really computes: it has one make a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sglang_router.admin.context import JSON, Context, ask, decoded, get_from_all, passed_on, trouble
from sglang_router.core.worker import Health, Worker
from sglang_router.errors import NotFound, Unavailable, WorkerUnreachable
from sglang_router.net import reports
from sglang_router.net.fetch import Answer

_TRIES = 3
_SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")
"""Workers that are asked, one after the other, for what any of them can tell."""
_MODELS_HOLD = 1.0
"""Seconds for which the union of models is not asked for again."""
_OTHER_NAMES = {
    "/get_model_info": "/model_info",
    "/model_info": "/get_model_info",
    "/get_server_info": "/server_info",
    "/server_info": "/get_server_info",
}
"""Engines of different age know only one of two names."""


# -- health ----------------------------------------------------------------------------------------------


async def health(context: Context, request: Request) -> Response:
    return PlainTextResponse("OK")


async def readiness(context: Context, request: Request) -> Response:
    able = context.fleet.candidates(context.clock())
    healthy = sum(worker.health is Health.HEALTHY for worker in able)
    total = len(context.fleet)
    if healthy:
        return JSON({"status": "ready", "healthy_workers": healthy, "total_workers": total})
    short = {"status": "not ready", "reason": "insufficient healthy workers", "healthy_workers": 0}
    return JSON({**short, "total_workers": total}, 503)


async def health_generate(context: Context, request: Request) -> Response:
    failures = []
    for worker in _least_loaded(context):
        failure = await _generate(context, worker)
        if failure is None:
            return PlainTextResponse("OK")
        failures.append(f"{worker.url}: {failure}")
    raise Unavailable(f"No worker could generate a token. {'; '.join(failures)}", retry_after=1.0)


def _least_loaded(context: Context) -> list[Worker]:
    return sorted(context.serving(), key=lambda worker: worker.load)[:_TRIES]


async def _generate(context: Context, worker: Worker) -> str | None:
    """Has a worker make one token: what went wrong, or None. Without /health_generate, by a real prompt."""
    limit = context.generate_timeout
    reply = await ask(context, worker, b"GET", b"/health_generate", timeout=limit)
    if isinstance(reply, Answer) and reply.status == 404:
        prompt: dict[str, Any] = {"prompt": "1", "max_tokens": 1}
        if worker.spec.model_id is not None:
            prompt["model"] = worker.spec.model_id
        body = msgspec.json.encode(prompt)
        reply = await ask(context, worker, b"POST", b"/v1/completions", body=body, timeout=limit)
    return trouble(reply)


# -- what a worker says of itself ------------------------------------------------------------------------


async def from_a_worker(context: Context, request: Request) -> Response:
    """Passes on the answer of the first worker that has one."""
    path: str = request.scope["path"]
    detail = ""
    for worker in context.serving()[:_TRIES]:
        reply = await ask(context, worker, b"GET", path.encode())
        if isinstance(reply, Answer) and reply.status == 404:
            reply = await ask(context, worker, b"GET", _OTHER_NAMES[path].encode())
        if isinstance(reply, Answer) and reply.status < 500:
            reply.body = _without_secrets(reply.body)
            return passed_on(reply)
        detail = f"{worker.url}: {trouble(reply)}"
    raise WorkerUnreachable(f"No worker answered {path}. {detail}")


def _without_secrets(body: bytes) -> bytes:
    """SGLang tells all its arguments, its own API keys among them: they are not for whoever reaches the router."""
    try:
        told = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body
    secrets = [name for name in _SECRETS if isinstance(told, dict) and told.get(name)]
    if not secrets:
        return body
    return msgspec.json.encode({**told, **dict.fromkeys(secrets, "***")})


# -- models ----------------------------------------------------------------------------------------------


async def models(context: Context, request: Request) -> Response:
    union = await _union_of_models(context)
    return JSON({"object": "list", "data": list(union.values())})


async def model(context: Context, request: Request) -> Response:
    name = request.path_params["model"]
    found = (await _union_of_models(context)).get(name)
    if found is None:
        raise NotFound(f"No healthy worker serves the model {name!r}.", param="model")
    return JSON(found)


async def _union_of_models(context: Context) -> Mapping[str, Any]:
    """Models of all serving workers by id, each as the first engine that has it describes it.

    Raises: Unavailable when there is no worker, or none that names a model.
    """
    cache = context.models
    async with cache.lock:  # who comes while the workers are being asked waits for that answer
        workers = context.serving()
        if workers != cache.workers or context.clock() >= cache.until:
            cache.models = await _ask_for_models(context, workers)
            cache.workers, cache.until = workers, context.clock() + _MODELS_HOLD
    if not cache.models:
        raise Unavailable("No models available: no healthy worker names one.", retry_after=1.0)
    return cache.models


async def _ask_for_models(context: Context, workers: tuple[Worker, ...]) -> dict[str, Any]:
    union: dict[str, Any] = {}
    for worker, reply in await get_from_all(context, workers, b"/v1/models"):
        listed = _objects(decoded(reply), "data")
        if not listed and worker.spec.model_id is not None:
            listed = [{"id": worker.spec.model_id, "object": "model", "owned_by": "local"}]
        for entry in listed:
            if isinstance(entry.get("id"), str):
                union.setdefault(entry["id"], entry)
    return union


def _objects(value: Any, field: str = "") -> list[dict[str, Any]]:
    """The objects of a list, which may stand in a field; anything of another shape counts as no objects."""
    if field:
        value = value.get(field) if isinstance(value, dict) else None
    if not isinstance(value, list):
        return []
    return [cast("dict[str, Any]", entry) for entry in value if isinstance(entry, dict)]


# -- loads -----------------------------------------------------------------------------------------------


async def loads(context: Context, request: Request) -> Response:
    """`load` is the engine's own report in tokens; where there is none, the router's running requests."""
    workers = list(context.fleet)
    reports = await asyncio.gather(*(_reported_load(context, worker) for worker in workers))
    rows = [
        {
            "worker": worker.url,
            "load": worker.load if reported is None else reported,
            "running": worker.load,
            "source": "router" if reported is None else "engine",
        }
        for worker, reported in zip(workers, reports, strict=True)
    ]
    return JSON({"workers": rows})


async def _reported_load(context: Context, worker: Worker) -> int | None:
    """Tokens that an engine holds and has queued; None when it does not tell."""
    if worker.health is Health.STARTING:
        return None
    said = await reports.ask(context.upstream, worker, reports.TOKENS, context.ask_timeout)
    return said.get("load_tokens")


# -- metrics ---------------------------------------------------------------------------------------------


async def metrics(context: Context, request: Request) -> Response:
    return exposition(context.metrics_render, request)


def exposition(render: Callable[[str], tuple[bytes, str]], request: Request) -> Response:
    """The router's metrics in the format the client prefers."""
    body, content_type = render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
