"""Load and unload adapters (LoRA) at all workers of a model: under vLLM's paths and under SGLang's.

    POST /v1/load_lora_adapter?model=llama  {"lora_name": "sql", "lora_path": "/adapters/sql"}
      --> every engine that serves llama; one that knows only SGLang's path gets that
      --> those that succeeded serve the name "sql" from this moment on; the answer has the result of each

The body goes to the engines as it came. `model` is needed only where the fleet serves several models: without it, an
adapter is loaded at all workers of the only model, and unloaded where it is.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang_router.admin.broadcast import ask_all, done_by, results_of
from sglang_router.admin.context import Context
from sglang_router.admin.shapes import Adapter
from sglang_router.errors import InvalidRequest, NoWorkers
from sglang_router.routing.model_names import Names, names_of, text_of
from sglang_router.routing.worker import Worker

_MOST_BYTES = 1 << 18
"""The longest description of an adapter."""


async def load(context: Context, request: Request) -> Response:
    """Load an adapter at the workers of a model."""
    name = _name(await request.body())
    replies = await ask_all(context, request, _workers(context, request.query_params.get("model", "")))
    for worker in done_by(replies):
        _announce(context, worker, name, loaded=True)
    return results_of(context, replies)


async def unload(context: Context, request: Request) -> Response:
    """Unload an adapter at the workers of a model that have it, or at all of them when none is known to have it."""
    name = _name(await request.body())
    model = request.query_params.get("model", "")
    having = [worker for worker in context.engines() if name in worker.announced.adapters]
    if model or not having:
        workers = _workers(context, model)
        having = [worker for worker in workers if worker in having] or workers
    replies = await ask_all(context, request, having)
    for worker in done_by(replies):
        _announce(context, worker, name, loaded=False)
    return results_of(context, replies)


def _name(body: bytes) -> str:
    """Return the name of the adapter. Raises: InvalidRequest, when the body names none."""
    if len(body) > _MOST_BYTES:  # decoding it would block the event loop
        raise InvalidRequest(f"The description of an adapter is longer than {_MOST_BYTES} bytes.")
    try:
        return msgspec.json.decode(body, type=Adapter).lora_name
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"The body must be a JSON object with the adapter's name in lora_name: {error}."
        raise InvalidRequest(message, param="lora_name") from None


def _workers(context: Context, model: str) -> list[Worker]:
    """Return the engines that serve a model, or its alias; of the only model when none is named.

    Raises: ModelRequired, ModelNotFound
    """
    models = context.fleet.pools.models
    if not model:
        if models.several:
            raise models.refusal(b"", " Add ?model=NAME to the path.")
        return context.engines()
    model = context.aliases.get(model, model)
    found = [worker for worker in context.engines() if model in worker.names.bases]
    if not found and not context.engines():
        raise NoWorkers(retry_after=5.0)
    if not found:
        raise models.refusal(text_of(model))
    return found


def _announce(context: Context, worker: Worker, adapter: str, *, loaded: bool) -> None:
    """Let all ranks of an engine serve an adapter from now on, or no more."""
    context.models.forget()
    for entry in context.fleet.entries(worker.spec.url):
        bases, adapters = entry.announced
        if bases:  # an engine that announces nothing may be asked for any name anyhow
            others = [name for name in adapters if name != adapter]
            names: Names = names_of(bases, [*others, adapter] if loaded else others)
            context.fleet.announced(entry, names)
