"""The rows from which paths, docs/endpoints.md and the OpenAPI document are made.

ControlRow   one line of `admin.routes.ROUTES`: the control plane answers
RelayedRow   one method and path of `routing.endpoints.ENDPOINTS`: a worker answers
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.permissions import AccessKind
from sglang_router.admin.context import Context
from sglang_router.routing.endpoints import ENDPOINTS, Endpoint

Handler = Callable[[Context, Request], Awaitable[Response]]
"""A coroutine function that answers one row's requests."""


class ControlRow(NamedTuple):
    """One line of the control plane.

    route    methods and path, such as "GET POST /flush_cache"
    handler  who answers
    about    what it does, for people
    access   who may ask; None: reading for GET, changing for all others
    """

    route: str
    handler: Handler
    about: str
    access: AccessKind | None = None

    @property
    def kind(self) -> AccessKind:
        """What a request for this row asks for, as far as access is concerned."""
        if self.access is not None:
            return self.access
        return AccessKind.CONTROL_READ if self.methods == ["GET"] else AccessKind.CONTROL_CHANGE

    @property
    def methods(self) -> list[str]:
        """The methods of the route."""
        return self.route.split()[:-1]

    @property
    def path(self) -> str:
        """The path of the route."""
        return self.route.split()[-1]


class RelayedRow(NamedTuple):
    """A method and path that is relayed.

    endpoint  its row of `routing.endpoints`
    """

    method: str
    path: str
    endpoint: Endpoint


def relayed_rows() -> list[RelayedRow]:
    """Everything that is relayed. Only this module of `admin` reads the table of endpoints."""
    return [
        RelayedRow(method.decode(), path.decode(), endpoint)
        for path, endpoint in ENDPOINTS.items()
        for method in endpoint.methods
    ]


def generates(method: str, path: str) -> bool:
    """Return whether a request with this method and path generates text."""
    endpoint = ENDPOINTS.get(path.encode())
    return endpoint is not None and endpoint.generates and method.encode() in endpoint.methods


def plain_path(path: str) -> str:
    """A path template without Starlette's kinds of parameters: /workers/{id:path} becomes /workers/{id}."""
    return path.replace(":path", "")
