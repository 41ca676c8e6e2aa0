"""The control plane: one table of paths, and the ASGI app made from it.

    net.asgi --> Starlette --> ROUTES: method and path --> guard --> handler(context, request) --> Response
                                 '-- RouterError, unknown path, wrong method, fault --> an error of `errors`

`ROUTES` is all there is besides the relayed paths of `core.request.ENDPOINTS`. Both make docs/endpoints.md:

    python -m sglang_router.admin.app --markdown > docs/endpoints.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from sglang_router.admin import broadcast, engine_metrics, info, openapi, replicas, workers
from sglang_router.admin.context import Context, Handler, error_response
from sglang_router.admin.guard import guarded
from sglang_router.core.access import Kind
from sglang_router.core.request import ENDPOINTS
from sglang_router.errors import InternalError, MethodNotAllowed, NotFound, RouterError

__all__ = ["ROUTES", "Context", "Row", "create_app", "create_metrics_app", "markdown"]


class Row(NamedTuple):
    """One line of the control plane: method or methods and path, who answers, what it is for, who may ask."""

    route: str
    handler: Handler
    about: str
    access: Kind | None = None

    @property
    def kind(self) -> Kind:
        """What access depends on. Unless the row says otherwise, GET looks and everything else is a change."""
        if self.access is not None:
            return self.access
        return Kind.CONTROL_READ if self.methods == ["GET"] else Kind.CONTROL_CHANGE

    @property
    def methods(self) -> list[str]:
        return self.route.split()[:-1]

    @property
    def path(self) -> str:
        return self.route.split()[-1]


async def _described(context: Context, request: Request) -> Response:
    return Response(_document(), media_type="application/json")


@cache
def _document() -> bytes:
    """Made when first asked for: it takes 7 ms, in which no token moves."""
    return msgspec.json.encode(openapi.document(ROUTES))


PUBLIC, CLIENTS = Kind.PUBLIC, Kind.INFERENCE

ROUTES: dict[str, tuple[Row, ...]] = {
    "Health": (
        Row("GET /health", info.health, "The router is up: 200, text `OK`.", PUBLIC),
        Row("GET /liveness", info.health, "The same.", PUBLIC),
        Row("GET /readiness", info.readiness, "200 while a healthy worker can take requests, else 503.", PUBLIC),
        Row("GET /health_generate", info.health_generate, "Has a worker make a token; 503 if three fail.", CLIENTS),
    ),
    "Information": (
        Row("GET /v1/models", info.models, "The models of all healthy workers, by the engines' own words.", CLIENTS),
        Row("GET /v1/models/{model:path}", info.model, "One of them.", CLIENTS),
        Row("GET /get_model_info", info.from_a_worker, "What a healthy worker says of its model, unchanged.", CLIENTS),
        Row("GET /model_info", info.from_a_worker, "The same, under its newer name.", CLIENTS),
        Row("GET /get_server_info", info.from_a_worker, "What a healthy worker says of itself, unchanged.", CLIENTS),
        Row("GET /server_info", info.from_a_worker, "The same, under its newer name.", CLIENTS),
        Row("GET /get_loads", info.loads, "Every worker's load: tokens if it tells, else requests."),
        Row("GET /metrics", info.metrics, "The router's metrics, for Prometheus."),
        Row("GET /engine_metrics", engine_metrics.merged, "All engines' metrics, labelled `worker_addr`."),
        Row(f"GET {openapi.PATH}", _described, "This page for programs: an OpenAPI 3.1 document."),
    ),
    "Broadcast": (
        Row("GET POST /flush_cache", broadcast.flush_cache, "Empties all caches, and the router's tree."),
        Row("POST /update_weights_from_disk", broadcast.update_weights, "New weights for all."),
        Row("POST /update_weights_from_tensor", broadcast.update_weights, "New weights for all."),
        Row("POST /update_weights_from_distributed", broadcast.update_weights, "New weights for all."),
        Row("POST /abort_request", broadcast.broadcast, "Aborts a request (`rid`) wherever it runs, or all."),
        Row("POST /pause_generation", broadcast.broadcast, "Stops computing on all workers."),
        Row("POST /continue_generation", broadcast.broadcast, "Goes on computing."),
        Row("POST /start_profile", broadcast.broadcast, "Starts every worker's profiler."),
        Row("POST /stop_profile", broadcast.broadcast, "Stops it."),
    ),
    "Scaling": (
        Row("POST /add_worker", workers.add, "`?url=U[&api_key=K]`: adds U; 200 once it is healthy."),
        Row("POST /remove_worker", workers.remove, "`?url=U`: no new requests for U; running ones end."),
        Row("GET /list_workers", workers.urls, '`{"urls": [...]}`.'),
        Row("POST /workers", workers.create, "Registers the worker the body describes; 202 with its id."),
        Row("GET /workers", workers.index, "All workers with their state."),
        Row("POST /workers/{id:path}/drain", workers.drain, "No new requests; it keeps its prefixes."),
        Row("POST /workers/{id:path}/resume", workers.resume, "Requests again."),
        Row("POST /workers/{id:path}/restart", replicas.restart, "Drains it and starts its engine anew; 202."),
        Row("POST /restart_workers", replicas.restart_all, "All engines anew, one after the other; 202."),
        Row("GET /restart_workers", replicas.rolling, "How far that is."),
        Row("GET /scale", replicas.scale, "How many workers there should be, and why: the last decisions."),
        Row("GET /workers/{id:path}", workers.show, "One worker; `id` is its id or its percent-encoded URL."),
        Row("PUT /workers/{id:path}", workers.change, "Changes key, priority, cost, labels, checks; 202."),
        Row("DELETE /workers/{id:path}", workers.delete, "Removes it; running requests go on; 202."),
    ),
}
"""Everything by group, in the order in which paths are matched."""


class _Path:
    """All methods of one path, as an ASGI app: Starlette would know only those of a single row."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._rows: dict[str, Row] = {}

    def add(self, row: Row) -> None:
        self._rows.update(dict.fromkeys(row.methods, row))
        if "GET" in row.methods:
            self._rows["HEAD"] = row

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        row = self._rows.get(scope["method"])
        if row is None:
            response = error_response(MethodNotAllowed(), {"allow": ", ".join(self._rows)})
        else:
            response = await guarded(self._context, row.kind, row.handler, Request(scope, receive))
        await response(scope, receive, send)


async def _only_post(scope: Scope, receive: Receive, send: Send) -> None:
    """A relayed path with another method than POST; with POST it does not come here."""
    await error_response(MethodNotAllowed(), {"allow": "POST"})(scope, receive, send)


def create_app(context: Context) -> Starlette:
    """The control plane over the parts in `context`."""
    paths: dict[str, _Path] = {}
    for rows in ROUTES.values():
        for row in rows:
            paths.setdefault(row.path, _Path(context)).add(row)
    relayed = [(path.decode(), _Asgi(_only_post)) for path in ENDPOINTS]
    return _starlette([*paths.items(), *relayed])


def create_metrics_app(render: Callable[[str], tuple[bytes, str]]) -> Starlette:
    """An app that answers every path with the metrics, for the port that Prometheus asks."""

    async def metrics(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            response = error_response(MethodNotAllowed(), {"allow": "GET, HEAD"})
        else:
            response = info.exposition(render, Request(scope))
        await response(scope, receive, send)

    return _starlette([("/{path:path}", _Asgi(metrics))])


class _Asgi:
    """Keeps Starlette from taking an ASGI function for a handler of its own kind."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _starlette(paths: Iterable[tuple[str, ASGIApp]]) -> Starlette:
    handlers: dict[object, ExceptionHandler] = {
        RouterError: _refused,
        HTTPException: _no_such_path,
        Exception: _failed,
    }
    app = Starlette(routes=[Route(path, endpoint) for path, endpoint in paths], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RouterError)
    return error_response(error)


async def _no_such_path(request: Request, error: Exception) -> Response:
    return error_response(NotFound())


async def _failed(request: Request, error: Exception) -> Response:
    """The last net. Starlette raises the fault again behind this answer, and `net.asgi` logs it."""
    return error_response(InternalError())


# -- the page of endpoints -----------------------------------------------------------------------------------

_HEAD = """\
# Endpoints

Written by `python -m sglang_router.admin.app --markdown`; edit the tables there and in `core/request.py`.

Errors made by the router have one shape, `{"error": {"message", "type", "code", "param"}}`, and carry their
code in the header `x-smg-error-code` too. Every answer carries `x-request-id`. Where GET is allowed, HEAD is.

Who may ask, once there are keys, is told by the column "for", explained in [security.md](security.md); the paths
relayed to a worker are for clients.

## Relayed to a worker

The policy picks the worker; body and answer pass through byte for byte. The routing text is made of the
fields named here, in this order.

| method | path | routing text |
|---|---|---|"""


def markdown() -> str:
    """docs/endpoints.md."""
    return "\n".join((_HEAD, *_relayed(), *_control(), ""))


def _relayed() -> Iterator[str]:
    for path, endpoint in ENDPOINTS.items():
        text = ", ".join(f"`{name}`" for name in endpoint.text)
        reason = "none: the cache plays no part" if endpoint.json else "none: the body is not read"
        yield f"| POST | `{path.decode()}` | {text or reason} |"


def _control() -> Iterator[str]:
    for group, rows in ROUTES.items():
        yield from ("", f"## {group}", "", "| method | path | for | |", "|---|---|---|---|")
        for row in rows:
            yield f"| {', '.join(row.methods)} | `{row.path.replace(':path', '')}` | {_WHO[row.kind]} | {row.about} |"


_WHO = {
    Kind.PUBLIC: "everybody",
    Kind.INFERENCE: "clients",
    Kind.CONTROL_READ: "user",
    Kind.CONTROL_CHANGE: "admin",
}


if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m sglang_router.admin.app --markdown")
    sys.stdout.write(markdown())
