"""The parts of one router, and what a crew that runs engines adds to them. `app.build` makes and connects the parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sglang_router.access.tls import TLSFiles
from sglang_router.access.watched import WatchedFiles
from sglang_router.admin.context import Context, ReplicaControl
from sglang_router.admin.exchange import ControlPlane
from sglang_router.autoscale.actuator import Actuator
from sglang_router.autoscale.autoscaler import Autoscaler
from sglang_router.config import RouterArgs
from sglang_router.observe.deferred import Deferred
from sglang_router.observe.metrics import Metrics
from sglang_router.relay.clients import Clients
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.frontend import Frontend
from sglang_router.relay.relay import Relay
from sglang_router.relay.silences import KeepAlives
from sglang_router.routing.events import Listener, Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.router import Router
from sglang_router.workers.engine_survey import EngineSurvey
from sglang_router.workers.health_checks import HealthChecks
from sglang_router.workers.membership import Membership


class Attachment(NamedTuple):
    """What a crew, which runs engines for the router, adds to it through `App.attach`.

    listeners        receive events at once
    deferred         receive events in batches
    replicas         restarts engines, for the control plane
    replica_metrics  returns URL, number of restarts, and whether it is up, of each replica
    actuators        change the number of workers when the autoscaler decides so
    """

    listeners: Sequence[Listener] = ()
    deferred: Sequence[Listener] = ()
    replicas: ReplicaControl | None = None
    replica_metrics: Callable[[], Iterable[tuple[str, int, bool]]] | None = None
    actuators: Sequence[Actuator] = ()


@dataclass
class App:
    """The parts of one router. `build` makes it; `app.lifecycle` starts and stops it.

    clients           the connections of the main port; scrapers: those of the metrics port
    frontend          the main port; metrics_frontend: the metrics port
    control           what the endpoints of the control plane use; plane: serves the control plane
    scaler            None: the number of workers is fixed
    tls               key and certificate of the main port; None: plain HTTP
    keepalives        fills the silence of streams; None: nothing does
    watched           all files of certificates and keys, to be loaded again when they change
    """

    args: RouterArgs
    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    listeners: Listeners
    deferred: Deferred
    fleet: Fleet
    router: Router
    connections: ConnectionPool
    checks: HealthChecks
    survey: EngineSurvey
    membership: Membership
    clients: Clients
    scrapers: Clients
    relay: Relay
    keepalives: KeepAlives | None
    frontend: Frontend
    metrics_frontend: Frontend
    metrics: Metrics
    control: Context
    plane: ControlPlane
    scaler: Autoscaler | None
    tls: TLSFiles | None
    watched: list[TLSFiles | WatchedFiles]

    def attach(self, attachment: Attachment) -> None:
        """Connect a crew, which runs engines for the router, with the parts."""
        for listener in attachment.listeners:
            self.listeners.add(listener)
        for listener in attachment.deferred:
            self.deferred.add(listener)
        if attachment.replicas is not None:
            self.control.attach_replicas(attachment.replicas)
        if attachment.replica_metrics is not None:
            self.metrics.sources.replicas = attachment.replica_metrics
        if self.scaler is not None:
            for actuator in attachment.actuators:
                self.scaler.add(actuator)
