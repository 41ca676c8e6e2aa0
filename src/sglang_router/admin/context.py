"""What the handlers of the control plane share: the parts of the router that they use, and the kind of answer.

A handler is `async def handler(context, request) -> Response`; it raises a RouterError for what it refuses. It owns
nothing: workers belong to the fleet, connections to `relay.connection_pool`, health checks to `workers.health_checks`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang_router.access.host_names import OwnNames
from sglang_router.access.permissions import Access
from sglang_router.admin.decision_book import DecisionBook
from sglang_router.admin.live import Live
from sglang_router.admin.pausing import Pausing
from sglang_router.admin.shared import Shared
from sglang_router.autoscale.autoscaler import Autoscaler
from sglang_router.config import RouterArgs
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.roles import DECODE, PREFILL, REGULAR
from sglang_router.routing.rules import HealthRules
from sglang_router.routing.source import SourceReport
from sglang_router.routing.states import Health
from sglang_router.routing.worker import Worker
from sglang_router.sharing.sharing import FleetSharing
from sglang_router.wire.headers import ForwardRules
from sglang_router.workers.fetch import Sent
from sglang_router.workers.health_checks import HealthChecks
from sglang_router.workers.membership import Membership

Render = Callable[[str], Awaitable[tuple[bytes, str]]]
"""Makes the exposition of metrics for an Accept header, with its content type."""

T = TypeVar("T")

_SHARED = 1.0
"""Seconds for which an answer is shared."""


class AddRules(msgspec.Struct, frozen=True):
    """How a worker is added over the API, unless the request says otherwise.

    startup_timeout  seconds that POST /add_worker waits until the worker is healthy
    health           its health checks
    api_key          the key that the router sends to it
    dp_aware         whether each data-parallel rank becomes a worker of its own
    """

    startup_timeout: float
    health: HealthRules
    api_key: str | None
    dp_aware: bool


class AskTimeouts(msgspec.Struct, frozen=True):
    """Seconds that a worker has for its whole answer.

    question   what an engine answers from memory
    generate   one token of /health_generate
    control    what the control plane passes on: loading new weights takes minutes
    """

    question: float = 5.0
    generate: float = 20.0
    control: float = 600.0


class SharedAnswer(Generic[T]):
    """An answer of workers that all who ask within a second share, also while the workers are being asked.

    It is valid for what was asked, until a moment of the clock; `lock` is held while workers are asked.
    """

    def __init__(self) -> None:
        self._asked: tuple[object, ...] = ()
        self._until = -math.inf
        self._answer: T | None = None
        self._lock = asyncio.Lock()
        self._generation = 0

    def forget(self) -> None:
        """Let nobody share the last answer, or one that is on its way: what was asked for has changed."""
        self._generation += 1
        self._answer = None

    async def get(
        self,
        asked: tuple[object, ...],
        clock: Callable[[], float],
        ask: Callable[[], Awaitable[T]],
        shared: Callable[[T], bool] = lambda answer: True,
    ) -> T:
        """Return the answer for `asked`: the last one while it is valid, else what `ask` returns.

        shared  whether an answer is for others, too
        """
        async with self._lock:
            if self._answer is not None and asked == self._asked and clock() < self._until:
                return self._answer
            generation = self._generation
            answer = await ask()
            if shared(answer) and generation == self._generation:
                self._answer, self._asked, self._until = answer, asked, clock() + _SHARED
            return answer


class ReloadReport(msgspec.Struct, frozen=True):
    """What a reload did.

    changed        flags of the options that have other values now
    needs_restart  flags of those whose new values count after a restart only
    added          URLs of workers that the file names now; removed: of those that only it had named
    file           the file of --config; None: there is none, so that only keys and certificates were read again
    """

    changed: list[str]
    needs_restart: list[str]
    added: list[str]
    removed: list[str]
    file: str | None


class ReplicaControl(Protocol):
    """Runs engines on this machine: the supervisor of `launch_server`. Each of these returns at once."""

    def describe(self, worker: Worker) -> dict[str, Any] | None:
        """Describe a worker's process; None if somebody else runs it."""

    def restart_worker(self, worker: Worker) -> None:
        """Start to drain and restart one worker. Raises: Conflict, if it restarts already or somebody else runs it."""

    def restart_all(self) -> None:
        """Start to restart all, one after the other. Raises: Conflict, if that is in progress already."""

    @property
    def rolling(self) -> dict[str, Any]:
        """The progress of `restart_all`."""


class FleetWide(Protocol):
    """Tells the other routers of the fleet which workers an operator adds and removes here (`app.fleet_workers`)."""

    def added(self, worker: Worker) -> str:
        """Tell of a worker that was added; return in words whether the others add it."""

    def removed(self, workers: Sequence[Worker]) -> str:
        """Tell of workers of one engine that were removed; return in words whether the others remove it, or ""."""


@dataclass
class Context:
    """The parts of the router that the control plane uses.

    clock           gives seconds; all moments are its
    metrics_render  Accept header -> exposition and its content type
    access          who may read and who may change
    own_names       names by which browsers may ask for what needs no key
    engine_metrics  the metrics of all engines, for all who ask
    forward         what of a client's request workers may see
    autoscaler      decides how many workers there should be; None: the number is fixed
    replicas        runs the engines; None: they run elsewhere
    decisions       the last ones; None: they are not kept
    aliases         other names of models: the model of each
    paired          the options ask for prefill and decode workers (--pd-disaggregation)
    discovery       returns what each source that looks for workers says of itself; None: there is none
    sharing         shares what this router knows with others; None: it is alone
    fleet_workers   adds and removes workers at all routers of the fleet; None: each has its own
    fan_out         workers that are asked at once by a request for several; 0: all
    args            the options in effect
    reload          reads the configuration again; None: it cannot be. Raises: ConfigRefused
    ending          the router is about to stop: it is not ready any more
    live            what the page shows; `app.build` sets it
    pausing         which engines lack what, by the orders that are carried out
    """

    fleet: Fleet
    pool: ConnectionPool
    checks: HealthChecks
    membership: Membership
    clock: Callable[[], float]
    metrics_render: Render
    engine_metrics: Shared[bytes]
    add_rules: AddRules
    access: Access = field(default_factory=Access)
    own_names: OwnNames = field(default_factory=OwnNames)
    forward: ForwardRules = field(default_factory=ForwardRules)
    autoscaler: Autoscaler | None = None
    timeouts: AskTimeouts = field(default_factory=AskTimeouts)
    replicas: ReplicaControl | None = None
    decisions: DecisionBook | None = None
    discovery: Callable[[], list[SourceReport]] | None = None
    sharing: FleetSharing | None = None
    fleet_workers: FleetWide | None = None
    fan_out: int = 0
    models: SharedAnswer[Any] = field(default_factory=SharedAnswer)
    generated: SharedAnswer[Any] = field(default_factory=SharedAnswer)
    aliases: Mapping[str, str] = field(default_factory=dict)
    paired: bool = False
    args: RouterArgs = field(default_factory=RouterArgs)
    reload: Callable[[str], ReloadReport] | None = None
    ending: bool = False
    live: Live = field(init=False)
    pausing: Pausing = field(init=False)

    def __post_init__(self) -> None:
        self.pausing = Pausing(self.fleet)

    def attach_replicas(self, replicas: ReplicaControl) -> None:
        """From now on, describe and restart the engines that `replicas` runs."""
        self.replicas = replicas

    def added(self, worker: Worker) -> str:
        """Take note that an operator has added a worker; return what the other routers do, to follow a sentence."""
        told = "" if self.fleet_workers is None else self.fleet_workers.added(worker)
        return f"; {told}" if told else ""

    def removed(self, workers: Sequence[Worker]) -> str:
        """Take note that an operator has removed workers of one engine; return the same."""
        told = "" if self.fleet_workers is None else self.fleet_workers.removed(workers)
        return f"; {told}" if told else ""

    @property
    def lacks(self) -> str:
        """What the router needs of prefill and decode workers and does not have, as a sentence; "" for nothing."""
        now, pools = self.clock(), self.fleet.pools
        if not (pools.paired or self.paired):
            return ""
        able = {pool.key.role for pool in pools if any(w.health is Health.HEALTHY for w in pool.able(now))}
        if REGULAR in able and not self.paired:
            return ""
        missing = [role for role in (PREFILL, DECODE) if role not in able]
        return f"no {' and no '.join(missing)} worker can take requests" if missing else ""

    def serving(self) -> tuple[Worker, ...]:
        """The workers to ask: those that may take a request now, else those that the health checks find healthy.

        Raises: Unavailable or a subclass when there are none.
        """
        now = self.clock()
        healthy = self.fleet.candidates(now) or tuple(
            worker for worker in self.fleet if not worker.draining and worker.health is Health.HEALTHY
        )
        if not healthy:
            raise self.fleet.unavailable(now)
        return healthy

    def sent(self, request: Request, content_type: bytes = b"application/json") -> Sent:
        """What workers get of a client's head when they are asked for it: its Via, and its Authorization for workers
        without a key of their own, by the rules of inference."""
        headers = request.scope["headers"]
        keyed = all(worker.spec.api_key for worker in self.fleet)
        via = b", ".join(value.strip() for name, value in headers if name == b"via")
        return Sent(content_type, None if keyed else self.forward.authorization(headers), via)

    def keys(self) -> set[str]:
        """The keys of all workers, which must not be in any answer."""
        return {worker.spec.api_key for worker in self.fleet if worker.spec.api_key}

    def engines(self) -> list[Worker]:
        """One worker per engine: the ranks of one engine share its control plane."""
        return list({worker.spec.url: worker for worker in reversed(list(self.fleet))}.values())[::-1]

    def forget_prefixes(self, worker: Worker) -> None:
        """Tell the policy that the cache of this worker's engine is empty or stale."""
        for entry in self.fleet.entries(worker.spec.url):
            self.fleet.emptied(entry)


class JSON(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the content. Half of a surrogate pair, which engines may answer with, stays an escape."""
        try:
            return msgspec.json.encode(content)
        except UnicodeEncodeError:
            return json.dumps(msgspec.to_builtins(content)).encode()
