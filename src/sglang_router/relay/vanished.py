"""Take requests back from a worker whose host does not answer any more (no route, or no connection in time).

The kernel would find that out after minutes, and the timeouts of the router are made for engines that compute. The
health checks know it earlier: when they turned a worker unhealthy, and open no connection to it, its requests that got
no byte of an answer yet are retried elsewhere.

An engine that accepts connections and is slow to answer its checks may be computing: its requests stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sglang_router.relay.clients import AnyExchange
from sglang_router.relay.exchange import Exchange
from sglang_router.relay.states import ROUTED
from sglang_router.routing.outcome import Outcome

Vanished = Callable[[str], None]
"""Called with the name of a worker."""


def take_back(exchanges: Iterable[AnyExchange], name: str) -> None:
    """Retry the requests at a worker, whose host does not answer, if they got nothing yet."""
    for exchange in list(exchanges):
        if not isinstance(exchange, Exchange) or exchange.state is not ROUTED:
            continue
        if exchange.tag.number in exchange.relay.queued:
            continue  # its leg failed already, and another one is awaited
        for leg in exchange.legs if exchange.pair is None else exchange.pair.in_flight():
            if leg.planned.target.name == name:
                leg.abort()
                leg.broken(Outcome.VANISHED, "The worker's host does not answer any more.")
                break
