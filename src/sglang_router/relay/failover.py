"""Retry a failed leg, or end with its own answer or error.

retry_status(exchange, leg, ...)                            retries an answer with a failing status
retry(exchange, pending)      asks the decider: Plan    --> the failed legs are given up, the plan is followed
                                                Wait    --> the exchange keeps `pending` until `decided`
                                                None    --> False: no retry
decided(exchange, pending, answer)                          the same for the decider's late answer
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

from sglang_router.errors import RouterError
from sglang_router.relay.handled import Handled
from sglang_router.relay.leg import Leg
from sglang_router.relay.pending import Pending
from sglang_router.relay.relay import Relay
from sglang_router.relay.states import ROUTED, ExchangeState
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import BREAKS, Outcome
from sglang_router.routing.plan import Plan, RequestTag, Wait
from sglang_router.wire.response import ResponseHead

log: Final = logging.getLogger("sglang_router.relay")


class Failing(Protocol):
    """An exchange with a failed leg, as this module uses it."""

    relay: Relay
    tag: RequestTag
    facts: Facts | None
    handled: Handled | None
    state: ExchangeState

    def queue(self, wait: Wait, pending: Pending | None) -> None:
        """Wait for the decider's late answer."""

    def follow(self, plan: Plan, fresh: bool = False) -> None:
        """Send the legs of a plan. fresh: those of a retry go on new connections."""

    def give_up_legs(self, failed: Leg | None = None) -> None:
        """Abort all legs in flight but the failed one, and end those beside it."""

    def pass_on(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Pass the leg's answer on to the client."""

    def fail(self, outcome: Outcome, error: RouterError) -> None:
        """End with an error."""


def retry_status(exchange: Failing, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> bool:
    """Retry a leg that answered with a failing status; return False when its answer goes to the client.

    A status that is the client's mistake (4xx) is noted, and not retried: but a 404 for a stored response, which
    another worker may have.
    """
    outcome = Outcome.of_status(head.status, head.header(b"retry-after") is not None)
    if outcome is Outcome.SERVED:
        return False
    leg.outcome = outcome
    follows = exchange.facts is not None and exchange.facts.follows
    if outcome is Outcome.REJECTED and not (head.status == 404 and follows):
        return False
    if exchange.state is not ROUTED:  # the client has the head of another leg's answer
        return False
    pending = Pending(leg, outcome)
    pending.status = head.status
    pending.head, pending.data, pending.done = head, data, done
    if retry(exchange, pending):
        return True
    leg.speak()
    return False


def retry(exchange: Failing, pending: Pending, facts: Facts | None = None) -> bool:
    """Ask the decider for another plan; return False when there is none.

    True: the plan is followed, or the decider answers later.

    facts  of the request for the rest of a broken stream; None: the leg failed before the head of an answer
    """
    relay, leg = exchange.relay, pending.leg
    known = facts or exchange.facts
    assert known is not None
    try:
        answer = relay.decider.retry(
            exchange.tag, leg.planned, known, pending.outcome, relay.clock(), facts is not None, pending.status
        )
    except Exception:  # a fault, of a policy for instance: the failed leg's own answer is final
        log.exception("a retry of %s could not be decided", exchange.tag.id)
        answer = None
    if isinstance(answer, Plan):
        _follow(exchange, pending, answer)
        return True
    exchange.give_up_legs(leg)  # nothing else may answer, and the failure of this leg is not theirs
    if answer is None:
        return False
    leg.pause()
    exchange.queue(answer, pending)
    return True


def decided(exchange: Failing, pending: Pending, answer: Plan | RouterError | None) -> None:
    """Act on the decider's late answer: follow another plan, or end with what the failed leg left."""
    leg, handled = pending.leg, exchange.handled
    if isinstance(answer, Plan):
        _follow(exchange, pending, answer)
        return
    if pending.step is not None and handled is not None:
        handled.handler.no_leg()
    if pending.error is not None:
        exchange.fail(pending.outcome, pending.error)
        return
    leg.resume()
    leg.speak()
    if pending.head is not None:
        exchange.pass_on(leg, pending.head, pending.data, pending.done)
    elif handled is not None:
        handled.let_fail(leg, pending.done)


def _follow(exchange: Failing, pending: Pending, plan: Plan) -> None:
    """Follow another plan after a failed leg."""
    pending.leg.abort()
    exchange.give_up_legs(pending.leg)
    if pending.step is not None and exchange.handled is not None:
        exchange.handled.follow(pending.step)
    # What broke one worker is never sent twice to the next, as it may be where a kept connection ends.
    exchange.follow(plan, pending.outcome in BREAKS)
