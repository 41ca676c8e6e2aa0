"""The table of the control plane: every path that is not relayed, who answers it, and who may ask.

ROUTES --> admin.app       serves it
      |--> admin.page      docs/endpoints.md
      '--> admin.openapi   GET /openapi.json, served from here
"""

from __future__ import annotations

from functools import cache

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.permissions import AccessKind
from sglang_router.admin import (
    adapters,
    adding,
    api_page,
    broadcast,
    decisions,
    engine_metrics,
    engine_relay,
    home,
    info,
    lists,
    openapi,
    options,
    replicas,
    workers,
)
from sglang_router.admin.context import Context
from sglang_router.admin.rows import ControlRow as Row


async def openapi_document(context: Context, request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(_document(), media_type="application/json")


async def openapi_page(context: Context, request: Request) -> Response:
    """Return the OpenAPI document as a page."""
    return Response(_page(), media_type="text/html", headers=api_page.HEADERS)


@cache
def _document() -> bytes:
    """Built once, at the first request: it takes 7 ms of the event loop."""
    return msgspec.json.encode(openapi.document(ROUTES))


@cache
def _page() -> bytes:
    """Built once, at the first request."""
    return api_page.html(openapi.document(ROUTES)).encode()


PUBLIC, CLIENTS, CHANGES = AccessKind.PUBLIC, AccessKind.INFERENCE, AccessKind.CONTROL_CHANGE
_ANY = "GET POST PUT PATCH DELETE"

ROUTES: dict[str, tuple[Row, ...]] = {
    "Health": (
        Row("GET /health", info.health, "200 and the text `OK` while the router runs.", PUBLIC),
        Row("GET /liveness", info.health, "The same as /health.", PUBLIC),
        Row(
            "GET /readiness",
            info.readiness,
            "200 while a healthy worker can take requests and the router is not stopping, else 503. A router that may"
            " scale to zero workers is ready without any: a request starts one.",
            PUBLIC,
        ),
        Row(
            "GET /health_generate",
            info.health_generate,
            "Lets a worker generate a token, at most once a second.",
            CLIENTS,
        ),
    ),
    "Information": (
        Row(
            "GET /v1/models",
            info.models,
            "The models of all healthy workers, as the engines list them, and aliases (marked: `alias_of`).",
            CLIENTS,
        ),
        Row("GET /v1/models/{model:path}", info.model, "One model, or alias.", CLIENTS),
        Row(
            "GET /get_model_info",
            info.from_a_worker,
            "What a healthy worker says of its model, without secrets.",
            CLIENTS,
        ),
        Row("GET /model_info", info.from_a_worker, "The same, under its newer name.", CLIENTS),
        Row(
            "GET /get_server_info",
            info.from_a_worker,
            "What a healthy worker says of itself, without secrets.",
            CLIENTS,
        ),
        Row("GET /server_info", info.from_a_worker, "The same, under its newer name.", CLIENTS),
        Row("GET /v1/files", lists.objects, "The files of all workers, one worker after the other.", CLIENTS),
        Row("GET /v1/batches", lists.objects, "The batches of all workers, one worker after the other.", CLIENTS),
        Row("GET /api/tags", lists.models, "The models that workers can load, in Ollama's form.", CLIENTS),
        Row("GET /api/ps", lists.models, "The models that workers have loaded, in Ollama's form.", CLIENTS),
        Row("GET /get_loads", info.loads, "The load of each worker: tokens if the engine reports them, else requests."),
        Row(
            "GET /decisions",
            decisions.index,
            "The last decisions: which worker each request got, and why.",
        ),
        Row("GET /decisions/{request:path}", decisions.show, "The decision about the request with this id."),
        Row(
            f"GET {home.PATH}",
            home.home,
            "The page for operators, for browsers; for programs, the name of the router and links.",
            PUBLIC,
        ),
        Row(
            "GET /overview",
            home.overview,
            "What the page shows, in JSON; with `Accept: text/event-stream` as a stream, a frame a second.",
        ),
        Row("GET /version", info.version, "The version of the router, and whether it runs compiled."),
        Row(
            "GET /config",
            options.index,
            "The options in effect, and where each value comes from; secrets are hidden.",
        ),
        Row("GET /metrics", info.metrics, "The metrics of the router, for Prometheus."),
        Row("GET /engine_metrics", engine_metrics.merged, "The metrics of all engines; label `worker_addr`: the URL."),
        Row(f"GET {openapi.PAGE}", openapi_page, "The same document as a page for people; it needs no other server."),
        Row(f"GET {openapi.PATH}", openapi_document, "The OpenAPI 3.1 document of all endpoints."),
    ),
    "Configuration": (
        Row(
            "POST /reload",
            options.reload,
            "Reads the file of --config, keys and certificates again, as SIGHUP does: all of it, or nothing (422).",
        ),
    ),
    "Broadcast": (
        Row(
            "GET POST /flush_cache", broadcast.flush_cache, "Flushes all caches; the router forgets the prefixes, too."
        ),
        Row("POST /reset_prefix_cache", broadcast.broadcast, "The same, with vLLM's name and the results of each."),
        Row("POST /update_weights_from_disk", broadcast.broadcast, "Loads new weights on all workers."),
        Row("POST /update_weights_from_tensor", broadcast.broadcast, "Loads new weights on all workers."),
        Row("POST /update_weights_from_distributed", broadcast.broadcast, "Loads new weights on all workers."),
        Row("POST /update_weights_from_ipc", broadcast.broadcast, "Loads new weights on all workers."),
        Row("POST /init_weights_update_group", broadcast.broadcast, "Lets all workers join the group of the trainer."),
        Row("POST /destroy_weights_update_group", broadcast.broadcast, "Lets all workers leave that group."),
        Row("POST /update_weight_version", broadcast.broadcast, "Names the version of the weights of all workers."),
        Row("GET POST /get_weights_by_name", broadcast.broadcast, "A part of the weights of all workers."),
        Row("POST /weights_checker", broadcast.broadcast, "Compares the weights of all workers."),
        Row("POST /abort_request", broadcast.broadcast, "Aborts one request (`rid`) or all of them, on all workers."),
        Row("POST /pause_generation", broadcast.broadcast, "Pauses all workers: no new requests until they continue."),
        Row("POST /continue_generation", broadcast.broadcast, "Ends that pause."),
        Row("POST /release_memory_occupation", broadcast.broadcast, "Releases memory (`tags`) and pauses the workers."),
        Row(
            "POST /resume_memory_occupation",
            broadcast.broadcast,
            "Takes it again (`tags`); with all of it, they serve.",
        ),
        Row("POST /slow_down", broadcast.broadcast, "Slows all workers down, for tests."),
        Row("POST PUT /set_internal_state", broadcast.broadcast, "Changes settings of all workers."),
        Row("POST /pause", broadcast.broadcast, "vLLM's pause of generation."),
        Row("POST /resume", broadcast.broadcast, "Ends vLLM's pause."),
        Row("GET /is_paused", broadcast.question, "Whether each vLLM worker is paused."),
        Row("POST /sleep", broadcast.broadcast, "vLLM: releases memory (`?level=`) and pauses the workers."),
        Row("POST /wake_up", broadcast.broadcast, "vLLM: takes it again (`?tags=`)."),
        Row("GET /is_sleeping", broadcast.question, "Whether each vLLM worker sleeps."),
        Row("POST /collective_rpc", broadcast.broadcast, "vLLM: calls a method of all engines' processes."),
        Row("POST /init_weight_transfer_engine", broadcast.broadcast, "vLLM: prepares for new weights of a trainer."),
        Row("POST /update_weights", broadcast.broadcast, "vLLM: loads new weights of a trainer."),
        Row("POST /start_profile", broadcast.broadcast, "Starts the profiler of all workers."),
        Row("POST /stop_profile", broadcast.broadcast, "Stops the profiler of all workers."),
        Row("POST /v1/load_lora_adapter", adapters.load, "Loads an adapter (LoRA) at all workers of a model."),
        Row("POST /v1/unload_lora_adapter", adapters.unload, "Unloads an adapter where it is loaded."),
        Row("POST /load_lora_adapter", adapters.load, "The same as /v1/load_lora_adapter, under SGLang's name."),
        Row("POST /unload_lora_adapter", adapters.unload, "The same as /v1/unload_lora_adapter."),
        Row(f"{_ANY} /v1/rl/engine/{{path:path}}", broadcast.any_path, "Sends any request to all workers.", CHANGES),
    ),
    "One engine": (
        Row(
            f"{_ANY} /engine/{{id}}/{{path:path}}",
            engine_relay.relay,
            "Passes any request but generation on to the engine of one worker; the answer is the engine's.",
            CHANGES,
        ),
        Row(
            f"{_ANY} /v1/rl/workers/{{id}}/engine/{{path:path}}",
            engine_relay.relay_rl,
            "The same, under another router's name.",
            CHANGES,
        ),
        Row("GET /v1/rl/workers", workers.index, "The same as GET /workers."),
    ),
    "Scaling": (
        Row(
            "POST /add_worker",
            adding.add,
            "`?url=U[&api_key=K][&wait=false]`: adds the worker (`U@1`: a rank); 200 once healthy, else 202 at once.",
        ),
        Row("POST /remove_worker", workers.remove, "`?url=U`: removes the worker; its requests in flight finish."),
        Row("GET /list_workers", workers.urls, 'The URLs of all workers: `{"urls": [...]}`.'),
        Row("POST /workers", workers.create, "Registers the worker in the body; 202 with its id."),
        Row("GET /workers", workers.index, "All workers with their state."),
        Row(
            "POST /workers/{id:path}/drain", workers.drain, "Stops new requests; the worker keeps its cached prefixes."
        ),
        Row(
            "POST /workers/{id:path}/resume",
            workers.resume,
            "Ends the drain or a pause; the worker takes requests again.",
        ),
        Row("POST /workers/{id:path}/restart", replicas.restart, "Drains the worker, then restarts its engine; 202."),
        Row("POST /restart_workers", replicas.restart_all, "Restarts all engines, one after the other; 202."),
        Row("GET /restart_workers", replicas.rolling, "The progress of that restart."),
        Row("GET /scale", replicas.scale, "The desired number of workers, and the last decisions with reasons."),
        Row("GET /workers/{id:path}", workers.show, "One worker; `id` is its id or its percent-encoded URL."),
        Row("PUT /workers/{id:path}", workers.change, "Changes API key, priority, cost, labels or health checks; 202."),
        Row("DELETE /workers/{id:path}", workers.delete, "Removes the worker; its requests in flight finish; 202."),
    ),
}
"""All rows by group, in the order in which paths are matched."""
