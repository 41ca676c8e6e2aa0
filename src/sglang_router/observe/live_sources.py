"""Where a scrape finds the numbers that it does not count itself: a record, apart from what mypyc compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from sglang_router.routing.kv_index import KVIndex
from sglang_router.routing.policies.shadowed import ShadowTally
from sglang_router.routing.retry_budget import RetryBudget
from sglang_router.routing.sessions import Sessions
from sglang_router.routing.shared.records import SharedReading
from sglang_router.routing.source import SourceReport

Number = Callable[[], int]


class Certificate(Protocol):
    """A certificate in use. expires_at: seconds since 1970; None: there is none."""

    expires_at: float | None


class SpanCounts(Protocol):
    """Spans of traces that the collector took, and those that were lost."""

    sent: int
    lost: int


class SharedTraffic(Protocol):
    """Messages and bytes that went to a store and came from it, by topic; lost: those that could not be written.
    lag: seconds from writing until reading; None: not measured yet."""

    sent: dict[str, int]
    sent_bytes: dict[str, int]
    received: dict[str, int]
    received_bytes: dict[str, int]
    lost: dict[str, int]
    lag: float | None


class SharedCounts(Protocol):
    """What a router shares with others."""

    @property
    def reading(self) -> SharedReading:
        """What was heard and is known of the others."""

    @property
    def traffic(self) -> SharedTraffic:
        """What goes to the store and comes from it."""

    @property
    def state(self) -> str:
        """Whether the store is reached, or what is wrong, in one word."""

    @property
    def losses(self) -> int:
        """How often it could not be reached any more."""

    @property
    def leads(self) -> bool:
        """Whether this router is the one that acts for all."""


class LiveSources(msgspec.Struct, kw_only=True):
    """Numbers that other parts of the router own; each is read at the scrape.

    None: the number is not known, and its family has no samples. A source may be set later.

    connections           open client connections
    active                requests in flight, of every kind
    upstream_connections  open connections to workers
    tunnels               open WebSockets
    lost_lines            log lines that could not be written
    waiting               queued inference requests
    waiting_sessions      queued requests that wait to begin a session
    sessions              the sessions of requests, where an option asks for them
    desired_workers       how many workers there should be (autoscaling)
    decisions             records of decisions that are kept
    unlogged_decisions    requests that are missing in the log of decisions
    shadows               what the shadow policies would have done
    kv_index              what workers say of their KV caches
    shared                shares what this router knows with others
    spans                 sends the spans of traces
    retry_budget          limits all retries together
    version               of the router
    configured            when its options were read last, seconds since 1970
    certificates          those in use, by what they are for: "server", "workers"
    body_bytes            bytes of request bodies in memory; body_limit: the most there may be
    policy_of             the policy of a model by its name, "" for the usual one
    discovery             what each source that looks for workers says of itself
    replicas              URL, number of restarts, and whether it is up, of each replica that the router runs itself
    """

    connections: Number | None = None
    active: Number | None = None
    upstream_connections: Number | None = None
    tunnels: Number | None = None
    lost_lines: Number | None = None
    waiting: Number | None = None
    waiting_sessions: Number | None = None
    sessions: Sessions | None = None
    desired_workers: Number | None = None
    decisions: Number | None = None
    unlogged_decisions: Number | None = None
    shadows: ShadowTally | None = None
    kv_index: KVIndex | None = None
    shared: SharedCounts | None = None
    spans: SpanCounts | None = None
    retry_budget: RetryBudget | None = None
    version: str = ""
    configured: float = 0.0
    certificates: dict[str, Certificate] = msgspec.field(default_factory=dict)
    body_bytes: Number | None = None
    body_limit: Number | None = None
    policy_of: Callable[[str], str] | None = None
    discovery: Callable[[], Iterable[SourceReport]] | None = None
    replicas: Callable[[], Iterable[tuple[str, int, bool]]] | None = None
