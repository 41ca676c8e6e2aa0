"""The interface of the decider, which chooses workers for the relay: all that the relay depends on.

    ask      --> Plan | Wait               the first attempt
    retry    --> Plan | Wait | None        a leg failed; None: no retry, so the failed leg's answer or error is final
    began, ended                           report what happened to a leg
    expired, withdraw                      a queued request waited too long; its client left
    holds                                  a worker keeps a response: requests about it go there
    suspect                                a connection broke

In one process `routing.router.Router` answers at once. A decider that needs longer (because of a queue, or because it
is in another process) answers Wait, and later calls `deliver(number, answer)` on the event loop with a Plan, a final
error, None (for a retry: there is none), or another Wait when deadline or reason have changed.

An answer that crosses `withdraw` or `expired` on its way reaches nobody: the decider itself ends the legs of such a
plan.

All arguments and answers are data (`routing.plan`, `routing.facts`), so a process boundary can be placed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sglang_router.errors import RouterError
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Wait
from sglang_router.routing.usage import Usage

Delivered = Plan | Wait | RouterError | None
Deliver = Callable[[int, Delivered], None]
"""Takes the number of a request, and the answer it waits for."""


class Decider(Protocol):
    """See the module. now: seconds of the router's clock."""

    deliver: Deliver
    """Set by the relay, before the first request."""

    def ask(self, tag: RequestTag, facts: Facts, now: float) -> Plan | Wait:
        """Return where a new request goes, or until when it is queued.

        Raises: RouterError, when the request is refused.
        """

    def retry(
        self,
        tag: RequestTag,
        leg: PlannedLeg,
        facts: Facts,
        outcome: Outcome,
        now: float,
        continued: bool = False,
        status: int = 0,
    ) -> Plan | Wait | None:
        """Return where a request goes after a leg failed; None: no retry.

        A plan ends the failed leg; otherwise the relay calls `ended` for it. Of a pair, the leg that is not to blame
        was ended before this.

        facts      of the request; of the request for the rest when a stream is continued
        outcome    how the leg failed
        continued  a stream broke and is to be continued
        status     of the failing answer; 0 without one
        """

    def began(self, leg: PlannedLeg, now: float) -> None:
        """Take note that the first byte of a stream's answer arrived."""

    def ended(self, tag: RequestTag, leg: PlannedLeg, outcome: Outcome, now: float, usage: Usage | None = None) -> None:
        """End a leg, and with its last leg the request. A second call for the same leg does nothing.

        usage  what the engine told of its answer; the decider adds what it had predicted
        """

    def holds(self, leg: PlannedLeg, response: bytes) -> None:
        """Take note that the leg's worker keeps a response with this id."""

    def expired(self, tag: RequestTag, now: float) -> RouterError:
        """Remove a request that waited too long from the queue; return the error that answers it."""

    def withdraw(self, tag: RequestTag) -> None:
        """Remove a request whose client left from the queue."""

    def suspect(self, leg: PlannedLeg) -> None:
        """Check the leg's worker soon: its connection broke."""
