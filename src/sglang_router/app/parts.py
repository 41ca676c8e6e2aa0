"""The parts of one router, what a crew that runs engines adds to them, and the clients that are served elsewhere.

`app.build` makes and connects the parts.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sglang_router.access.tls import TLSFiles
from sglang_router.access.watched import Renewed
from sglang_router.admin.context import Context, ReplicaControl
from sglang_router.admin.exchange import ControlPlane
from sglang_router.app.issuer import IssuerKeys
from sglang_router.app.models import ModelPolicies
from sglang_router.app.routers import PolicyParts
from sglang_router.app.traces import Export
from sglang_router.autoscale.actuator import Actuator
from sglang_router.autoscale.autoscaler import Autoscaler
from sglang_router.config import RouterArgs
from sglang_router.discovery.discovery import Discovery
from sglang_router.observe.deferred import Deferred
from sglang_router.observe.metrics import Metrics
from sglang_router.relay.clients import Clients, Unanswered
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.frontend import Frontend
from sglang_router.relay.relay import Relay
from sglang_router.relay.silences import KeepAlives
from sglang_router.restart.handover import InheritedSockets
from sglang_router.routing.events import Listener, Listeners
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.router import Router
from sglang_router.sharing.sharing import FleetSharing
from sglang_router.workers.engine_survey import EngineSurvey
from sglang_router.workers.health_checks import HealthChecks
from sglang_router.workers.kv_events import KVEvents
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


class GivenPort(NamedTuple):
    """The main port, which other processes serve.

    sockets    bound already
    inherited  what another router handed over; None: nothing
    """

    sockets: Sequence[socket.socket]
    inherited: InheritedSockets | None


class Elsewhere:
    """The clients that are not served by the main port of this process: none, usually.

    They are counted, drained and closed beside its own. `processes.relays` has those of the other processes of
    `--relay-processes`; `picker.front` the gateways that ask an endpoint picker.

    mark        what this router writes into Via; b"": a new one
    given       the main port; None: this process serves it
    state_file  where the state is kept when no option says so; None: nowhere
    restarted   this process is the next one of a router that runs: what it was started with may have been changed
    passed      signals that another process gets for this one, and by which it passes each on
    drained     set when the last connection is closed while draining
    """

    mark = b""
    given: GivenPort | None = None
    state_file: str | None = None
    restarted = False
    passed: Mapping[signal.Signals, int] = {}

    def __init__(self) -> None:
        self.drained = asyncio.Event()

    @property
    def connections(self) -> int:
        """Open client connections."""
        return 0

    @property
    def active(self) -> int:
        """Requests in flight."""
        return 0

    @property
    def upstream(self) -> int:
        """Open connections to workers."""
        return 0

    @property
    def tunnels(self) -> int:
        """Open WebSockets."""
        return 0

    def unanswered(self) -> Unanswered:
        """Sum up the requests without a first byte."""
        return Unanswered(0, 0, 0, 0.0)

    def attach(self, app: App) -> None:
        """Take the parts of the router, which is built."""

    def keep(self, save: Callable[[], Awaitable[object]]) -> None:
        """Take what writes the state: a process that decides may end at any time."""

    async def open(self) -> None:
        """Let the other processes accept clients."""

    def take_back(self, name: str) -> None:
        """Retry the requests at a worker, whose host does not answer."""

    def reload(self) -> None:
        """Let the other processes read keys and certificates again."""

    def stop_accepting(self) -> None:
        """Let the other processes accept no further clients."""

    def drain(self, last_request_timeout: float = 0.0) -> None:
        """Close each connection after the answer in flight; see `relay.clients.Clients.drain`."""
        self.drained.set()

    def cut(self) -> None:
        """Close all connections now."""
        self.drained.set()

    async def close(self) -> None:
        """End the other processes."""


@dataclass
class App:
    """The parts of one router. `build` makes it; `app.lifecycle` starts and stops it.

    models            chooses the policies of models
    policies          what policies are made with
    clients           the connections of the main port; scrapers: those of the metrics port
    elsewhere         the clients that other processes of this router serve
    frontend          the main port; metrics_frontend: the metrics port
    control           what the endpoints of the control plane use; plane: serves the control plane
    scaler            None: the number of workers is fixed
    discovery         looks for workers, where an option asks for it
    sharing           shares what this router knows with others; None: it is alone
    spans             sends the spans of traces; None: requests are not traced
    kv_events         follows what workers say of their caches; None: they are not asked
    tls               key and certificate of the main port; None: plain HTTP
    keepalives        fills the silence of streams; None: nothing does
    watched           all files of certificates and keys, to be loaded again when they change; and the next one
    issuer            the keys of the identity provider; None: there is none
    """

    args: RouterArgs
    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    listeners: Listeners
    deferred: Deferred
    fleet: Fleet
    router: Router
    models: ModelPolicies
    policies: PolicyParts
    connections: ConnectionPool
    checks: HealthChecks
    survey: EngineSurvey
    membership: Membership
    clients: Clients
    scrapers: Clients
    elsewhere: Elsewhere
    relay: Relay
    keepalives: KeepAlives | None
    frontend: Frontend
    metrics_frontend: Frontend
    metrics: Metrics
    control: Context
    plane: ControlPlane
    scaler: Autoscaler | None
    discovery: Discovery
    sharing: FleetSharing | None
    spans: Export | None
    kv_events: KVEvents | None
    tls: TLSFiles | None
    watched: list[Renewed]
    issuer: IssuerKeys | None

    @property
    def learned(self) -> bool:
        """Whether this router knows what the others of its fleet do, as far as it can."""
        return self.sharing is None or self.sharing.learned

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
