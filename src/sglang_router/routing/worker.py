"""A worker: one engine behind a base URL, with its health, its circuit and its load.

The fleet owns workers and is the only one to change their state. Three things decide whether a worker may take a
request: is it in rotation, is it healthy, does its circuit let a request pass. `routing.pools` combines them.
"""

from __future__ import annotations

from typing import Final

from sglang_router.routing.belief import Belief
from sglang_router.routing.breaker import Circuit
from sglang_router.routing.decisions import Decisions
from sglang_router.routing.engine_report import NOTHING, EngineReport
from sglang_router.routing.model_names import NO_NAMES, Names, base_of, text_of
from sglang_router.routing.outcome import Hears
from sglang_router.routing.outliers import Outliers
from sglang_router.routing.plan import Target
from sglang_router.routing.roster import Roster
from sglang_router.routing.spec import WorkerSpec
from sglang_router.routing.states import Breaker, Health
from sglang_router.routing.tokens import Tokens
from sglang_router.routing.window import Window
from sglang_router.routing.work import Work

_SPREAD: Final = 0.6180339887
"""Golden ratio: its multiples, less their whole parts, are far from each other however many there are."""
UPDATING: Final = "weights_update"
"""In `Worker.paused`: its engine loads new weights. That passes by itself, however it ends."""
_USUAL_PRIORITY: Final = 50
_NOWHERE: Final = Roster()
"""Of workers without a pool; it stays empty."""


class Worker:
    """One engine, or one data-parallel rank of an engine.

    target     where its requests go, as the relay knows it
    url        its name: the base URL, for a rank with "@" and its number
    key        its own API key as it is sent; None without one
    splice     members that each JSON body sent to it gets at its end: its rank; b"" for none
    dresses    bodies sent to it may have to be changed: by `splice`, or because it is called what its engine is not
    order      rises with each registration: the order of rotation
    role       "regular", "prefill" or "decode": what its engine says, else what an operator does
    told_role  what its engine said last: "prefill" or "decode"; "" for neither
    told_port  the bootstrap port that its engine said last; it counts on while the engine says nothing
    window     how many requests it may run at once
    slot       its number in the prefix memory of its pool; -1: none
    seat       its number in its pool, see `routing.roster`; -1: none
    bit        the set of that seat while it is in `roster`; 0: it is not
    roster     the able workers of its pool by load
    since      when it was registered or its process lost, seconds of the caller's clock
    warm_at    when its slow start is over, seconds of the same clock
    report     what its engine said of itself last
    announced  the names of models that its engine announced last
    names      the names by which it serves: what an operator calls it, and those
    speaks     the names that its engine announced, as JSON text
    load       requests in flight there: leases open now, and those of other routers
    elsewhere  those of other routers, as they tell (`routing.shared`); 0 for a router that shares nothing
    waiting    streams sent there that have no byte of an answer yet
    weight     what its seconds count, by its `priority` and `cost`; 1 for an average one
    work       what is in front of a new request, and how quick the worker is
    life       rises when another process with an empty cache is found in its place
    caches     rises when its cache was emptied: by that, or by a flush
    ejected    why it is ejected as an outlier; "" if it is not
    withheld   why its source lets it get no new requests; "" if it may
    outliers   the outlier detection of its pool; None: there is none
    processed  requests it answered (outcome SERVED or REJECTED)
    decisions  counts of the legs that it was chosen for
    unread     requests sent there whose prompts may not be read yet: nothing of their answers has come
    tokens     what its engine told of its answers
    belief     what that says of the prefixes that are remembered of it
    hopeless   its health checks fail for a reason that waiting does not heal
    paused     what the control plane has stopped or taken from its engine: it gets no new requests until it has all
               back; () for nothing
    weights    the version of its weights, as the control plane told its engine; "": nobody said
    probing    number of the lease that its HALF_OPEN circuit let pass; 0: none
    """

    __slots__ = (
        "announced",
        "belief",
        "bit",
        "caches",
        "circuit",
        "decisions",
        "dp_rank",
        "draining",
        "dresses",
        "ejected",
        "elsewhere",
        "gone_silent",
        "health",
        "health_failures",
        "health_successes",
        "hopeless",
        "id",
        "key",
        "last_error",
        "life",
        "load",
        "names",
        "order",
        "outliers",
        "paused",
        "probing",
        "processed",
        "removed",
        "report",
        "returning",
        "role",
        "roster",
        "seat",
        "since",
        "slot",
        "speaks",
        "spec",
        "splice",
        "target",
        "tokens",
        "told_port",
        "told_role",
        "unread",
        "url",
        "waiting",
        "warm_at",
        "weight",
        "weights",
        "window",
        "withheld",
        "work",
    )

    def __init__(self, spec: WorkerSpec, worker_id: str, order: int, now: float) -> None:
        # for its whole life
        self.id = worker_id
        self.dp_rank = spec.dp_rank
        self.url = spec.url if spec.dp_rank is None else f"{spec.url}@{spec.dp_rank}"
        self.splice = b"" if spec.dp_rank is None else b'"data_parallel_rank":%d' % spec.dp_rank
        self.order = order
        # until it is amended or says more of itself
        self.announced = NO_NAMES
        self.told_role = ""
        self.told_port: int | None = None
        self.describe(spec)
        self.report: EngineReport = NOTHING
        self.slot = -1
        # load, and where its pool keeps it
        self.load = 0
        self.elsewhere = 0
        self.seat = -1
        self.bit = 0
        self.roster = _NOWHERE
        self.waiting = 0
        self.unread = 0
        self.work = Work()
        self.window = Window()
        self.processed = 0
        self.decisions = Decisions()
        self.tokens = Tokens()
        self.belief = Belief()
        # health
        self.health = Health.STARTING if spec.health.enabled else Health.HEALTHY
        self.health_failures = 0
        self.health_successes = 0
        self.last_error = ""
        self.hopeless = False
        self.gone_silent = False  # it refused a connection: whatever listens there next is another process
        self.life = 0
        self.caches = 0
        self.since = now
        self.warm_at = 0.0
        self.ejected = ""
        self.outliers: Outliers[Worker] | None = None
        # rotation
        self.draining = False
        self.returning = False  # draining because it is about to be restarted
        self.removed = False
        self.withheld = ""
        self.paused: tuple[str, ...] = ()
        self.weights = ""
        # breaker
        self.circuit = Circuit()
        self.probing = 0

    def __repr__(self) -> str:
        state = [self.health.value, f"breaker {self.breaker.value}", f"load {self.load}"]
        state += ["ejected"] * bool(self.ejected) + ["draining"] * self.draining
        state += ["withheld"] * bool(self.withheld) + ["removed"] * self.removed
        state += [f"paused: {', '.join(self.paused)}"] * bool(self.paused)
        return f"<Worker {self.url}: {', '.join(state)}>"

    def describe(self, spec: WorkerSpec) -> None:
        """Store what an operator says of the worker, and what follows from that."""
        key = spec.api_key.encode() if spec.api_key else None
        self.spec = spec
        self.key = key
        self.weight = spec.cost * _USUAL_PRIORITY / spec.priority if spec.priority > 0 and spec.cost > 0.0 else 1.0
        self.announce(self.announced)
        self._take_role()

    def tell_role(self, role: str) -> str:
        """Store the role that its engine tells; return the role that the worker had until now.

        It counts on while the engine tells nothing. What an operator says counts for an engine without disaggregation.
        """
        old = self.role
        told = "" if role == "regular" else role
        if told != self.told_role:
            self.told_role = told
            self._take_role()
        return old

    def _take_role(self) -> None:
        self.role = self.told_role or self.spec.worker_type
        self.target = Target(self.spec.url, self.dp_rank, self.key, self.url, self.id, self.role)

    def announce(self, names: Names) -> None:
        """Store the names that its engine announces."""
        given = self.spec.model_id
        self.announced = names
        self.speaks = frozenset([text_of(name) for name in (*names.bases, *names.adapters)])
        self.names = (
            Names((given, *(name for name in names.bases if name != given)), names.adapters) if given else names
        )
        self.dresses = bool(self.splice) or (bool(given and names.bases) and given not in names.bases)

    def spoken(self, asked: bytes, model: bytes) -> bytes:
        """Return what its engine calls the model of a request: what the client wrote, if the engine knows that.

        asked  what the client wrote, JSON text; model: who serves it, `asked` if that is no alias
        """
        speaks, announced = self.speaks, self.announced.bases
        base = base_of(model)
        if asked in speaks or base_of(asked) in speaks:
            return asked
        if not announced or model in speaks or base in speaks:
            return model
        given = text_of(self.spec.model_id) if self.spec.model_id else b""
        own = text_of(announced[0])
        if model == given:
            return own
        if base and base == given:
            return own[:-1] + model[len(base) - 1 :]
        return model

    @property
    def model(self) -> str | None:
        """The name of its model: what an operator calls it, else what its engine does; None when nobody says."""
        return self.names.bases[0] if self.names.bases else None

    @property
    def own_load(self) -> int:
        """The requests of this router in flight there."""
        return self.load - self.elsewhere

    @property
    def phase(self) -> float:
        """A share, from 0 to 1, of each interval after which its turn comes: all workers' turns are far apart."""
        return self.order * _SPREAD % 1.0

    @property
    def breaker(self) -> Breaker:
        """The state of its circuit."""
        return self.circuit.state

    @property
    def reason(self) -> str:
        """Why its last health check failed, without its API key: an engine may quote the request that it got."""
        key = self.spec.api_key
        return self.last_error.replace(key, "***") if key else self.last_error

    @property
    def in_rotation(self) -> bool:
        """Whether it is registered, and not draining, withheld or paused, whatever its health and its breaker."""
        return not (self.draining or self.removed or self.withheld or self.paused)

    @property
    def is_well(self) -> bool:
        """Whether it is healthy and in rotation, and its circuit lets a request pass, ejected or not."""
        return self.health is Health.HEALTHY and self.in_rotation and self.lets_pass

    @property
    def unreached(self) -> bool:
        """Whether failed contacts opened its circuit: nobody listens there, as far as is known."""
        circuit = self.circuit
        return circuit.opened_by is Hears.CONTACT_FAILURE and circuit.state is not Breaker.CLOSED

    @property
    def lets_pass(self) -> bool:
        """Whether its circuit lets one more request pass."""
        state = self.circuit.state
        return state is Breaker.CLOSED or (state is Breaker.HALF_OPEN and not self.probing)


def change_of_pause(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, str, str] | None:
    """Return what has changed with what an engine lacks, and the old and the new state; None: nothing that counts."""
    held, holds = (any(name != UPDATING for name in names) for names in (before, after))
    if held != holds:
        return ("paused", "paused", "running") if held else ("paused", "running", "paused")
    if bool(before) != bool(after):
        return ("updating", "updating", "running") if before else ("updating", "running", "updating")
    return None
