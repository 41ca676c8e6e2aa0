"""The control plane as an ASGI app.

    admin.exchange --> Router: path --> _ControlPath: method --> guard --> handler(context, request) --> Response
          ^                                                                                |
          '-- RouterError, or a fault: raised all the way, answered by `admin.exchange` ---'

The app makes no error answers itself: starlette's Router, unlike its Starlette class, lets exceptions through.

    python -m sglang_router.admin.app --markdown > docs/endpoints.md
"""

from __future__ import annotations

import sys
from typing import NoReturn

from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_router.access.host_names import OwnNames
from sglang_router.admin import info, page
from sglang_router.admin.context import Context, Render
from sglang_router.admin.guard import guarded
from sglang_router.admin.routes import ROUTES
from sglang_router.admin.rows import ControlRow, relayed_rows
from sglang_router.errors import HostNotAllowed, MethodNotAllowed, NotFound


class _ControlPath:
    """All methods of one path. A Route of starlette would know those of a single row only."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._rows: dict[str, ControlRow] = {}
        self._relayed: list[str] = []

    def add(self, row: ControlRow) -> None:
        """Add a row; GET also serves HEAD."""
        self._rows.update(dict.fromkeys(row.methods, row))
        if "GET" in row.methods:
            self._rows["HEAD"] = row

    def add_relayed(self, method: str) -> None:
        """Add a method that is relayed: its requests do not come here."""
        self._relayed.append(method)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        row = self._rows.get(scope["method"])
        if row is None:
            raise MethodNotAllowed(allow=[*self._rows, *self._relayed])
        scope["state"]["path"] = row.path  # for requests to workers: the client's own path came decoded
        response = await guarded(self._context, row.kind, row.handler, Request(scope, receive))
        await response(scope, receive, send)


class _RelayedPath:
    """A relayed path with another method: with its own it does not come here."""

    def __init__(self) -> None:
        self._methods: list[str] = []

    def add(self, method: str) -> None:
        """Add a method that is relayed; GET also serves HEAD."""
        self._methods += (method, "HEAD") if method == "GET" else (method,)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> NoReturn:
        raise MethodNotAllowed(allow=self._methods)


def create_app(context: Context) -> ASGIApp:
    """The control plane over the parts in `context`. It raises RouterErrors."""
    own: dict[str, _ControlPath] = {}
    for rows in ROUTES.values():
        for row in rows:
            own.setdefault(row.path, _ControlPath(context)).add(row)
    relayed: dict[str, _RelayedPath] = {}
    for endpoint in relayed_rows():
        if endpoint.path in own:
            own[endpoint.path].add_relayed(endpoint.method)
        else:
            relayed.setdefault(endpoint.path, _RelayedPath()).add(endpoint.method)
    apps: dict[str, ASGIApp] = {**own, **relayed}
    routes = [Route(path, app) for path, app in apps.items()]
    return Router(routes, redirect_slashes=False, default=_unknown_path)


async def _unknown_path(scope: Scope, receive: Receive, send: Send) -> NoReturn:
    raise NotFound


def create_metrics_app(render: Render, own_names: OwnNames) -> ASGIApp:
    """An app that answers every path with the metrics, for the port that Prometheus scrapes. Nothing there needs a key:
    so browsers must ask by one of `own_names`."""

    async def metrics(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise MethodNotAllowed(allow=("GET", "HEAD"))
        if name := own_names.foreign(scope["headers"], scope["scheme"] == "https"):
            raise HostNotAllowed(name)
        response = await info.exposition(render, Request(scope))
        await response(scope, receive, send)

    return metrics


if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m sglang_router.admin.app --markdown")
    sys.stdout.write(page.markdown())
