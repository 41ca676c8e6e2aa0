"""Choose the workers that a request of the control plane is for: `?selector=model=llama,zone=a`.

    id, url, model, role     what the router knows of a worker; `model` is any name by which it serves
    any other name           a label of the worker (`labels` of POST /workers)

All conditions of one selector must hold. Several `selector` parameters mean the workers that one of them names. Without
a selector, the request is for all.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from starlette.requests import Request

from sglang_router.admin.context import Context
from sglang_router.errors import InvalidRequest, WorkerNotFound
from sglang_router.routing.worker import Worker

_MOST = 64
"""Selectors of one request, and conditions of one selector."""

_Conditions = list[tuple[str, str]]

_KNOWN: dict[str, Callable[[Worker], tuple[str, ...]]] = {
    "id": lambda worker: (worker.id,),
    "url": lambda worker: (worker.url, worker.spec.url),
    "model": lambda worker: (*worker.names.bases, *worker.names.adapters),
    "role": lambda worker: (worker.spec.worker_type,),
}


def selected(context: Context, request: Request) -> list[Worker]:
    """Return the workers that a request is for, one for each engine: ranks share the control plane of their engine.

    Raises: InvalidRequest, when a selector cannot be read; WorkerNotFound, when no worker is meant.
    """
    engines = context.engines()
    wanted = [_conditions(text) for text in request.query_params.getlist("selector")]
    if len(wanted) > _MOST:
        raise InvalidRequest(f"At most {_MOST} selectors can be given.", param="selector")
    if not wanted:
        return engines
    found = [engine for engine in engines if any(_meant(each, wanted) for each in _ranks(context, engine))]
    if engines and not found:
        raise WorkerNotFound("No worker matches the selector", param="selector")
    return found


def _ranks(context: Context, engine: Worker) -> list[Worker]:
    return context.fleet.entries(engine.spec.url)


def _meant(worker: Worker, wanted: list[_Conditions]) -> bool:
    return any(all(_holds(worker, *condition) for condition in conditions) for conditions in wanted)


def _holds(worker: Worker, name: str, value: str) -> bool:
    known = _KNOWN.get(name)
    return value in known(worker) if known is not None else worker.spec.labels.get(name) == value


def _conditions(text: str) -> _Conditions:
    parts = text.split(",")
    found = [(name.strip(), value.strip()) for name, mark, value in (part.partition("=") for part in parts) if mark]
    if len(found) < len(parts) or len(found) > _MOST or not all(name for name, _ in found):
        message = f"A selector is name=value[,name=value ...], at most {_MOST} of them: not {text[:64]!r}"
        raise InvalidRequest(message, param="selector")
    return found


def without_selectors(query: bytes) -> bytes:
    """Return a query as the engines get it."""
    parts = [part for part in query.split(b"&") if unquote_to_bytes(part.partition(b"=")[0]) != b"selector"]
    return b"&".join(parts)
