"""Information about the router and its workers: health, readiness, models, loads, metrics.

`/health` and `/liveness` say that the router runs, `/readiness` that a request would find a worker, and
`/health_generate` that a worker really computes: it lets one generate a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sglang_router.access.redaction import redacted
from sglang_router.admin.ask import Reply, all_of, ask, decoded, failure, get_from_all, passed_on, unauthorized
from sglang_router.admin.context import JSON, Context, Render
from sglang_router.errors import NotFound, Unavailable, WorkerUnreachable
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.roles import REGULAR
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.version import __version__, build
from sglang_router.workers import engine_survey
from sglang_router.workers.fetch import Fetched, Sent

_TRIES = 3
"""The most workers that are asked, one after the other, for what any of them can answer."""
_OTHER_NAMES = {
    "/get_model_info": "/model_info",
    "/model_info": "/get_model_info",
    "/get_server_info": "/server_info",
    "/server_info": "/get_server_info",
}
"""An engine knows only one of the two names; which one depends on its version."""


# -- health ----------------------------------------------------------------------------------------------


async def health(context: Context, request: Request) -> Response:
    """Answer 200 while the router runs."""
    return PlainTextResponse("OK")


async def readiness(context: Context, request: Request) -> Response:
    """Answer 200 while a healthy worker can take requests and the router is not about to stop, else 503.

    Where autoscaling may stop the last worker (`--autoscale 0:N`), a router without any is ready: it holds requests,
    and the first of them starts a worker; a load balancer that sent none would wait for ever. Of prefill and decode
    workers there must be one each. A router that shares its knowledge learns first what the others know, for some
    seconds at most; whether it reaches them later is told, and counts for nothing.
    """
    counts: dict[str, Any] = {"healthy_workers": _healthy(context), "total_workers": len(context.fleet)}
    if (sharing := context.sharing) is not None:
        counts["shared_state"] = {"state": sharing.state, "peers": len(sharing.reading.peers)}
    if reason := unready(context):
        return JSON({"status": "not ready", "reason": reason, **counts}, 503)
    return JSON({"status": "ready", **counts})


def unready(context: Context) -> str:
    """Return why the router is not ready; "" when it is."""
    if context.ending:
        return "shutting down"
    if context.lacks:
        return context.lacks
    if not _healthy(context) and not _wakes_one(context):
        return "insufficient healthy workers"
    learns = context.sharing is not None and not context.sharing.learned
    return "learning what the other routers know" if learns else ""


def _healthy(context: Context) -> int:
    """Return how many healthy workers can take requests."""
    return sum(worker.health is Health.HEALTHY for worker in context.fleet.candidates(context.clock()))


def _wakes_one(context: Context) -> bool:
    """Whether a request is held until a worker has started, and starts one if none does (`routing.reasons`)."""
    in_rotation = (worker for worker in context.fleet if worker.in_rotation)
    return context.args.scales_to_zero and all(
        worker.health is Health.STARTING and not worker.hopeless for worker in in_rotation
    )


async def health_generate(context: Context, request: Request) -> Response:
    """Let a worker generate a token; try up to three workers. All who ask within a second share the result, whatever
    key they send: only that an engine wants another key is answered to who sent the wrong one, and costs no token.
    Of pairs, a prefill and a decode worker must, each for itself.

    Raises: Unavailable, when all of them fail.
    """
    workers = context.serving()
    sent = context.sent(request)

    async def generate() -> Response | str:
        result: Response | str = ""
        for group in _groups(workers):
            result = await _one_generates(context, group, sent)
            if isinstance(result, str) or result.status_code != 200:
                break
        return result

    asked = (frozenset(worker.id for worker in workers),)
    result: Response | str = await context.generated.get(asked, context.clock, generate, _for_all)
    if isinstance(result, str):
        raise Unavailable(f"No worker could generate a token. {result}", retry_after=1.0)
    return result


def _groups(workers: tuple[Worker, ...]) -> list[list[Worker]]:
    """Return groups of workers, each of which needs one that works: all regular ones; else those of each role."""
    by_role: dict[str, list[Worker]] = {}
    for worker in workers:
        by_role.setdefault(worker.role, []).append(worker)
    regular = by_role.get(REGULAR)
    return [regular] if regular else list(by_role.values())


async def _one_generates(context: Context, workers: list[Worker], sent: Sent) -> Response | str:
    """Ask workers until one generates; return OK, or why none does."""
    failures = []
    for worker in sorted(workers, key=lambda worker: worker.load)[:_TRIES]:
        reply = await _generate(context, worker, sent)
        if isinstance(reply, Fetched) and unauthorized(reply):
            return await passed_on(context, reply)
        reason = failure(reply)
        if reason is None:
            return PlainTextResponse("OK")
        failures.append(f"{worker.url}: {reason}")
    return "; ".join(failures)


def _for_all(result: Response | str) -> bool:
    return isinstance(result, str) or result.status_code == 200


async def _generate(context: Context, worker: Worker, sent: Sent) -> Reply:
    """Let a worker generate one token, which is load. An engine without /health_generate gets a prompt."""
    limit = context.timeouts.generate
    lease = context.fleet.lease(worker)
    try:
        reply = await ask(context, worker, b"GET", b"/health_generate", sent=sent, timeout=limit)
        if isinstance(reply, Fetched) and reply.status == 404:
            prompt: dict[str, Any] = {"prompt": "1", "max_tokens": 1}
            if worker.model is not None:
                prompt["model"] = worker.model
            body = msgspec.json.encode(prompt)
            reply = await ask(context, worker, b"POST", b"/v1/completions", body=body, sent=sent, timeout=limit)
    finally:  # also when the client leaves: that cancels this coroutine
        lease.close(Outcome.GONE, context.clock())  # health is decided by the checks alone
    return reply


# -- the router itself --------------------------------------------------------------------------------


async def version(context: Context, request: Request) -> Response:
    """Answer the version, and whether the router runs compiled."""
    return JSON({"version": __version__, "build": build()})


# -- what one worker answers ------------------------------------------------------------------------


async def from_a_worker(context: Context, request: Request) -> Response:
    """Pass on the answer of the first worker that has one, without secrets: SGLang tells all of its arguments."""
    path: str = request.state.path
    sent = context.sent(request)
    detail = ""
    for worker in context.serving()[:_TRIES]:
        reply = await ask(context, worker, b"GET", path.encode(), sent=sent)
        if isinstance(reply, Fetched) and reply.status == 404:
            reply = await ask(context, worker, b"GET", _OTHER_NAMES[path].encode(), sent=sent)
        if isinstance(reply, Fetched) and reply.status < 500:
            return await passed_on(context, reply)
        detail = f"{worker.url}: {failure(reply)}"
    raise WorkerUnreachable(f"No worker answered {path}. {detail}")


# -- models ----------------------------------------------------------------------------------------------


async def models(context: Context, request: Request) -> Response:
    """Return the models of all healthy workers, and their aliases, each once."""
    merged = await _merged_models(context, request)
    return merged if isinstance(merged, Response) else JSON({"object": "list", "data": list(merged.values())})


async def model(context: Context, request: Request) -> Response:
    """Return one model.

    Raises: NotFound, when no healthy worker serves it.
    """
    name = request.path_params["model"]
    merged = await _merged_models(context, request)
    if isinstance(merged, Response):
        return merged
    found = merged.get(name)
    if found is None:
        raise NotFound(f"No healthy worker serves the model {name!r}.", param="model")
    return JSON(found)


async def _merged_models(context: Context, request: Request) -> Mapping[str, Any] | Response:
    """The models of all serving workers by id, each as the first engine that has it describes it.

    An engine's own answer, when no model is named because it wants another key.
    Raises: Unavailable when there is no worker, or none that names a model.
    """
    workers = context.serving()
    sent = context.sent(request)

    async def ask_all() -> dict[str, Any] | Response:
        return await _ask_for_models(context, workers, sent)

    merged = await context.models.get((workers, sent), context.clock, ask_all)
    if not merged:
        raise Unavailable("No models available: no healthy worker names one.", retry_after=1.0)
    return cast("Mapping[str, Any] | Response", merged)


async def _ask_for_models(context: Context, workers: tuple[Worker, ...], sent: Sent) -> dict[str, Any] | Response:
    merged: dict[str, Any] = {}
    refusal: Fetched | None = None
    for worker, reply in await get_from_all(context, workers, b"/v1/models", sent):
        if isinstance(reply, Fetched) and unauthorized(reply):
            refusal = refusal or reply
        listed = _objects(decoded(reply), "data")
        if not listed and worker.model is not None:
            listed = [{"id": worker.model, "object": "model", "owned_by": "local"}]
        for entry in redacted(listed, context.keys()):
            if isinstance(entry.get("id"), str):
                merged.setdefault(entry["id"], entry)
        given = worker.spec.model_id
        if given is not None and listed and worker.announced.bases:
            _add_alias(merged, given, worker.announced.bases[0])
    for alias, meant in context.aliases.items():
        _add_alias(merged, alias, meant)
    return await passed_on(context, refusal) if refusal is not None and not merged else merged


def _add_alias(merged: dict[str, Any], alias: str, meant: str) -> None:
    """Add an alias: the entry of its model, or of the model of "model:adapter", under another name and marked."""
    entry = merged.get(meant) or merged.get(meant.partition(":")[0])
    if entry is not None:
        merged.setdefault(alias, {**entry, "id": alias, "alias_of": meant})


def _objects(value: Any, field: str = "") -> list[dict[str, Any]]:
    """The objects of a list, or of a list in a field; nothing if the value has another shape."""
    if field:
        value = value.get(field) if isinstance(value, dict) else None
    if not isinstance(value, list):
        return []
    return [cast("dict[str, Any]", entry) for entry in value if isinstance(entry, dict)]


# -- loads -----------------------------------------------------------------------------------------------


async def loads(context: Context, request: Request) -> Response:
    """`load` is what the engine reports, in tokens; without a report, the router's requests in flight there."""
    workers = list(context.fleet)
    reports = await all_of(_reported_load(context, worker) for worker in workers)
    rows = [
        {
            "worker": worker.url,
            "load": worker.own_load if reported is None else reported,
            "running": worker.own_load,
            "worker_type": worker.role,
            "source": "router" if reported is None else "engine",
        }
        for worker, reported in zip(workers, reports, strict=True)
    ]
    return JSON({"workers": rows})


async def _reported_load(context: Context, worker: Worker) -> int | None:
    """Tokens that an engine holds and has queued; None if it does not report them."""
    if worker.health is Health.STARTING:
        return None
    said = await engine_survey.ask(context.pool, worker, engine_survey.TOKENS, context.timeouts.question)
    return said.get("load_tokens")


# -- metrics ---------------------------------------------------------------------------------------------


async def metrics(context: Context, request: Request) -> Response:
    """Return the router's metrics."""
    return await exposition(context.metrics_render, request)


async def exposition(render: Render, request: Request) -> Response:
    """The router's metrics, in the format that the client prefers."""
    body, content_type = await render(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})
