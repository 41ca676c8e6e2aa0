"""What relays and the decider tell each other: plain records, and nothing else.

    relay --> decider                                       decider --> relay
    Hello      who it is, and its open requests             Welcome     all that a new relay must know
    Ask        where does a new request go?                 Planned, Waits, Refused, NoRetry     the answers
    Retry      a leg failed                                 Known, Forgotten                     workers
    Began, Ended, Done, Withdraw, Suspect, Holds, Shown, Unasked      TakeBack    a worker's host vanished
    Stats, Accepts    what is open                          Wanted      whether asks need a fingerprint
    Said       a log line                                   Accept, Drain, StopAccepting, Cut, ReadAgain
    Drained    its last client connection is closed
    AppAsk, AppBody, AppTaken, AppGone (control plane)      AppWants, AppHead, AppData, AppFailed, AppDone

`number` is a request's number in its relay, `lease` the number of a leg's lease, `worker` the decider's number of a
worker, `outcome` an index of `facing.OUTCOMES`. Times are seconds of CLOCK_MONOTONIC, the same in all processes.
"""

from __future__ import annotations

from sglang_router.processes.message import (
    AppAsk,
    AppBody,
    AppData,
    AppDone,
    AppFailed,
    AppGone,
    AppHead,
    AppTaken,
    AppWants,
    ErrorSent,
    Message,
    PlannedOne,
    ReadAgain,
)

# -- relay to decider --------------------------------------------------------------------------------------------------


class Ask(Message, tag=1):
    """A new request. Fields are those of RequestTag and Facts.

    endpoint   index of the endpoint in the table of endpoints
    method     "" where the endpoint has only one, and one path
    size       bytes of the body; digest: its fingerprint, or b""
    text       the routing text; None: it is in the shared memory at `at`, `length` bytes
    explained  the client asks why the worker is chosen; priority: that it asks for
    session    that header or body name, or b""; follows, division, sequences (with prefill workers only): see Facts
    """

    number: int
    endpoint: int
    now: float
    id: bytes
    start: float
    peer: str
    client: str
    size: int
    key: bytes
    trace: bytes
    model: bytes
    namespace: bytes
    scaffold: int
    streaming: bool
    text: bytes | None
    at: int = 0
    length: int = 0
    method: str = ""
    path: str = ""
    digest: bytes = b""
    explained: bool = False
    session: bytes = b""
    follows: bytes = b""
    division: bytes = b""
    sequences: int = 0
    priority: int | None = None


class Retry(Message, tag=2):
    """A leg failed; see `Decider.retry`. facts: the request's as it is now, where the decider does not know them."""

    number: int
    lease: int
    outcome: int
    now: float
    continued: bool
    status: int
    digest: bytes
    facts: Ask | None


class Began(Message, tag=3):
    """The first byte of a stream's answer arrived."""

    lease: int
    now: float


class Ended(Message, tag=4):
    """A leg ended. prompt, cached, completion: the fields of Usage."""

    lease: int
    outcome: int
    now: float
    digest: bytes
    prompt: int = -1
    cached: int = -1
    completion: int = -1


class Answer(Message, tag=5):
    """The fields of events.Answered, and of its usage; outcome: -1 for None."""

    status: int
    code: str
    outcome: int
    duration: float
    first_byte: float
    sent: int
    retries: int
    resumed: int
    unresumed: str
    prompt: int = -1
    cached: int = -1
    completion: int = -1
    handoff: str = ""


class Done(Message, tag=6):
    """A request ended; lease: its last leg, 0 without one. ended: that leg ends now, too, with this outcome.

    taken  bytes that a client sent through its WebSocket; -1: it had none
    """

    number: int
    lease: int
    answer: Answer
    now: float
    ended: int
    digest: bytes
    taken: int = -1


class OpenLeg(Message, tag=7):
    """A leg that an earlier decider has planned. name, worker_id: its worker; since: when it was sent."""

    lease: int
    name: str
    worker_id: str
    branch: str
    matched: int
    total: int
    began: bool
    since: float


class OpenRequest(Message, tag=8):
    """A request that has been asked for; ask: without its text."""

    ask: Ask
    legs: list[OpenLeg]


class Unasked(Message, tag=9):
    """A request ended that the decider never heard of. endpoint: its name; leg: its last one."""

    id: bytes
    start: float
    method: str
    path: str
    endpoint: str
    peer: str
    client: str
    size: int
    key: bytes
    trace: bytes
    model: str
    streaming: bool
    answer: Answer
    leg: OpenLeg | None


class Withdraw(Message, tag=10):
    """The client of a request left, or its relay waits no longer, before the decider's answer had arrived."""

    number: int
    now: float


class Suspect(Message, tag=11):
    """The connection to a worker broke."""

    name: str


class Holds(Message, tag=25):
    """The leg's worker keeps a response with this id."""

    lease: int
    response: bytes


class Shown(Message, tag=12):
    """The client gets the first byte of an answer."""

    number: int
    lease: int
    seconds: float


class Stats(Message, tag=13):
    """What a relay has open; requests, held, size, oldest: see `relay.clients.Unanswered`."""

    connections: int
    active: int
    upstream: int
    requests: int
    held: int
    size: int
    oldest: float
    tunnels: int = 0


class Said(Message, tag=14):
    """A log record."""

    level: int
    logger: str
    message: str
    fields: dict[str, str]
    trace: str


class Drained(Message, tag=15):
    """The last client connection is closed. round: of the Drain or Cut that asked for it."""

    round: int


class Accepts(Message, tag=21):
    """The relay accepts clients, or cannot: error is then the number of the system's error, else 0."""

    error: int


class Hello(Message, tag=16):
    """The first message of a relay. index: which relay it is, from 0; pid: of its process."""

    index: int
    pid: int
    requests: list[OpenRequest]


# -- decider to relay --------------------------------------------------------------------------------------------------


class Planned(Message, tag=33):
    """A plan. limits: see RequestTag."""

    number: int
    legs: list[PlannedOne]
    delay: float
    retries: int
    handoff: bool
    limits: bytes = b""


class Waits(Message, tag=34):
    """The request is queued."""

    number: int
    until: float
    why: str


class Refused(Message, tag=36):
    """The request is refused. limits: see RequestTag."""

    number: int
    error: ErrorSent
    limits: bytes = b""


class NoRetry(Message, tag=37):
    """There is no retry."""

    number: int


class Known(Message, tag=38):
    """A worker, or the new destination of a known one; fields of Target."""

    worker: int
    url: str
    rank: int | None
    key: bytes | None
    name: str
    worker_id: str
    role: str


class Forgotten(Message, tag=39):
    """A worker was removed."""

    worker: int


class Welcome(Message, tag=40):
    """All that a new relay must know.

    workers      those that are registered
    wanted       asks need a fingerprint
    first_bytes  somebody hears when an answer begins
    accepting    clients may be accepted
    level        least severe level of log records that are wanted
    """

    workers: list[Known]
    wanted: bool
    first_bytes: bool
    accepting: bool
    level: int


class TakeBack(Message, tag=41):
    """The host of a worker does not answer."""

    name: str


class Wanted(Message, tag=42):
    """Whether asks need a fingerprint."""

    wanted: bool


class Accept(Message, tag=43):
    """Accept clients."""


class Drain(Message, tag=44):
    """Close each connection after the answer in flight. round: rises with each Drain and Cut."""

    round: int
    last_request_timeout: float


class StopAccepting(Message, tag=45):
    """Accept no further clients."""


class Cut(Message, tag=46):
    """Close all connections now."""

    round: int


FromRelay = (
    Ask
    | Retry
    | Began
    | Ended
    | Done
    | Unasked
    | Withdraw
    | Suspect
    | Holds
    | Shown
    | Stats
    | Accepts
    | Said
    | Drained
    | Hello
    | AppAsk
    | AppBody
    | AppTaken
    | AppGone
)
FromDecider = (
    Planned
    | Waits
    | Refused
    | NoRetry
    | Known
    | Forgotten
    | Welcome
    | TakeBack
    | Wanted
    | Accept
    | Drain
    | StopAccepting
    | Cut
    | ReadAgain
    | AppWants
    | AppHead
    | AppData
    | AppFailed
    | AppDone
)
