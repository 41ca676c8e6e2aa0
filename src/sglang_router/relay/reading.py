"""Read the facts of a request and ask the decider: at once, or in steps when the body is large.

Exchange.start --> read_and_ask --> ask --> Exchange.follow, or Exchange.queue
                        |
                        '-- large: bulk.add(LargeBody.step) --> step ... step --> ask, or Exchange.refuse
                                                                  '-- the client left: no further step
"""

from __future__ import annotations

from typing import Protocol

from sglang_router.errors import ReservedField, RouterError
from sglang_router.relay.handled import Continuable, Handled
from sglang_router.relay.relay import Relay
from sglang_router.relay.states import NEW, ExchangeState
from sglang_router.routing.facts import LARGE, Endpoint, Facts, Skimming, read
from sglang_router.routing.plan import Plan, RequestTag, Wait


class Unrouted(Continuable, Protocol):
    """A new exchange, as this module uses it."""

    handled: Handled | None
    relay: Relay
    state: ExchangeState
    tag: RequestTag

    def follow(self, plan: Plan) -> None:
        """Send the legs of a plan."""

    def queue(self, wait: Wait) -> None:
        """Wait for the decider, which answers later."""

    def refuse(self, error: RouterError) -> None:
        """Answer with an error of the router."""


def read_and_ask(exchange: Unrouted, endpoint: Endpoint, routing_key: bytes, now: float) -> None:
    """Read the facts and ask the decider.

    Raises: RouterError, when the request is refused.
    """
    body, most_text = exchange.request.body, exchange.relay.most_text
    if len(body) > LARGE and endpoint.json:
        large = LargeBody(exchange, Skimming(endpoint, body, routing_key, most_text))
        exchange.relay.batch.bulk.add(large.step)
    else:
        _ask(exchange, read(endpoint, body, routing_key, most_text), now)


class LargeBody:
    """The body of an exchange that is not routed yet. `relay.bulk` calls `step`."""

    __slots__ = ("_exchange", "_reading")

    def __init__(self, exchange: Unrouted, reading: Skimming) -> None:
        self._exchange = exchange
        self._reading = reading

    def __repr__(self) -> str:
        return f"<LargeBody {self._reading!r}>"

    def step(self) -> bool:
        """Read on; return whether there is more to read."""
        exchange = self._exchange
        if exchange.state is not NEW:  # the client left
            return False
        try:
            facts = self._reading.step()
            if facts is None:
                return True
            _ask(exchange, facts, exchange.relay.clock())
        except RouterError as error:
            exchange.refuse(error)
        return False


def _ask(exchange: Unrouted, facts: Facts, now: float) -> None:
    """Ask the decider where a request goes.

    Raises: RouterError, when it is refused.
    """
    relay, tag = exchange.relay, exchange.tag
    exchange.facts = facts
    if facts.reserved and not relay.forward.trusted:
        raise ReservedField(facts.reserved)
    if facts.model:
        tag.model = facts.model.decode("utf-8", "replace")
    tag.streaming = facts.streaming
    answer = relay.decider.ask(tag, facts, now)
    if facts.streaming and (handler := relay.handlers(facts.endpoint, exchange.request.body, facts)) is not None:
        exchange.handled = Handled(exchange, handler)
    if isinstance(answer, Plan):
        exchange.follow(answer)
    else:
        exchange.queue(answer)
