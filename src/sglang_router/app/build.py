"""Build all parts of a router from its options, and connect them. Production, tests and simulations all use it.

    build(args, loop, writer) --> App          construction only: nothing listens, no job runs, no task is started
      routing     fleet, its pools and policies, queue, retry budget, router (the decider)
      relay       batch, connections to workers, clients, exchanges
      workers     health checks, engine survey, membership
      discovery   the sources that look for workers, if options ask for them
      observers   metrics, access log, worker log, autoscaling
      admin       the control plane
      frontends   the main port and the metrics port: the same class with two tables of routes

`Seams` lists what tests can replace: the clock, the random generator, the decider, the table of endpoints and others.
`app.lifecycle` listens, runs the jobs, serves and stops.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from sglang_router.access.permissions import Access
from sglang_router.access.tls import TLSFiles
from sglang_router.admin.app import create_app, create_metrics_app
from sglang_router.admin.context import Context, Render
from sglang_router.admin.exchange import ASGIApp, ControlPlane
from sglang_router.admin.routes import ROUTES
from sglang_router.admin.shared import Shared
from sglang_router.app import front, settings
from sglang_router.app.admission import admission
from sglang_router.app.caches import caches_of, events_of
from sglang_router.app.deciding import book_of, recorder_of, shadows_of
from sglang_router.app.discovering import discovery_of
from sglang_router.app.issuer import tokens_of
from sglang_router.app.memories import memories_of
from sglang_router.app.models import models_of, policy_of
from sglang_router.app.overview import live_of
from sglang_router.app.parts import App, Elsewhere
from sglang_router.app.routers import PolicyParts, fleet_of, router_of
from sglang_router.app.scrapes import Scrapes
from sglang_router.app.shared import files_of, scale_together, sharing_of, state_of, workers_of
from sglang_router.app.traces import export_of, ids_of, tracing_of
from sglang_router.autoscale.autoscaler import Autoscaler, autoscaler
from sglang_router.config import RouterArgs
from sglang_router.discovery.owner import Hands
from sglang_router.observe.access import AccessLog, WorkerLog
from sglang_router.observe.clients import ClientCounts
from sglang_router.observe.deferred import Deferred
from sglang_router.observe.live_sources import LiveSources
from sglang_router.observe.logs import LogWriter
from sglang_router.observe.metrics import Metrics
from sglang_router.relay.addresses import LookUp, system_look_up
from sglang_router.relay.clients import Clients
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.frontend import Frontend
from sglang_router.relay.relay import Relay
from sglang_router.relay.routes import Routes
from sglang_router.relay.vanished import take_back
from sglang_router.routing.decider import Decider
from sglang_router.routing.endpoints import ENDPOINTS, Endpoint
from sglang_router.routing.events import Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.policies.shadowed import ShadowTally
from sglang_router.routing.prefix_tree.informed import KVCaches
from sglang_router.routing.quotas import Quotas
from sglang_router.routing.router import Router
from sglang_router.routing.trace_ids import TraceIds
from sglang_router.version import __version__
from sglang_router.wire.headers import ForwardRules
from sglang_router.wire.limits import Limits
from sglang_router.workers.engine_survey import EngineSurvey
from sglang_router.workers.health_checks import HealthChecks
from sglang_router.workers.membership import Membership

_SCRAPE = 4096
"""Most bytes of a request's body on the metrics port; a scrape has no body."""
_SCRAPED_WITHIN = 30.0
"""Seconds for a whole scrape on the metrics port."""


def _itself(router: Router) -> Decider:
    return router


class Seams(NamedTuple):
    """What tests and simulations can replace.

    clock      returns seconds; never goes back
    rng        the random generator; None: a new one
    endpoints  the relayed endpoints, by path
    decider    returns the decider that the relay asks; by default the router itself
    look_up    finds the addresses of a worker's name
    checks     the class of the health checks
    survey     the class of the engine survey
    app        the ASGI app of the control plane; None: the real one
    """

    clock: Callable[[], float] = time.monotonic
    rng: random.Random | None = None
    endpoints: Mapping[bytes, Endpoint] = ENDPOINTS
    decider: Callable[[Router], Decider] = _itself
    look_up: LookUp = system_look_up
    checks: type[HealthChecks] = HealthChecks
    survey: type[EngineSurvey] = EngineSurvey
    app: ASGIApp | None = None


def build(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    writer: LogWriter | None = None,
    seams: Seams | None = None,
    elsewhere: Elsewhere | None = None,
) -> App:
    """Make all parts of a router and connect them; nothing runs yet.

    args       validated options
    loop       the event loop that will run the router
    writer     writes access log lines; None: no access log
    seams      what is replaced; None: nothing
    elsewhere  the clients that other processes serve; None: there are none

    Raises: ConfigError, when files that the options name cannot be used.
    """
    seams = seams or Seams()
    rng, clock = seams.rng or random.Random(), seams.clock
    listeners, deferred = Listeners(), Deferred(loop.call_later)
    tls, worker_tls = settings.server_tls(args), settings.worker_tls(args)
    store = files_of(args)
    state = state_of(args, store)
    elsewhere = elsewhere or Elsewhere()
    mark = elsewhere.mark or new_mark()
    quotas, (tokens, issuer) = Quotas(args.max_priority), tokens_of(args, loop, clock)
    access, key_files = settings.access_rules(args, quotas, tokens, time.time)
    answers = front.answers_of(args, rng, mark)
    forward = settings.forward_rules(args, access, mark)
    shadows = shadows_of(args)
    caches = caches_of(args, None if state is None else state.prefixes)
    workers = _workers(args, loop, seams, listeners, rng, worker_tls, shadows, caches)
    fleet, connections = workers.fleet, workers.connections
    connections.mark = mark
    router = router_of(args, fleet, listeners, rng, partial(_soon, loop, clock), workers.checks.check_now)
    router.recorder, router.quotas = recorder_of(args, clock), quotas
    models = models_of(args, router, rng, caches, shadows)
    clients, scrapers = front.clients_of(args, clock, connections)
    workers.checks.vanished = partial(_take_back, clients, elsewhere)
    traces = ids_of(args, mark)
    rules = front.relay_rules(args, forward, traces)
    relay = Relay(loop, clock, seams.decider(router), connections, answers, listeners, rules)
    scaler = autoscaler(args, loop, fleet, lambda: clients.unanswered().with_others(elsewhere.unanswered()), clock)
    sources = _sources(clients, elsewhere, connections, router, scaler, writer)
    sources.tunnels = lambda: relay.tunnels.open + elsewhere.tunnels
    sources.shadows = shadows
    exported = export_of(args)
    sources.spans = exported
    sources.certificates = {
        use: files for use, files in (("server", tls), ("workers", worker_tls)) if files is not None
    }
    if not args.relay_processes:
        sources.body_bytes, sources.body_limit = lambda: clients.budget.held, lambda: clients.budget.limit
    sources.policy_of = policy_of(fleet.pools)
    sources.kv_index = None if caches is None else caches.index
    if router.recorder is not None:
        sources.decisions = partial(len, router.recorder)
    metrics = _metrics(args, router, sources)
    render = Scrapes(metrics, deferred, clock, args.metrics_interval_secs)
    control = _control(args, workers, clock, render, access, forward, scaler)
    hands = Hands(fleet, workers.membership, workers.checks, clock)
    discovery = discovery_of(args, loop, hands, seams.look_up, rng)
    if discovery.sources:
        control.discovery = sources.discovery = discovery.reports
    sharing = None
    if store is not None and state is not None:
        control.fleet_workers = wide = workers_of(args, fleet, clock)
        sharing = sharing_of(args, store, state, router, listeners, clock, rng, wide)
        if scaler is not None:
            scale_together(scaler, state, sharing)
    control.sharing = sources.shared = sharing
    control.decisions = book_of(router, deferred, clock)
    control.aliases = router.naming.aliases
    control.live = live_of(control, metrics.counts, args.policy)
    control.args = args
    serve = partial(ControlPlane, loop=loop, clock=clock, answers=answers, timeout=settings.control_timeout(args))
    plane = serve(seams.app or create_app(control), listener=listeners)
    scrape = serve(create_metrics_app(render, control.own_names), listener=Listeners(), timeout=_SCRAPED_WITHIN)
    routes = front.routes_of(args, plane, relay, seams.endpoints)
    ports = partial(Frontend, batch=connections.batch, answers=answers)
    app = App(
        args=args,
        loop=loop,
        clock=clock,
        models=models,
        policies=PolicyParts(rng, shadows, caches),
        listeners=listeners,
        deferred=deferred,
        router=router,
        clients=clients,
        scrapers=scrapers,
        elsewhere=elsewhere,
        relay=relay,
        keepalives=front.keepalives_of(args, clients),
        frontend=ports(
            routes,
            clients,
            listener=listeners,
            limits=settings.limits(args),
            timeouts=settings.timeouts(args),
            admit=admission(access, routes),
            upgrades=front.upgrades_of(seams.endpoints),
        ),
        metrics_frontend=ports(
            Routes(scrape.exchange),
            scrapers,
            listener=Listeners(),
            limits=Limits(body_bytes=_SCRAPE),
            timeouts=settings.short(settings.timeouts(args)),
        ),
        metrics=metrics,
        control=control,
        plane=plane,
        scaler=scaler,
        discovery=discovery,
        sharing=sharing,
        spans=exported,
        kv_events=events_of(args, loop, connections, caches, fleet.found_empty),
        tls=tls,
        watched=[
            *(each for each in (tls, worker_tls, key_files, issuer) if each is not None),
            *(store.watched if store is not None else ()),
        ],
        issuer=issuer,
        **workers._asdict(),
    )
    _listen(app, writer, traces)
    elsewhere.attach(app)
    return app


# -- the parts --------------------------------------------------------------------------------------------------------


def new_mark() -> bytes:
    """Make what one router writes into the Via field of its requests."""
    return b"sglang-router-" + uuid.uuid4().hex[:16].encode()


def _new_id() -> str:
    return str(uuid.uuid4())


def _soon(loop: asyncio.AbstractEventLoop, clock: Callable[[], float], work: Callable[[float], None]) -> None:
    """Call a function with the time after the current call."""
    loop.call_soon(lambda: work(clock()))


class _Workers(NamedTuple):
    """The parts that know the workers; fields of App."""

    connections: ConnectionPool
    fleet: Fleet
    survey: EngineSurvey
    checks: HealthChecks
    membership: Membership


def _workers(
    args: RouterArgs,
    loop: asyncio.AbstractEventLoop,
    seams: Seams,
    listeners: Listeners,
    rng: random.Random,
    tls: TLSFiles | None,
    shadows: ShadowTally | None,
    caches: KVCaches | None,
) -> _Workers:
    connections = front.connections_of(args, loop, seams.look_up, rng, tls)
    fleet = fleet_of(args, listeners, _new_id, rng, shadows=shadows, caches=caches)
    survey = seams.survey(loop, fleet, connections, seams.clock, args.engine_report_interval_secs)
    checks = seams.checks(
        loop,
        fleet,
        connections,
        seams.clock,
        unhealthy_interval=args.worker_startup_check_interval,
        introduce=survey.introduce,
        rng=rng,
    )
    return _Workers(connections, fleet, survey, checks, Membership(fleet, connections, checks, survey))


def _control(
    args: RouterArgs,
    workers: _Workers,
    clock: Callable[[], float],
    render: Render,
    access: Access,
    forward: ForwardRules,
    scaler: Autoscaler | None,
) -> Context:
    return Context(
        fleet=workers.fleet,
        pool=workers.connections,
        checks=workers.checks,
        membership=workers.membership,
        clock=clock,
        metrics_render=render,
        engine_metrics=Shared(clock, args.metrics_interval_secs),
        add_rules=settings.add_rules(args),
        access=access,
        own_names=settings.own_names(args, socket.gethostname()),
        forward=forward,
        autoscaler=scaler,
        paired=args.pd_disaggregation,
        timeouts=settings.ask_timeouts(args),
        fan_out=args.rl_fanout_concurrency,
    )


def _take_back(clients: Clients, elsewhere: Elsewhere, name: str) -> None:
    """Retry the requests at a worker, whose host does not answer."""
    take_back(clients.exchanges, name)
    elsewhere.take_back(name)


def _sources(
    clients: Clients,
    elsewhere: Elsewhere,
    connections: ConnectionPool,
    router: Router,
    scaler: Autoscaler | None,
    writer: LogWriter | None,
) -> LiveSources:
    return LiveSources(
        connections=lambda: len(clients.connections) + elsewhere.connections,
        active=lambda: clients.active + elsewhere.active,
        upstream_connections=lambda: connections.open + elsewhere.upstream,
        lost_lines=None if writer is None else lambda: writer.lost,
        waiting=lambda: len(router.queue),
        waiting_sessions=(lambda: router.queue.sessions) if router.sessions.waits else None,
        sessions=router.sessions if router.sessions.on else None,
        desired_workers=None if scaler is None else lambda: scaler.desired,
        retry_budget=router.budget,
        version=__version__,
        configured=time.time(),
    )


def _metrics(args: RouterArgs, router: Router, sources: LiveSources) -> Metrics:
    pools = router.fleet.pools
    return Metrics(
        router.fleet,
        args.policy,
        memories_of(pools),
        sources,
        duration_buckets=args.prometheus_duration_buckets,
        paths=[row.path for rows in ROUTES.values() for row in rows],
        models=pools.models.known,
        aliases=router.naming.labels,
    )


def _listen(app: App, writer: LogWriter | None, traces: TraceIds | None) -> None:
    """Add the listeners of events, in the order in which they receive them."""
    app.deferred.add(app.metrics)
    if app.control.access.consumes_key:
        app.deferred.add(ClientCounts(app.control.access.client_names, app.metrics.counts.clients))
    app.deferred.add(app.control.live.witness)
    if app.router.recorder is not None:
        app.deferred.add(app.router.recorder)
    if app.scaler is not None:
        app.deferred.add(app.scaler.observer)
    if app.args.access_log and writer is not None:
        short = None if writer.short is None else writer.short.request
        app.deferred.add(AccessLog(writer, probes=app.args.log_probes, traces=traces, short=short))
    if app.kv_events is not None:
        app.listeners.add(app.kv_events)
    if app.args.api_key_file or app.args.config or app.args.models:  # what they say may change
        app.listeners.add(app.router.quotas)
    if traces is not None and app.spans is not None:
        app.listeners.add(tracing_of(app.args, app.router, traces, app.spans, app.clock))
    for listener in (app.membership, app.router, WorkerLog(), app.deferred):
        app.listeners.add(listener)
