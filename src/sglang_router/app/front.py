"""Make the parts that serve clients: a router in one process has them, and so has each relay process.

connections    to workers
clients        the registries of the main port's and of the metrics port's connections
answers        what the router itself says
relay          what the exchanges share
routes         which exchange handles a request
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Mapping
from functools import partial

from sglang_router.access.tls import TLSFiles
from sglang_router.admin.exchange import ControlPlane
from sglang_router.admin.routes import ROUTES
from sglang_router.app import settings
from sglang_router.config import RouterArgs
from sglang_router.relay.addresses import Addresses, LookUp
from sglang_router.relay.answers import Answers
from sglang_router.relay.batch import Batch
from sglang_router.relay.body import no_handler
from sglang_router.relay.budget import ByteBudget
from sglang_router.relay.client import ClientConnection
from sglang_router.relay.clients import AnyExchange, Clients
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.relay import Relay, RelayRules
from sglang_router.relay.routes import Factory, Routes
from sglang_router.relay.rules import TunnelRules
from sglang_router.relay.silences import KeepAlives
from sglang_router.relay.tunnel import TunnelExchange
from sglang_router.relay.unknown_paths import METHODS, UnknownPaths
from sglang_router.resume.handler import handlers_of
from sglang_router.routing.endpoints import ENDPOINTS, READS, UNKNOWN, UNKNOWN_READ, Endpoint
from sglang_router.routing.trace_ids import TraceIds
from sglang_router.wire.cors import Cors
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.request import Request
from sglang_router.wire.request_id import REQUEST_ID_HEADERS, RequestIds
from sglang_router.wire.upgrade import Upgrades

_MAX_IDLE = 512
"""Most idle connections kept for one worker."""
_NO_LIMIT = 1 << 62
"""A number of bytes that is never reached."""


def connections_of(
    args: RouterArgs, loop: asyncio.AbstractEventLoop, look_up: LookUp, rng: random.Random, tls: TLSFiles | None
) -> ConnectionPool:
    """Make the connections to workers."""
    return ConnectionPool(
        loop,
        Batch(loop),
        connect_timeout=args.connect_timeout_secs,
        idle_timeout=args.upstream_idle_timeout_secs,
        max_idle=_MAX_IDLE,
        tls=tls,
        max_age=args.upstream_max_age_secs or math.inf,
        addresses=Addresses(loop, look_up, rng),
    )


def answers_of(args: RouterArgs, rng: random.Random, mark: bytes) -> Answers:
    """Make what writes the router's own answers. mark: this router in Via."""
    ids = RequestIds(rng.getrandbits, args.request_id_headers or REQUEST_ID_HEADERS, mark)
    cors = Cors(args.cors_allowed_origins) if args.cors_allowed_origins else None
    # Where the control plane has keys of its own, clients need not know where workers are.
    by_id = bool(args.control_plane_api_keys or args.control_plane_api_keys_file or args.jwt_issuer)
    return Answers(ids, cors, args.decision_headers, by_id)


def clients_of(args: RouterArgs, clock: Callable[[], float], connections: ConnectionPool) -> tuple[Clients, Clients]:
    """Make the registries of the main port's and of the metrics port's connections."""
    numbers = itertools.count(1)
    budget = ByteBudget(args.max_buffered_request_bytes, args.body_min_bytes_per_second)
    most, scrapers = settings.most_connections()
    clients = Clients(clock, budget, most, lambda: connections.open, numbers)
    return clients, Clients(clock, ByteBudget(_NO_LIMIT), scrapers, lambda: 0, numbers)


def relay_rules(args: RouterArgs, forward: ForwardRules, traces: TraceIds | None) -> RelayRules:
    """Return the options of the relay."""
    return RelayRules(
        settings.timeouts(args),
        forward,
        handlers_of(settings.resume_rules(args)) if args.resume_streams else no_handler,
        settings.most_routing_text(args),
        args.inject_usage,
        settings.session_hints(args),
        TunnelRules(args.max_tunnels, args.tunnel_idle_timeout_secs, args.tunnel_max_secs),
        traces,
    )


def keepalives_of(args: RouterArgs, clients: Clients) -> KeepAlives | None:
    """Make what fills the silence of streams, if the options ask for it."""
    seconds = args.sse_keepalive_secs
    return KeepAlives(clients.exchanges, clients.clock, seconds) if seconds else None


def routes_of(
    args: RouterArgs, plane: ControlPlane, relay: Relay, endpoints: Mapping[bytes, Endpoint] = ENDPOINTS
) -> Routes:
    """Make the routes of the main port: the relayed endpoints; everything else goes to the control plane.

    A path that takes GET takes HEAD as well. With `--relay-unknown-paths` the control plane gets only its own paths,
    and the questions of browsers (OPTIONS) as far as the router answers these.
    """
    routes = Routes(plane.exchange)
    add_relayed(args, routes, partial(_exchanges, relay), relay.answers.cors is not None, endpoints)
    return routes


def add_relayed(
    args: RouterArgs,
    routes: Routes,
    make: Callable[[Endpoint], Factory],
    cors: bool,
    endpoints: Mapping[bytes, Endpoint] = ENDPOINTS,
) -> None:
    """Add the relayed endpoints to a table of routes.

    make  returns what makes the exchanges of an endpoint
    cors  the router answers the questions of browsers
    """
    for endpoint in endpoints.values():
        factory = make(endpoint)
        for method in endpoint.methods:
            routes.add(method, endpoint.path, factory)
        if b"GET" in endpoint.methods:
            routes.add(b"HEAD", endpoint.path, factory)
    if args.relay_unknown_paths:
        own = [row.path.encode() for rows in ROUTES.values() for row in rows]
        methods = METHODS - {b"OPTIONS"} if cors else METHODS
        routes.add_unknown(
            UnknownPaths([*own, *endpoints], methods), partial(_unknown, make(UNKNOWN), make(UNKNOWN_READ))
        )


def _exchanges(relay: Relay, endpoint: Endpoint) -> Factory:
    """Return what makes the exchanges of an endpoint."""
    return partial(TunnelExchange if endpoint.tunnel else Exchange, relay, endpoint)


def _unknown(other: Factory, read: Factory, client: ClientConnection, request: Request) -> AnyExchange:
    """Make the exchange of a request for an unknown path."""
    return (read if request.method in READS else other)(client, request)


def upgrades_of(endpoints: Mapping[bytes, Endpoint] = ENDPOINTS) -> Upgrades:
    """Make what recognises the requests for a WebSocket."""
    return Upgrades([endpoint.path for endpoint in endpoints.values() if endpoint.tunnel])
