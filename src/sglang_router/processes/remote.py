"""The decider as a relay sees it: another process. It implements `routing.decider.Decider` behind a link.

    ask, retry       a message, and Wait; later `deliver` with what the decider answers
    began, ended     messages; `ended` and the Finished that follows it are one
    connected        a link to a decider is there: Hello with the open requests, then all questions without an answer
    lost             the link is closed: questions are kept, at most MOST, and streams go on
    look             periodically: ends the wait for retries that nobody decides

While the decider does not read, questions are kept here, where they cost nothing more than their request; and ends of
requests of which it never heard, as many as while it is away. Later they go a few at a time, while it reads.

`Reporter` passes the relay's own events on, so that metrics and access log are made in one place.

How long a request may be queued is the decider's to say; a relay waits `GRACE` seconds longer, and then answers 503:
the decider is gone, or does not answer.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable
from typing import Final

from sglang_router.errors import DeciderGone, RouterError
from sglang_router.processes import failures, messages
from sglang_router.processes.facing import TextForm, answer_of, ask_of, code_of, figures_of, open_leg, unasked_of
from sglang_router.processes.link import Link
from sglang_router.processes.message import PlannedOne
from sglang_router.processes.messages import Done, Ended, Hello, OpenRequest, Retry, Unasked
from sglang_router.processes.texts import SHARED, TextRing
from sglang_router.routing.decider import Deliver, Delivered
from sglang_router.routing.events import Finished, FirstByte, Listeners
from sglang_router.routing.facts import Facts
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.pairs import wants_several
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag, Target, Wait
from sglang_router.routing.quarantine import fingerprint
from sglang_router.routing.usage import Usage

GRACE: Final = 5.0
"""Seconds that a relay waits longer than the decider said."""
MOST: Final = 4096
"""Questions without a first answer; further requests are refused."""
_MOST_UNTOLD: Final = 10_000
"""Ended requests that are kept for a decider that is away."""
_PORTION: Final = 64
"""Questions that are kept, in one frame."""
_NOTHING: Final = 0
_TAG: Final = 1
_ALL: Final = 2
_SERVED: Final = Outcome.SERVED


class _Failed:
    """A leg for which another plan was asked for: the arguments of `Decider.retry`; at: when."""

    __slots__ = ("at", "continued", "facts", "leg", "outcome", "status")

    def __init__(
        self, leg: PlannedLeg, facts: Facts, outcome: Outcome, at: float, continued: bool, status: int
    ) -> None:
        self.leg = leg
        self.facts = facts
        self.outcome = outcome
        self.at = at
        self.continued = continued
        self.status = status


class _Asked:
    """A request that has not ended.

    legs    those in flight, by lease: the leg, and when it is sent
    failed  the leg whose retry is not decided yet
    waits   the last question has no final answer yet
    held    what the decider that is there has of it: NOTHING, its TAG, or ALL
    """

    __slots__ = ("facts", "failed", "held", "legs", "tag", "waits")

    def __init__(self, tag: RequestTag, facts: Facts) -> None:
        self.tag = tag
        self.facts = facts
        self.legs: dict[int, tuple[PlannedLeg, float]] = {}
        self.failed: _Failed | None = None
        self.waits = True
        self.held = _NOTHING


class RemoteDecider:
    """See the module.

    link     to the decider; None while there is none
    targets  of the workers, by the decider's numbers
    paired   some of them do one half of each request
    """

    deliver: Deliver

    def __init__(self, index: int, ring: TextRing, patience: float, clock: Callable[[], float], key: bytes) -> None:
        """index: which relay this is; patience: seconds that a request waits for the decider; key: of fingerprints."""
        self.link: Link | None = None
        self.targets: dict[int, Target] = {}
        self.wanted = self.paired = False
        self._settled = False  # there was a plan: from then on the roles of workers are known
        self._index = index
        self._ring = ring
        self._patience = patience
        self._clock = clock
        self._key = key
        self._requests: dict[int, _Asked] = {}  # all that have not ended
        self._unheard: dict[int, _Asked] = {}  # those whose last question has no answer at all yet
        self._kept: dict[int, _Asked] = {}  # those that are not asked yet: the decider is away, or does not read
        self._shared: deque[int] = deque()  # numbers of the asks whose texts are in the ring
        self._began: set[int] = set()  # leases of the streams in flight whose answers have begun
        self._untold: deque[Unasked] = deque(maxlen=_MOST_UNTOLD)

    def __repr__(self) -> str:
        away = "" if self.link is not None else ", the decider is away"
        return f"<RemoteDecider {len(self._requests)} requests, {len(self._unheard)} unheard{away}>"

    # -- routing.decider.Decider ---------------------------------------------------------------------------------------

    def ask(self, tag: RequestTag, facts: Facts, now: float) -> Wait:
        """Ask where a new request goes. Raises: DeciderGone, when too many questions have no answer."""
        if len(self._unheard) >= MOST:
            raise DeciderGone(retry_after=1.0)
        number, link = tag.number, self.link
        if (self.paired or not self._settled) and facts.endpoint.generates:
            wants_several(facts)  # the decider, which has no body, may need to know
        asked = self._requests[number] = self._unheard[number] = _Asked(tag, facts)
        if link is None or link.stuck or self._kept:
            self._kept[number] = asked
        else:
            self._put_ask(link, asked, now)
        return Wait(now + self._patience, "decider")

    def _put_ask(self, link: Link, asked: _Asked, now: float) -> None:
        """Send the question about a request, with its text inline or in the ring."""
        asked.held = _ALL
        facts, number = asked.facts, asked.tag.number
        text: bytes | None = facts.text
        at = length = 0
        if len(facts.text) >= SHARED:
            at = self._ring.put(facts.text)
            if at >= 0:
                self._shared.append(number)
                text, length = None, len(facts.text)
        digest = fingerprint(self._key, facts) if self.wanted else b""
        put = link.put if text is None or len(text) < SHARED else link.put_large
        put(ask_of(asked.tag, facts, now, TextForm(text, at, length, digest)))

    def retry(
        self,
        tag: RequestTag,
        leg: PlannedLeg,
        facts: Facts,
        outcome: Outcome,
        now: float,
        continued: bool = False,
        status: int = 0,
    ) -> Wait | None:
        """Ask where a request goes after a leg failed."""
        asked = self._requests.get(tag.number)
        if asked is None:
            return None
        asked.failed, asked.waits = _Failed(leg, facts, outcome, now, continued, status), True
        self._unheard[tag.number] = asked
        link = self.link
        if link is None or link.stuck or self._kept:
            self._kept[tag.number] = asked
        else:
            self._put_retry(link, asked, asked.failed, now)
        return Wait(now + self._patience, "decider")

    def _put_retry(self, link: Link, asked: _Asked, failed: _Failed, now: float) -> None:
        facts = None
        if failed.continued or asked.held != _ALL:
            facts = ask_of(asked.tag, failed.facts, now, TextForm(failed.facts.text))
        digest, code = fingerprint(self._key, asked.facts), code_of(failed.outcome)
        lease = failed.leg.lease
        put = link.put if facts is None else link.put_large
        put(Retry(asked.tag.number, lease, code, now, failed.continued, failed.status, digest, facts))

    def began(self, leg: PlannedLeg, now: float) -> None:
        """Take note that the first byte of a stream's answer arrived."""
        self._began.add(leg.lease)
        if self.link is not None:
            self.link.put_quietly(messages.Began(leg.lease, now))

    def ended(self, tag: RequestTag, leg: PlannedLeg, outcome: Outcome, now: float, usage: Usage | None = None) -> None:
        """End a leg."""
        asked = self._requests.get(tag.number)
        self._began.discard(leg.lease)
        if asked is None or asked.legs.pop(leg.lease, None) is None or self.link is None:
            return
        digest = b"" if outcome is _SERVED else fingerprint(self._key, asked.facts)
        self.link.put(Ended(leg.lease, code_of(outcome), now, digest, *figures_of(usage)))

    def holds(self, leg: PlannedLeg, response: bytes) -> None:
        """Tell that the leg's worker keeps a response."""
        if self.link is not None:
            self.link.put(messages.Holds(leg.lease, response))

    def expired(self, tag: RequestTag, now: float) -> RouterError:
        """Wait no longer for the answer to a question."""
        self.withdraw(tag)
        return DeciderGone(retry_after=1.0)

    def withdraw(self, tag: RequestTag) -> None:
        """Wait no longer: the client left."""
        asked = self._requests.get(tag.number)
        if asked is not None:
            asked.waits = False
            self._heard_of(tag.number)
            if self.link is not None and asked.held:
                self.link.put(messages.Withdraw(tag.number, self._clock()))

    def _heard_of(self, number: int) -> None:
        self._unheard.pop(number, None)
        self._kept.pop(number, None)

    def suspect(self, leg: PlannedLeg) -> None:
        """Tell that a connection to the leg's worker broke."""
        if self.link is not None:
            self.link.put(messages.Suspect(leg.target.name))

    # -- answers -------------------------------------------------------------------------------------------------------

    def planned(self, plan: messages.Planned) -> None:
        """Take a plan."""
        asked = self._answered(plan.number)
        if asked is None:
            return
        legs = tuple([_leg(leg, self.targets[leg.worker]) for leg in plan.legs])
        if asked.failed is not None:
            asked.legs.pop(asked.failed.leg.lease, None)
            self._began.discard(asked.failed.leg.lease)
        self._settled = True
        asked.tag.limits = plan.limits
        now = self._clock() + plan.delay
        for leg in legs:
            asked.legs[leg.lease] = (leg, now)
        self._final(asked, Plan(legs, plan.delay, plan.retries, plan.handoff))

    def waits(self, wait: messages.Waits) -> None:
        """Take note that the request is queued."""
        if self._answered(wait.number) is not None:
            self.deliver(wait.number, Wait(wait.until + GRACE, wait.why))

    def refused(self, refused: messages.Refused) -> None:
        """Take a final error."""
        asked = self._answered(refused.number)
        if asked is not None:
            asked.tag.limits = refused.limits
            self._final(asked, failures.error_of(refused.error))

    def no_retry(self, answer: messages.NoRetry) -> None:
        """Take note that there is no retry."""
        asked = self._answered(answer.number)
        if asked is not None:
            self._final(asked, None)

    def _answered(self, number: int) -> _Asked | None:
        """Free the text of a question that is answered; return its request, if that still waits."""
        if self._shared and self._shared[0] == number:
            self._shared.popleft()
            self._ring.free()
        asked = self._unheard.pop(number, None) or self._requests.get(number)
        return asked if asked is not None and asked.waits else None

    def _final(self, asked: _Asked, answer: Delivered) -> None:
        asked.failed, asked.waits = None, False
        self.deliver(asked.tag.number, answer)

    # -- events --------------------------------------------------------------------------------------------------------

    def finished(self, event: Finished) -> None:
        """Tell that a request ended."""
        number, link = event.tag.number, self.link
        asked = self._requests.pop(number, None)
        self._heard_of(number)
        if link is not None and asked is not None and asked.held:
            _put_done(link, event)
        elif link is None or link.stuck:
            self._untold.append(unasked_of(event))
        else:
            link.put(unasked_of(event))

    def shown(self, event: FirstByte) -> None:
        """Tell that an answer began."""
        if self.link is not None:
            self.link.put_quietly(messages.Shown(event.tag.number, event.leg.lease, event.seconds))

    # -- the link ------------------------------------------------------------------------------------------------------

    def connected(self, link: Link) -> None:
        """Begin with a decider: tell it what is open, and ask what is not answered, in the order of arrival."""
        self.link, self.wanted = link, False
        self._ring.clear()
        self._shared.clear()
        self.targets.clear()
        for asked in self._requests.values():
            asked.held = _TAG if asked.legs or asked.failed is not None else _NOTHING
        link.put(Hello(self._index, os.getpid(), [self._open(each) for each in self._requests.values() if each.held]))
        self._kept = {number: asked for number, asked in self._requests.items() if asked.waits}
        self._unheard = dict(self._kept)
        self.read_again()

    def _open(self, asked: _Asked) -> OpenRequest:
        began = self._began
        legs = [open_leg(leg, lease in began, since) for lease, (leg, since) in asked.legs.items()]
        return OpenRequest(ask_of(asked.tag, asked.facts, 0.0, TextForm(b"")), legs)

    def read_again(self) -> None:
        """Tell and ask what was kept, as long as the decider reads."""
        link, now, kept = self.link, self._clock(), self._kept
        while link is not None and (kept or self._untold):
            for _ in range(min(_PORTION, len(self._untold))):
                link.put(self._untold.popleft())
            for number in list(itertools.islice(kept, _PORTION)):
                if link.stuck:
                    break
                asked = kept.pop(number)
                if asked.failed is not None:
                    self._put_retry(link, asked, asked.failed, now)
                else:
                    self._put_ask(link, asked, now)
            link.send()
            if link.stuck:
                return

    def lost(self) -> None:
        """Keep everything until a decider is there again."""
        self.link = None

    def look(self, now: float) -> None:
        """End retries that nobody decides: the failed leg's own answer is final."""
        for asked in list(self._unheard.values()):
            failed = asked.failed
            if failed is not None and now - failed.at > self._patience:
                self.withdraw(asked.tag)
                self._final(asked, None)


class Reporter(Listeners):
    """Passes the relay's events on to the decider. `hears_first_byte` is the decider's to say."""

    def __init__(self, remote: RemoteDecider) -> None:
        super().__init__()
        self._remote = remote

    def first_byte(self, event: FirstByte) -> None:
        """Pass the event on."""
        self._remote.shown(event)

    def finished(self, event: Finished) -> None:
        """Pass the event on."""
        self._remote.finished(event)


def _leg(sent: PlannedOne, target: Target) -> PlannedLeg:
    """Return a leg of a plan."""
    leg = PlannedLeg(sent.lease, target, sent.branch, sent.matched, sent.total, sent.splice, sent.rid, sent.model)
    leg.mark = sent.mark
    return leg


def _put_done(link: Link, event: Finished) -> None:
    """Tell the end of a request, together with that of its last leg if this was told just before."""
    lease = 0 if event.leg is None else event.leg.lease
    answer, last = answer_of(event.answer), link.last()
    taken = event.tag.received if event.answer.status == 101 else -1
    if type(last) is Ended and last.lease == lease:
        link.replace_last(Done(event.tag.number, lease, answer, last.now, last.outcome, last.digest, taken))
    else:
        link.put(Done(event.tag.number, lease, answer, 0.0, -1, b"", taken))
