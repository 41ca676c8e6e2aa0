"""The engine's control endpoints: health, information, load, metrics, cache, aborting, pausing, weights.

Names and shapes are SGLang's. `/health` only says that the engine is up; `/health_generate` computes a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sglang_router import __version__
from sglang_router.engine.answer import compute, json_response
from sglang_router.engine.options import EngineOptions
from sglang_router.engine.parse import Body, read_object
from sglang_router.engine.runner import Engine, EngineError, EngineJob
from sglang_router.engine.scheduler import EngineScheduler

EngineHandler = Callable[[Request], Awaitable[Response]]

GENERATES_WITHIN = 20.0  # seconds, SGLang's limit for /health_generate


class EngineStatus:
    """Whether the engine is ready. `ready_at` is a time of the event loop's clock; `failed` is final."""

    def __init__(self) -> None:
        self.ready_at = float("inf")
        self.failed = False

    @property
    def ready(self) -> bool:
        return not self.failed and asyncio.get_running_loop().time() >= self.ready_at


class EngineCollector(Collector):
    """Reads the scheduler when metrics are requested, so that they cost nothing in a pass."""

    def __init__(self, scheduler: EngineScheduler, model: str) -> None:
        self._scheduler = scheduler
        self._model = model

    def collect(self) -> Iterator[Metric]:
        scheduler, totals = self._scheduler, self._scheduler.totals
        kv = scheduler.kv
        used = kv.locked + kv.private
        for name, about, value in (
            ("num_running_reqs", "Requests in the batch.", scheduler.active),
            ("num_queue_reqs", "Requests in the queue.", len(scheduler.waiting)),
            ("num_used_tokens", "Token slots held by the batch.", used),
            ("token_usage", "Share of the token slots held by the batch.", used / kv.capacity),
            ("cache_hit_rate", "Share of the last admitted prompt found in the cache.", totals.last_hit_rate),
            ("max_total_num_tokens", "Token slots.", kv.capacity),
            ("num_retracted_reqs", "Times that a request was moved back to the queue.", totals.retracted),
        ):
            gauge = GaugeMetricFamily("sglang:" + name, about, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, about, value in (
            ("prompt_tokens", "Tokens of admitted prompts.", totals.prompt_tokens),
            ("cached_tokens", "Tokens of admitted prompts found in the cache.", totals.cached_tokens),
            ("generation_tokens", "Tokens written.", totals.generated_tokens),
            ("num_requests", "Requests that finished.", totals.finished),
            ("num_aborted_requests", "Requests aborted.", totals.aborted),
            ("evicted_tokens", "Tokens evicted from the cache.", kv.evicted),
        ):
            counter = CounterMetricFamily("sglang:" + name, about, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter


class EngineControl:
    """The handlers of the control endpoints."""

    def __init__(
        self, engine: Engine, options: EngineOptions, registry: CollectorRegistry, status: EngineStatus
    ) -> None:
        self._engine = engine
        self._options = options
        self._registry = registry
        self._status = status
        self._started = int(time.time())
        self._adapters = {name: name for name in options.lora.split(",") if name}  # their paths, by name
        registry.register(EngineCollector(engine.scheduler, options.model))

    def routes(self) -> list[Route]:
        """Return the routes of all handlers, with all paths of each."""
        table: list[tuple[str, EngineHandler, list[str]]] = [
            ("/health", self.health, ["GET"]),
            ("/health_generate", self.health_generate, ["GET"]),
            ("/metrics", self.metrics, ["GET"]),
            ("/v1/models", self.models, ["GET"]),
            ("/get_load", self.get_load, ["GET"]),
            ("/v1/loads", self.loads, ["GET"]),
            ("/get_model_info", self.model_info, ["GET"]),
            ("/model_info", self.model_info, ["GET"]),
            ("/get_server_info", self.server_info, ["GET"]),
            ("/server_info", self.server_info, ["GET"]),
            ("/flush_cache", self.flush_cache, ["GET", "POST"]),
            ("/abort_request", self.abort_request, ["POST"]),
            ("/pause_generation", self.pause_generation, ["POST"]),
            ("/continue_generation", self.continue_generation, ["POST"]),
            ("/start_profile", self.start_profile, ["GET", "POST"]),
            ("/stop_profile", self.stop_profile, ["GET", "POST"]),
            ("/load_lora_adapter", self.load_adapter, ["POST"]),
            ("/unload_lora_adapter", self.unload_adapter, ["POST"]),
            ("/update_weights_from_disk", self.update_weights, ["POST"]),
            ("/update_weights_from_tensor", self.update_weights, ["POST"]),
            ("/update_weights_from_distributed", self.update_weights, ["POST"]),
        ]
        return [Route(path, handler, methods=methods) for path, handler, methods in table]

    # -- reading -------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Answer 200 when ready, 503 before."""
        return Response(status_code=200 if self._status.ready else 503)

    async def health_generate(self, request: Request) -> Response:
        """Answer 200 if a token can be computed within 20 s, else 503."""
        if not self._status.ready:
            return Response(status_code=503)
        try:
            await asyncio.wait_for(compute(self._engine, [EngineJob([0], 1)], request.receive), GENERATES_WITHIN)
        except asyncio.TimeoutError:
            return Response(status_code=503)
        return Response()

    async def metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus' text format, under SGLang's names."""
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        """Answer with the engine's only model, and the adapters that are loaded."""
        name = self._options.model
        kind = {"object": "model", "created": self._started, "owned_by": "sglang"}
        model = {"id": name, **kind, "root": name, "parent": None, "max_model_len": self._options.context}
        loaded = [{"id": each, **kind, "root": path, "parent": name} for each, path in self._adapters.items()]
        return json_response({"object": "list", "data": [model, *loaded]})

    async def get_load(self, request: Request) -> Response:
        """Answer with the load of each data-parallel rank."""
        rows = [
            {
                "dp_rank": load["dp_rank"],
                "num_reqs": load["num_running_reqs"] + load["num_waiting_reqs"],
                "num_waiting_reqs": load["num_waiting_reqs"],
                "num_tokens": load["num_total_tokens"],
            }
            for load in self._loads()
        ]
        return json_response(rows)

    async def loads(self, request: Request) -> Response:
        """Answer with the same in the shape of newer SGLang versions."""
        load, loads = self._load(), self._loads()
        return json_response(
            {
                "timestamp": time.time(),
                "version": __version__,
                "dp_rank_count": len(loads),
                "loads": loads,
                "aggregate": {
                    "total_running_reqs": load["num_running_reqs"],
                    "total_waiting_reqs": load["num_waiting_reqs"],
                    "total_reqs": load["num_running_reqs"] + load["num_waiting_reqs"],
                    "avg_token_usage": load["token_usage"],
                },
            }
        )

    def _loads(self) -> list[dict[str, Any]]:
        """Return the load of each rank."""
        ranks = self._options.dp_size
        return [{"dp_rank": 0} | self._load()] if ranks == 1 else [self._load_of(rank) for rank in range(ranks)]

    def _load_of(self, rank: int) -> dict[str, Any]:
        """Return the load of one rank of several. Ranks share the scheduler; a request's namespace begins with its rank
        (see `BodyParser`)."""
        scheduler, mark = self._engine.scheduler, f"{rank}\0"
        batch = [r for r in (*scheduler.prefilling, *scheduler.running) if r.namespace.startswith(mark)]
        waiting = [r for r in scheduler.waiting if r.namespace.startswith(mark)]
        used, capacity = sum(r.length for r in batch), self._capacity
        return {
            "dp_rank": rank,
            "num_running_reqs": len(batch),
            "num_waiting_reqs": len(waiting),
            "num_used_tokens": used,
            "num_total_tokens": used + sum(r.length for r in waiting),
            "max_total_num_tokens": capacity,
            "token_usage": used / capacity,
            "max_running_requests": scheduler.limits.max_running,
        }

    @property
    def _capacity(self) -> int:
        """Cache of one rank, in tokens."""
        return self._engine.scheduler.kv.capacity // self._options.dp_size

    def _load(self) -> dict[str, Any]:
        scheduler = self._engine.scheduler
        used = scheduler.kv.locked + scheduler.kv.private
        return {
            "num_running_reqs": scheduler.active,
            "num_waiting_reqs": len(scheduler.waiting),
            "num_used_tokens": used,
            "num_total_tokens": scheduler.load_tokens,
            "max_total_num_tokens": scheduler.kv.capacity,
            "token_usage": used / scheduler.kv.capacity,
            "cache_hit_rate": scheduler.totals.last_hit_rate,
            "max_running_requests": scheduler.limits.max_running,
        }

    async def model_info(self, request: Request) -> Response:
        """Answer with information about the model."""
        name = self._options.model
        paths = {"model_path": name, "tokenizer_path": name, "is_generation": True}
        return json_response(paths | {"preferred_sampling_params": None, "weight_version": "default"})

    async def server_info(self, request: Request) -> Response:
        """Answer with the options and the internal state."""
        options = asdict(self._options)
        del options["api_key"]
        names = {"model_path": self._options.model, "served_model_name": self._options.model}
        sizes = {"tp_size": 1, "disaggregation_mode": "null"}
        size = {"max_total_num_tokens": self._capacity, "context_length": self._options.context}
        state = {"internal_states": self._loads(), "status": "ready" if self._status.ready else "starting"}
        return json_response(options | names | sizes | size | state | {"version": __version__})

    # -- changing ------------------------------------------------------------------------------------------

    async def flush_cache(self, request: Request) -> Response:
        """Empty the cache. While requests are queued or running, do nothing and answer 400, as SGLang does."""
        if self._engine.scheduler.flush():
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Not flushed: requests are queued or running.\n", 400)

    async def abort_request(self, request: Request) -> Response:
        """Abort the requests whose ids begin with `rid`, or all with `abort_all`. Answer 200 even if there is none."""
        body = await _optional_object(request)
        if body.get("abort_all"):
            self._engine.abort_all()
        elif isinstance(body.get("rid"), str) and body["rid"]:
            self._engine.abort(body["rid"])
        else:
            raise EngineError(400, "Give either 'rid' or 'abort_all'.")
        return Response()

    async def pause_generation(self, request: Request) -> Response:
        """Stop computing. `mode` is abort (default), retract or in_place."""
        mode = (await _optional_object(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise EngineError(400, "'mode' must be one of abort, retract, in_place.")
        self._engine.pause(mode)
        return json_response({"status": "ok", "message": "EngineGeneration paused."})

    async def continue_generation(self, request: Request) -> Response:
        """Undo `pause_generation`."""
        self._engine.resume()
        return json_response({"status": "ok", "message": "EngineGeneration continues."})

    async def start_profile(self, request: Request) -> Response:
        """Accept the request and do nothing."""
        return PlainTextResponse("Profiling started.\n")

    async def stop_profile(self, request: Request) -> Response:
        """Accept the request and do nothing."""
        return PlainTextResponse("Profiling stopped.\n")

    async def load_adapter(self, request: Request) -> Response:
        """List an adapter as loaded from now on. There are no weights; any path will do."""
        body = await _optional_object(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not (isinstance(name, str) and name and isinstance(path, str)):
            raise EngineError(400, "Give the adapter's 'lora_name' and its 'lora_path'.")
        if name in self._adapters:
            return json_response({"success": False, "error_message": f"{name} is loaded already."}, 400)
        self._adapters[name] = path
        return json_response({"success": True, "loaded_adapters": self._adapters})

    async def unload_adapter(self, request: Request) -> Response:
        """List an adapter no more."""
        name = (await _optional_object(request)).get("lora_name")
        if not isinstance(name, str) or self._adapters.pop(name, None) is None:
            return json_response({"success": False, "error_message": f"{name} is not loaded."}, 400)
        return json_response({"success": True, "loaded_adapters": self._adapters})

    async def update_weights(self, request: Request) -> Response:
        """Wait for the batch to end, then empty the cache unless `flush_cache` is false. There are no weights."""
        body = await _optional_object(request)
        await self._engine.update(flush=bool(body.get("flush_cache", True)))
        done = {"success": True, "message": "Weights updated.", "num_paused_requests": 0}
        return json_response(done)


async def _optional_object(request: Request) -> Body:
    raw = await request.body()
    return read_object(raw) if raw else {}
