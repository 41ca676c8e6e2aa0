"""The decision as data: values that could be sent to another process.

    RequestTag     identifies a request in events and logs
    Plan           legs = (PlannedLeg, ...)       one leg; two for prefill and decode, and in which order they are sent
      PlannedLeg   target, lease, branch          where the leg goes, the number of its lease, why there
        Target     URL, rank, key                 one worker, as the relay needs it
    Wait           until, why                     no plan yet: the request is queued

No value refers to a live worker, a connection or a bound method.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sglang_router.errors import RouterError

_NAMELESS: Final = (b"", b"", b"", None, False, None)


class Target(NamedTuple):
    """One worker as a destination. Equal targets share idle connections.

    url        base URL of the engine
    rank       data-parallel rank inside the engine; None for the engine as a whole
    key        the worker's own API key, sent as a bearer token; never shown
    name       what logs and metrics call the worker: its URL, with "@" and the rank for a rank
    worker_id  differs for each registration of one URL; "" for a destination that is no worker
    role       "regular"; "prefill" or "decode" with disaggregation
    """

    url: str
    rank: int | None = None
    key: bytes | None = None
    name: str = ""
    worker_id: str = ""
    role: str = "regular"

    def __repr__(self) -> str:
        return f"<Target {self.name or self.url}>"


class PlannedLeg:
    """One leg of a plan.

    lease    number of the leg's lease; the relay's reports to the decider identify the leg by it
    target   where the leg goes
    branch   the policy's reason, one word
    matched  bytes of the routing text that the worker is believed to have cached
    total    bytes of the routing text; 0 when the policy does not compare texts
    splice   JSON members to add at the end of the body, without the comma before them; b"" for none
    model    what the body names as its model instead of what the client wrote, JSON text; b"": the body stays as it is
    rid      the engine's name for the leg, set in the splice: the engine is asked to abort it when the leg is given up;
             of a list of prompts a name for each, with spaces between; b"": closing the connection ends the leg
    mark     added to the request's id for the engine, the same for both legs of an attempt; b"": the id is as it is
    partner  of a decode leg: the prefill leg of the same attempt; None for any other leg
    """

    __slots__ = ("branch", "lease", "mark", "matched", "model", "partner", "rid", "splice", "target", "total")

    def __init__(
        self,
        lease: int,
        target: Target,
        branch: str,
        matched: int = 0,
        total: int = 0,
        splice: bytes = b"",
        rid: bytes = b"",
        model: bytes = b"",
    ) -> None:
        self.lease = lease
        self.target = target
        self.branch = branch
        self.matched = matched
        self.total = total
        self.splice = splice
        self.rid = rid
        self.model = model
        self.mark = b""
        self.partner: PlannedLeg | None = None

    def __repr__(self) -> str:
        return f"<PlannedLeg {self.lease} {self.target.name} {self.branch} {self.matched}/{self.total}>"


class Plan:
    """The legs of one attempt.

    legs     the client gets the answer of the last one
    delay    seconds to wait before the legs are sent
    retries  attempts before this one
    handoff  the last leg is sent when the first one has answered, with what that answer hands over (vLLM); of a plan
             with one leg: what an earlier attempt was handed. False: all legs are sent at the same time
    """

    __slots__ = ("delay", "handoff", "legs", "retries")

    def __init__(
        self, legs: tuple[PlannedLeg, ...], delay: float = 0.0, retries: int = 0, handoff: bool = False
    ) -> None:
        self.legs = legs
        self.delay = delay
        self.retries = retries
        self.handoff = handoff

    def __repr__(self) -> str:
        pause = f" after {self.delay:.3g} s" if self.delay else ""
        return f"<Plan retry {self.retries}{pause}: {', '.join(map(repr, self.legs))}>"


class Wait:
    """The request is queued.

    until  when it has waited too long; seconds of the router's clock
    why    "place", "room", "start", "paused" or "session" (see `routing.queue`), or "decider" when the decider itself
           takes time
    """

    __slots__ = ("until", "why")

    def __init__(self, until: float, why: str) -> None:
        self.until = until
        self.why = why

    def __repr__(self) -> str:
        return f"<Wait for {self.why} until {self.until:.3f}>"


class Route:
    """Where a request was sent: method, path, and name of the relayed endpoint; "" for the control plane.

    Method and path are "" for bytes that were no valid HTTP request.
    """

    __slots__ = ("endpoint", "method", "path")

    def __init__(self, method: str = "", path: str = "", endpoint: str = "") -> None:
        self.method = method
        self.path = path
        self.endpoint = endpoint

    def __repr__(self) -> str:
        return f"<Route {self.method} {self.path}>"


class RequestTag:
    """Identifies a request in events, logs and the decider's queue.

    number     unique in this process
    id         the request's id: the client's, or a generated one; raw_id: the same as bytes
    start      when the request was complete; seconds of the router's clock
    route      method, path and endpoint; shared by all requests to a path without parameters
    peer       address of the client; "" when it is not known
    client     name of the client's API key; "" when no key is required
    received   bytes of the request's body
    named      what was read from its header; see `wire.request_id.Named`
    queued     seconds for which it was queued; 0: it was not
    explained  the client asks why the worker is chosen (x-sglang-router-explain)
    model      the model as sent, JSON text; "" when the request names none
    streaming  the client asked for a stream
    limits     what the client is told of its limits: fields of a header, each with its CRLF; b"": nothing
    """

    __slots__ = (
        "client",
        "explained",
        "id",
        "limits",
        "model",
        "named",
        "number",
        "peer",
        "queued",
        "raw_id",
        "received",
        "route",
        "start",
        "streaming",
    )

    def __init__(
        self,
        number: int,
        raw_id: bytes,
        start: float,
        route: Route,
        peer: str = "",
        client: str = "",
        received: int = 0,
        named: tuple[bytes, bytes, bytes, RouterError | None, bool, int | None] = _NAMELESS,
    ) -> None:
        self.number = number
        self.raw_id = raw_id
        self.id = raw_id.decode("latin-1")
        self.start = start
        self.route = route
        self.peer = peer
        self.client = client
        self.received = received
        self.named = named
        self.explained = named[4]
        self.model = ""
        self.limits = b""
        self.streaming = False
        self.queued = 0.0

    def __repr__(self) -> str:
        return f"<RequestTag {self.number} {self.id} {self.route.method} {self.route.path}>"

    @property
    def session(self) -> str:
        """The header X-SMG-Routing-Key; "" without one."""
        return self.named[1].decode("latin-1")

    @property
    def trace(self) -> str:
        """The header traceparent; "" without one."""
        return self.named[2].decode("latin-1")
