"""Retry a failed leg, or end with its own answer or error.

retry_status(exchange, leg, ...)                            retries an answer with a failing status
retry(exchange, pending)      asks the decider: Plan    --> the failed legs are given up, the plan is followed
                                                Wait    --> the exchange keeps `pending` until `decided`
                                                None    --> False: no retry
decided(exchange, pending, answer)                          the same for the decider's late answer

Of a prefill/decode pair, the leg that is not to blame is given up before the decider is asked (`relay.pair`).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Final, Protocol

from sglang_router.errors import RouterError
from sglang_router.relay.gathered import Gathered
from sglang_router.relay.handled import Handled
from sglang_router.relay.leg import Leg
from sglang_router.relay.pair import Pair
from sglang_router.relay.pending import Pending
from sglang_router.relay.relay import Relay
from sglang_router.relay.states import ROUTED, ExchangeState
from sglang_router.routing.facts import Facts
from sglang_router.routing.guilt import MOST_READ
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
    pair: Pair | None
    state: ExchangeState

    def answered(self, leg: Leg, head: ResponseHead, data: bytes, done: bool) -> None:
        """Take the head of an answer, with the bytes of its body so far."""

    def queue(self, wait: Wait, pending: Pending | None) -> None:
        """Wait for the decider's late answer."""

    def follow(self, plan: Plan, fresh: bool = False) -> None:
        """Send the legs of a plan. fresh: those of a retry go on new connections."""

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
    pair = exchange.pair
    if pair is not None and pair.live and outcome is Outcome.FAILED:
        if not done and len(data) <= MOST_READ:
            leg.handled = Gathered(head, MOST_READ, partial(exchange.answered, leg))
            leg.handled.data(leg, data, done)
            return True
        if done and pair.blames_prefill(data):
            pending.blamed = pair.prefill
    pending.status = head.status
    pending.head, pending.data, pending.done = head, data, done
    return retry(exchange, pending)


def retry(exchange: Failing, pending: Pending, facts: Facts | None = None) -> bool:
    """Ask the decider for another plan; return False when there is none.

    True: the plan is followed, or the decider answers later.

    facts  of the request for the rest of a broken stream; None: the leg failed before the head of an answer
    """
    relay, leg, blamed, pair = exchange.relay, pending.leg, pending.blamed, exchange.pair
    if pair is not None:
        pair.give_up_but(blamed, pending.outcome)
    known = facts or exchange.facts
    assert known is not None
    try:
        answer = relay.decider.retry(
            exchange.tag, blamed.planned, known, pending.outcome, relay.clock(), facts is not None, pending.status
        )
    except Exception:  # a fault, of a policy for instance: the failed leg's own answer is final
        log.exception("a retry of %s could not be decided", exchange.tag.id)
        answer = None
    if isinstance(answer, Plan):
        _follow(exchange, pending, answer)
        return True
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
    if pending.head is not None:
        exchange.pass_on(leg, pending.head, pending.data, pending.done)
    elif handled is not None:
        handled.let_fail(leg, pending.done)


def _follow(exchange: Failing, pending: Pending, plan: Plan) -> None:
    """Follow another plan after a failed leg."""
    pending.leg.abort()
    if pending.step is not None and exchange.handled is not None:
        exchange.handled.follow(pending.step)
    # What broke one worker is never sent twice to the next, as it may be where a kept connection ends.
    exchange.follow(plan, pending.outcome in BREAKS or pending.outcome is Outcome.STALE)
