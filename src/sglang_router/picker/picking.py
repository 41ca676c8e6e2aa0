"""What all requests of a picker share, and what may be asked of it.

inference            the paths that the router relays (`routing.endpoints`): by their bodies, as over HTTP
what engines tell    GET /v1/models and a few more: any worker, in turn
--relay-unknown-paths   all other paths but those of the router's own control plane
anything else        404: a gateway's route may let more through than clients should reach
"""

from __future__ import annotations

from functools import partial
from typing import Final

from sglang_router.app.admission import admission
from sglang_router.app.front import add_relayed
from sglang_router.app.parts import App
from sglang_router.app.settings import limits
from sglang_router.errors import NotFound
from sglang_router.picker.destinations import Destinations
from sglang_router.picker.pick import Caller, Pick
from sglang_router.relay.clients import Clients
from sglang_router.relay.routes import Factory, Routes
from sglang_router.routing.endpoints import ENDPOINTS, UNKNOWN_READ, Endpoint
from sglang_router.wire.request import Request

TOLD_BY_ENGINES: Final = (
    *(b"/v1/models", b"/health", b"/health_generate", b"/get_model_info", b"/model_info", b"/get_server_info"),
    *(b"/server_info", b"/version", b"/ping"),
)
"""Paths with GET that any engine answers, and that change nothing."""


class Picking:
    """See the module.

    app           the router whose decisions these are
    clients       the streams of gateways, and the requests in flight on them
    destinations  where workers listen
    routes        what makes the pick of a request
    admit         checks keys, see `app.admission`
    limits        of a head and a body
    fallbacks     most further endpoints that a gateway is told
    unread        streams that are over, but end only when the gateway reads: they count among the most connections of
                  clients, and no drain waits for them
    """

    def __init__(self, app: App, clients: Clients, unread: set[object]) -> None:
        self.app = app
        self.clients = clients
        self.unread = unread
        self.destinations = Destinations(app.fleet, app.connections)
        self.routes = _routes(app)
        self.admit = admission(app.control.access, self.routes)
        self.limits = limits(app.args)
        self.fallbacks = app.args.epp_fallback_endpoints

    def __repr__(self) -> str:
        return f"<Picking of {self.clients!r}>"


def _routes(app: App) -> Routes:
    """Make the table of what may be asked."""
    routes = Routes(partial(_nothing, app))
    endpoints = {path: row for path, row in ENDPOINTS.items() if not row.tunnel}
    add_relayed(app.args, routes, partial(_picks, app), app.relay.answers.cors is not None, endpoints)
    for path in TOLD_BY_ENGINES:
        for method in (b"GET", b"HEAD"):
            routes.add(method, path, _picks(app, UNKNOWN_READ))
    return routes


def _picks(app: App, endpoint: Endpoint) -> Factory:
    """Return what makes the picks of an endpoint."""
    return partial(Pick, app, endpoint)


def _nothing(app: App, caller: Caller, request: Request) -> Pick:
    """Make the pick of a request that goes nowhere."""
    request.refusal = request.refusal or NotFound()
    return Pick(app, UNKNOWN_READ, caller, request)
