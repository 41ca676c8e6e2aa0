"""The engine's control side: health, information, load, metrics, cache, aborting, pausing, weights.

Names and shapes are SGLang's. `/health` only says that the engine is up; `/health_generate` computes a
token.
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
from sglang_router.engine.runner import Engine, EngineError, Job
from sglang_router.engine.scheduler import Scheduler

Handler = Callable[[Request], Awaitable[Response]]

GENERATES_WITHIN = 20.0  # seconds, SGLang's limit for /health_generate


class Status:
    """Whether the engine is ready. `ready_at` is in the loop's time; `failed` is final."""

    def __init__(self) -> None:
        self.ready_at = float("inf")
        self.failed = False

    @property
    def ready(self) -> bool:
        return not self.failed and asyncio.get_running_loop().time() >= self.ready_at


class EngineCollector(Collector):
    """Reads the scheduler when metrics are asked for, so a pass pays nothing for them."""

    def __init__(self, scheduler: Scheduler, model: str) -> None:
        self._scheduler = scheduler
        self._model = model

    def collect(self) -> Iterator[Metric]:
        scheduler, totals = self._scheduler, self._scheduler.totals
        kv = scheduler.kv
        used = kv.locked + kv.private
        for name, about, value in (
            ("num_running_reqs", "Requests in the batch.", scheduler.active),
            ("num_queue_reqs", "Requests waiting.", len(scheduler.waiting)),
            ("num_used_tokens", "Token slots held by the batch.", used),
            ("token_usage", "Share of the token slots held by the batch.", used / kv.capacity),
            ("cache_hit_rate", "Share of the last admitted prompt found in the cache.", totals.last_hit_rate),
            ("max_total_num_tokens", "Token slots.", kv.capacity),
            ("num_retracted_reqs", "Times a request was sent back to the queue.", totals.retracted),
        ):
            gauge = GaugeMetricFamily("sglang:" + name, about, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, about, value in (
            ("prompt_tokens", "Tokens of admitted prompts.", totals.prompt_tokens),
            ("cached_tokens", "Tokens of admitted prompts found in the cache.", totals.cached_tokens),
            ("generation_tokens", "Tokens written.", totals.generated_tokens),
            ("num_requests", "Requests that ran to their end.", totals.finished),
            ("num_aborted_requests", "Requests aborted.", totals.aborted),
            ("evicted_tokens", "Tokens evicted from the cache.", kv.evicted),
        ):
            counter = CounterMetricFamily("sglang:" + name, about, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter


class Control:
    """The handlers."""

    def __init__(self, engine: Engine, options: EngineOptions, registry: CollectorRegistry, status: Status) -> None:
        self._engine = engine
        self._options = options
        self._registry = registry
        self._status = status
        self._started = int(time.time())
        registry.register(EngineCollector(engine.scheduler, options.model))

    def routes(self) -> list[Route]:
        """All of them, with every path they are known by."""
        table: list[tuple[str, Handler, list[str]]] = [
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
            ("/update_weights_from_disk", self.update_weights, ["POST"]),
            ("/update_weights_from_tensor", self.update_weights, ["POST"]),
            ("/update_weights_from_distributed", self.update_weights, ["POST"]),
        ]
        return [Route(path, handler, methods=methods) for path, handler, methods in table]

    # -- what it is and how it is --------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 when ready, 503 before."""
        return Response(status_code=200 if self._status.ready else 503)

    async def health_generate(self, request: Request) -> Response:
        """200 when a token could be computed within 20 s."""
        if not self._status.ready:
            return Response(status_code=503)
        try:
            await asyncio.wait_for(compute(self._engine, [Job([0], 1)], request.receive), GENERATES_WITHIN)
        except asyncio.TimeoutError:
            return Response(status_code=503)
        return Response()

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format, under SGLang's names."""
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        """The one model there is."""
        name = self._options.model
        model = {"id": name, "object": "model", "created": self._started, "owned_by": "sglang", "root": name}
        more = {"parent": None, "max_model_len": self._options.context}
        return json_response({"object": "list", "data": [model | more]})

    async def get_load(self, request: Request) -> Response:
        """The load of each data-parallel rank."""
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
        """The same as newer SGLang tells it."""
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
        """The load of each rank."""
        ranks = self._options.dp_size
        return [{"dp_rank": 0} | self._load()] if ranks == 1 else [self._load_of(rank) for rank in range(ranks)]

    def _load_of(self, rank: int) -> dict[str, Any]:
        """One rank of several. They share the scheduler; whose a request is, its namespace tells (`Parser`)."""
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
        """Of one rank, in tokens."""
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
        """What the model is."""
        name = self._options.model
        paths = {"model_path": name, "tokenizer_path": name, "is_generation": True}
        return json_response(paths | {"preferred_sampling_params": None, "weight_version": "default"})

    async def server_info(self, request: Request) -> Response:
        """The options, and the state inside."""
        options = asdict(self._options)
        del options["api_key"]
        names = {"model_path": self._options.model, "served_model_name": self._options.model}
        sizes = {"tp_size": 1, "disaggregation_mode": "null"}
        size = {"max_total_num_tokens": self._capacity, "context_length": self._options.context}
        state = {"internal_states": self._loads(), "status": "ready" if self._status.ready else "starting"}
        return json_response(options | names | sizes | size | state | {"version": __version__})

    # -- what can be done to it ----------------------------------------------------------------------------

    async def flush_cache(self, request: Request) -> Response:
        """Empty the cache; 400 and nothing done while anything waits or runs, as SGLang does."""
        if self._engine.scheduler.flush():
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Not flushed: requests are waiting or running.\n", 400)

    async def abort_request(self, request: Request) -> Response:
        """Abort requests whose ids begin with `rid`, or all with `abort_all`. 200 even if there is none."""
        body = await _optional_object(request)
        if body.get("abort_all"):
            self._engine.abort_all()
        elif isinstance(body.get("rid"), str) and body["rid"]:
            self._engine.abort(body["rid"])
        else:
            raise EngineError(400, "Either 'rid' or 'abort_all' is needed.")
        return Response()

    async def pause_generation(self, request: Request) -> Response:
        """Stop computing. `mode` is abort (default), retract or in_place."""
        mode = (await _optional_object(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise EngineError(400, "'mode' is one of abort, retract, in_place.")
        self._engine.pause(mode)
        return json_response({"status": "ok", "message": "Generation paused."})

    async def continue_generation(self, request: Request) -> Response:
        """Compute again."""
        self._engine.resume()
        return json_response({"status": "ok", "message": "Generation continues."})

    async def start_profile(self, request: Request) -> Response:
        """Accepted; there is nothing to profile."""
        return PlainTextResponse("Profiling started.\n")

    async def stop_profile(self, request: Request) -> Response:
        """Accepted."""
        return PlainTextResponse("Profiling stopped.\n")

    async def update_weights(self, request: Request) -> Response:
        """Let the batch end, then forget the cache, unless `flush_cache` is false. There are no weights."""
        body = await _optional_object(request)
        await self._engine.update(flush=bool(body.get("flush_cache", True)))
        done = {"success": True, "message": "Weights updated.", "num_paused_requests": 0}
        return json_response(done)


async def _optional_object(request: Request) -> Body:
    raw = await request.body()
    return read_object(raw) if raw else {}
