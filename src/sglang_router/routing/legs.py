"""Take a leg: let the policy choose a worker among candidates, take its lease, and tell everyone who needs to know.

    take(tag, facts, serving, candidates, now)              a worker that does all of the request
    take(..., half=PREFILL), take(..., half=DECODE)         one that reads the prompt, and one that writes the answer

The order matters: a policy that fails has taken nothing.
"""

from __future__ import annotations

from sglang_router.routing.assignment import HOLDER, Assignment
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.events import Listener, Routed
from sglang_router.routing.facts import Facts
from sglang_router.routing.fleet import Fleet
from sglang_router.routing.lease import Lease
from sglang_router.routing.models import Serving
from sglang_router.routing.naming import dress
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.plan import PlannedLeg, RequestTag
from sglang_router.routing.recorder import Recorder
from sglang_router.routing.roles import DECODE
from sglang_router.routing.sessions import Place
from sglang_router.routing.trail import Trail


class Legs:
    """See the module.

    open      the leases of legs that are not ended, by number; the closed one of a failed leg stays until then
    recorder  keeps what was decided; None: nobody does
    listener  hears Routed
    """

    __slots__ = ("_fleet", "_listener", "_who", "open", "recorder")

    def __init__(self, fleet: Fleet, who: Assignment, listener: Listener) -> None:
        self.open: dict[int, Lease] = {}
        self.recorder: Recorder | None = None
        self._fleet = fleet
        self._who = who
        self._listener = listener

    def __repr__(self) -> str:
        return f"<Legs {len(self.open)} open>"

    def take(
        self,
        tag: RequestTag,
        facts: Facts,
        serving: Serving,
        candidates: Candidates,
        now: float,
        trail: Trail | None = None,
        delay: float = 0.0,
        half: str = "",
    ) -> PlannedLeg:
        """Choose a worker, take its lease and return the leg, which is sent after `delay` seconds.

        A session is at home where its context is computed, so it has no part in the choice of a decode worker.
        """
        policy, sessions, recorder = serving.policy, self._who.sessions, self.recorder
        place: Place | None = None
        if sessions.on and facts.session and half != DECODE:
            place = sessions.place(facts, candidates, now)
        choice = policy.choose(facts, candidates if place is None else place.candidates, now)
        if place is not None:
            sessions.name(place, choice)
        if facts.follows and self._who.holder(facts) is choice.worker:
            choice.branch = HOLDER
        if recorder is not None:
            recorder.decided(tag, facts, serving, candidates, choice, trail, now)
        policy.chosen(choice, facts, now)
        worker, total = choice.worker, choice.total
        lease = self._fleet.lease(worker, trail is None or not trail.failures)
        lease.tag, lease.facts, lease.choice = tag, facts, choice
        if place is not None:
            lease.session = sessions.chosen(place, choice, facts, now)
        if not half:
            lease.sent(total - choice.matched if total else -1, facts.streaming, now, delay)
        elif half != DECODE:
            # The end of a prefill leg is what the first byte of a stream is: its prompt is read.
            lease.sent(total - choice.matched if total else -1, True, now, delay)
        elif facts.streaming:
            lease.streams(-1, now + delay)
        self.open[lease.number] = lease
        leg = PlannedLeg(lease.number, worker.target, choice.branch, choice.matched, total)
        if worker.dresses or facts.asked:
            dress(leg, worker, facts)
            if half:  # the rank stands in what ties the halves
                leg.splice = b""
        worker.decisions.count(policy.label, choice.branch, choice.matched, total)
        if self._listener.hears_routed:
            before = 0 if trail is None else trail.retries
            self._listener.routed(Routed(tag, leg, policy.label, before, len(candidates)))
        return leg

    def give_back(self, leg: PlannedLeg, now: float) -> None:
        """End a leg that was taken and is not sent."""
        lease = self.open.pop(leg.lease)
        if lease.session is not None:
            self._who.sessions.ended(lease.session, now, False)
        lease.close(Outcome.ABANDONED, now)
