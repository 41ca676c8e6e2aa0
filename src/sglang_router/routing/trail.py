"""The failed attempts of one request, and whose doing they are: the workers', or the request's own.

    fails at A                       held: A may be bad, or the request may be
    ... then B serves it             A is to blame
    ... then B fails it alike        the request is to blame: neither worker hears of it, and there is no third attempt
    ... then B rejects it (4xx)      the request is to blame
    ... and there is no other try    A is to blame: there is no second opinion
    ... and B takes long             after HOLD seconds A is to blame
    ... and the client leaves B      nobody is: clients must not be able to choose who is blamed

*Alike* is the same status (for what is no status, the same outcome), and all ways to break off are alike. Failed
contacts say nothing about a request, since nothing was sent: the worker hears of them at once, and there may be any
number of them. A 503 is not held against the request either: it says that the worker is not ready. So the request goes
on to other workers, but if none serves it, none is to blame.

A break is the most costly failure, because it may be the end of an engine: a request breaks at most MOST_BREAKS
workers, see `routing.quarantine` for what happens when it comes again.

Pure: time is an argument. The router owns the trails and passes their verdicts to the fleet.
"""

from __future__ import annotations

import random
from typing import Final

from sglang_router.routing.facts import Facts
from sglang_router.routing.lease import Lease
from sglang_router.routing.outcome import BREAKS, Hears, Outcome
from sglang_router.routing.rules import RetryRules
from sglang_router.routing.worker import Worker

HOLD: Final = 2.0
"""Seconds for which a failure is held against nobody while another worker is asked."""
MOST_BREAKS: Final = 2
"""Workers that one request may break."""
_NOT_READY: Final = 503


class Failure:
    """One failed attempt.

    lease   closed; its worker is the one that failed
    kind    what makes two failures alike
    at      when it failed, seconds of the caller's clock
    """

    __slots__ = ("at", "kind", "lease", "outcome")

    def __init__(self, lease: Lease, outcome: Outcome, status: int, at: float) -> None:
        self.lease = lease
        self.outcome = outcome
        self.kind = ("break", 0) if outcome in BREAKS else (outcome.label, status)
        self.at = at

    def __repr__(self) -> str:
        return f"<Failure {self.kind[0]} {self.kind[1]} of {self.lease.worker.url}>"


class Trail:
    """See the module.

    facts     of the request, as the client sent it
    failures  the attempts that failed, without failed contacts and back-pressure
    held      those of them that nobody has been blamed for
    tries     failed legs by worker, whatever their outcome
    returns   retries that went back to a worker that had failed
    retries   attempts after the first
    strangers  workers that did not have the stored response that the request is about, when another one was asked
    """

    __slots__ = ("facts", "failures", "held", "retries", "returns", "strangers", "tries")

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.failures: list[Failure] = []
        self.held: list[Failure] = []
        self.tries: dict[Worker, int] = {}
        self.returns = 0
        self.retries = self.strangers = 0

    def __repr__(self) -> str:
        return f"<Trail {self.failures!r}, {len(self.held)} held, {self.retries} retries>"

    def failed(self, lease: Lease, outcome: Outcome, status: int, now: float) -> Failure | None:
        """Close a lease; return the failure, if the worker had the request and may be blamed for it."""
        heard = outcome.hears is Hears.ANSWER_FAILURE or outcome.hears is Hears.BREAK_FAILURE
        lease.close(outcome, now, heard)
        if not heard and outcome is not Outcome.LOST:
            return None
        failure = Failure(lease, outcome, status, now)
        self.failures.append(failure)
        if heard:
            self.held.append(failure)
        return failure

    def repeated(self, failure: Failure) -> bool:
        """Return whether another worker failed the request alike."""
        worker = failure.lease.worker
        return any(other.kind == failure.kind and other.lease.worker is not worker for other in self.failures)

    def is_final(self, failure: Failure) -> bool:
        """Return whether no other worker should get the request after this failure, because it may be its doing."""
        if failure.outcome in BREAKS:
            return len(self.breaks) >= MOST_BREAKS
        return failure.kind[1] != _NOT_READY and self.repeated(failure)

    @property
    def breaks(self) -> list[Failure]:
        """The attempts at which a worker broke off."""
        return [failure for failure in self.failures if failure.outcome in BREAKS]

    def blames_request(self, outcome: Outcome) -> bool:
        """Return whether the failures are the request's own doing, given how its last leg ended."""
        if outcome is Outcome.SERVED:
            return False
        return outcome is Outcome.REJECTED or any(map(self.repeated, self.failures))

    def pause(self, rules: RetryRules, rng: random.Random) -> float:
        """Return the pause in seconds before a retry goes back to a worker that has failed, and count that return."""
        pause = min(rules.initial_backoff * rules.multiplier ** min(self.returns, 64), rules.max_backoff)
        self.returns += 1
        return float(pause * (1.0 + rng.uniform(-rules.jitter, rules.jitter)))

    def release(self, failed_before: float) -> list[Failure]:
        """Return the failures until a moment that are still held, and hold them no longer."""
        due = [failure for failure in self.held if failure.at <= failed_before]
        self.held = [failure for failure in self.held if failure.at > failed_before]
        return due
