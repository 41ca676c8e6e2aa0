"""Connect the body handler of an exchange with its legs, its client and the decider.

    leg.data ---> Handled.data --> handler.feed --> the client
                       |
                       '-- the worker failed, or the answer is cut --> handler.broke
                                                      NextLeg    another plan; its answer continues this one
                                                      Complete   the rest is written, the exchange is finished
                                                      Broken     the exchange fails as without a handler

Only streams for which a handler was chosen (`--resume-streams`) have a `Handled`.
"""

from __future__ import annotations

from typing import Protocol

from sglang_router.errors import RouterError, StreamBroken
from sglang_router.relay.body import BodyHandler, Broken, Complete, NextLeg, Unintelligible
from sglang_router.relay.leg import Leg
from sglang_router.relay.pending import Pending
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.wire.request import Request
from sglang_router.wire.response import ResponseHead


class Continuable(Protocol):
    """An exchange, as this module uses it."""

    request: Request
    facts: Facts | None

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""

    def retry(self, pending: Pending, facts: Facts) -> bool:
        """Ask the decider for another plan; return False when there is none."""

    def finish(self, outcome: Outcome) -> None:
        """End the exchange: the whole answer is written."""

    def failed(self, outcome: Outcome, error: RouterError) -> None:
        """End the exchange with an error, unless the body handler can continue."""

    def goes_on(self, leg: Leg) -> None:
        """Watch the answer of a leg that continues the broken one."""


class Handled:
    """See the module. Each exchange with a handler has one; its legs pass their bytes to it."""

    __slots__ = ("_exchange", "handler")

    def __init__(self, exchange: Continuable, handler: BodyHandler) -> None:
        self._exchange = exchange
        self.handler = handler

    def begin(self, leg: Leg, head: ResponseHead) -> bool:
        """Take the head of the first answer; return whether the handler takes its body."""
        assert leg.framing is not None
        framing = self.handler.begin(head, leg.framing, leg.chunked, leg.events)
        if framing is None:
            return False
        leg.framing = framing
        leg.handled = self
        return True

    def continued(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Take the head of an answer that continues a broken one; the client already has a head."""
        assert leg.framing is not None
        wrong = self.handler.follow(head, leg.framing)
        if wrong:
            outcome = Outcome.of_status(head.status, head.header(b"retry-after") is not None)
            self._exchange.failed(outcome, StreamBroken(wrong))
            return
        leg.handled = self
        self._exchange.goes_on(leg)
        self.data(leg, data, done)

    def data(self, leg: Leg, data: bytes, done: bool) -> None:
        """Pass bytes of the body through the handler; `done`: they are the last."""
        handler, exchange = self.handler, self._exchange
        try:
            exchange.write(handler.feed(data))
        except Unintelligible as exc:
            exchange.failed(Outcome.INVALID, StreamBroken(str(exc)))
            return
        if handler.failed or (done and handler.is_cut()):
            pending = Pending(leg, Outcome.FAILED if handler.failed else Outcome.CUT)
            pending.done = done
            if not self.broke(pending):
                self.let_fail(leg, done)
        elif done:
            exchange.write(handler.end())
            exchange.finish(leg.outcome)

    def broke(self, pending: Pending) -> bool:
        """Continue a broken answer on another worker, or complete it; return False when it stays broken."""
        step = self.handler.broke()
        if isinstance(step, Complete):
            self._exchange.write(step.rest)
            self._exchange.finish(pending.outcome)
            return True
        if isinstance(step, Broken):
            return False
        pending.step = step
        if not self._exchange.retry(pending, step.facts):
            self.handler.no_leg()
            return False
        return True

    def follow(self, step: NextLeg) -> None:
        """Prepare the exchange for the next leg, for which there is a plan."""
        exchange = self._exchange
        exchange.request = exchange.request.with_body(step.body)
        exchange.facts = step.facts
        exchange.write(step.events)
        self.handler.follows()

    def let_fail(self, leg: Leg, done: bool) -> None:
        """Pass on the error event of a worker that reported its own failure: nothing continues its answer."""
        self._exchange.write(self.handler.let_fail())
        if done:
            self._exchange.write(self.handler.end())
            self._exchange.finish(leg.outcome)
