"""What all exchanges of one router share: the decider, the connections to workers and the rules.

An exchange that waits for the decider is in `queued`, by the number of its request; `deliver` passes it the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from sglang_router.relay.aborts import Aborts
from sglang_router.relay.answers import Answers
from sglang_router.relay.body import Handlers
from sglang_router.relay.connection_pool import ConnectionPool
from sglang_router.relay.rules import Timeouts, TunnelRules
from sglang_router.relay.tunnels import Tunnels
from sglang_router.routing.decider import Decider, Delivered
from sglang_router.routing.events import Listeners
from sglang_router.routing.session_hints import SessionHints
from sglang_router.routing.trace_ids import TraceIds
from sglang_router.wire.headers import ForwardRules


class Undecided(Protocol):
    """An exchange that waits for the decider."""

    def decided(self, answer: Delivered) -> None:
        """Act on the decider's answer."""


class RelayRules:
    """The options of the relay.

    timeouts      in seconds
    forward       which request fields are forwarded to workers
    handlers      returns the body handler of each stream
    most_text     bytes of a request's routing text that count
    inject_usage  ask engines for the usage of streams, see `relay.injected`
    hints         recognise the sessions of requests; None: no option asks for them
    tunnels       the limits on WebSockets
    traces        the ids of traces, which engines are told; None: no option asks for traces
    """

    __slots__ = ("forward", "handlers", "hints", "inject_usage", "most_text", "timeouts", "traces", "tunnels")

    def __init__(
        self,
        timeouts: Timeouts,
        forward: ForwardRules,
        handlers: Handlers,
        most_text: int,
        inject_usage: bool = False,
        hints: SessionHints | None = None,
        tunnels: TunnelRules = TunnelRules(),  # noqa: B008  (frozen)
        traces: TraceIds | None = None,
    ) -> None:
        self.timeouts = timeouts
        self.forward = forward
        self.handlers = handlers
        self.most_text = most_text
        self.inject_usage = inject_usage
        self.hints = hints
        self.tunnels = tunnels
        self.traces = traces


class Relay:
    """See the module. clock: returns seconds and never goes back."""

    __slots__ = (
        "aborts",
        "answers",
        "batch",
        "call_later",
        "clock",
        "connections",
        "decider",
        "forward",
        "handlers",
        "hints",
        "ids",
        "inject_usage",
        "listener",
        "most_text",
        "queued",
        "timeouts",
        "traces",
        "tunnels",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        decider: Decider,
        connections: ConnectionPool,
        answers: Answers,
        listener: Listeners,
        rules: RelayRules,
    ) -> None:
        self.call_later = loop.call_later
        self.clock = clock
        self.decider = decider
        self.connections = connections
        self.batch = connections.batch
        self.answers = answers
        self.ids = answers.ids
        self.listener = listener
        self.timeouts = rules.timeouts
        self.forward = rules.forward
        self.handlers = rules.handlers
        self.most_text = rules.most_text
        self.inject_usage = rules.inject_usage
        self.hints = rules.hints
        self.traces = rules.traces
        self.aborts = Aborts(connections, loop.call_later, rules.forward)
        self.tunnels = Tunnels(rules.tunnels)
        self.queued: dict[int, Undecided] = {}
        decider.deliver = self.deliver

    def __repr__(self) -> str:
        return f"<Relay {len(self.queued)} queued, {self.connections!r}>"

    def deliver(self, number: int, answer: Delivered) -> None:
        """Pass the decider's late answer to its exchange; ignore it when the client has left."""
        exchange = self.queued.pop(number, None)
        if exchange is not None:
            exchange.decided(answer)
