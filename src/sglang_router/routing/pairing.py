"""Requests with two legs: plan both, and know when the last one has ended.

    plan(tag, facts, pair, decoders, now)    a prefill and a decode worker, each chosen by the policy of its pool, with
                                             what ties them; or one worker, where a pair is spared
    failed(number, lease, outcome)           a leg failed: what is left of its pair for the next attempt
    is_last(number, lease, outcome, now)     a leg has ended: was it the last one of its request?

A failed leg ends its pair: the other leg is given up, and the next attempt is a new pair with a new room. A vLLM decode
worker that could not be reached never had what its prefill worker handed over: so another decode worker gets that, and
the prompt is not read twice.
"""

from __future__ import annotations

import random
from typing import Final

from sglang_router.routing.assignment import Assignment
from sglang_router.routing.batches import batch_size
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.lease import Lease
from sglang_router.routing.legs import Legs
from sglang_router.routing.models import Serving
from sglang_router.routing.outcome import Outcome
from sglang_router.routing.pair import ServingPair
from sglang_router.routing.plan import Plan, PlannedLeg, RequestTag
from sglang_router.routing.pools import Pools
from sglang_router.routing.roles import DECODE, PREFILL
from sglang_router.routing.trail import Trail
from sglang_router.routing.transfer import LEASE, NIXL, UNREACHED, Meeting, mark_of, nixl_prefill
from sglang_router.routing.worker import Worker

_SERVED: Final = Outcome.SERVED
_NEVER: Final = -1.0


class OpenPair:
    """A request with legs of a pair.

    legs       numbers of the leases of those that have not ended
    prefill    the lease of its latest prefill leg; None: there was none
    handed_at  when that one was served, and what it handed over may be used; negative: it may not
    mark       of its id, see `PlannedLeg`
    """

    __slots__ = ("handed_at", "legs", "mark", "prefill")

    def __init__(self) -> None:
        self.legs: set[int] = set()
        self.prefill: Lease | None = None
        self.handed_at = _NEVER
        self.mark = b""

    def __repr__(self) -> str:
        return f"<OpenPair {len(self.legs)} legs{', handed over' * (self.handed_at >= 0.0)}>"


class Pairing:
    """See the module. open: the requests with legs of a pair, by number."""

    __slots__ = ("_legs", "_pools", "_rng", "_who", "open")

    def __init__(self, pools: Pools, who: Assignment, legs: Legs, rng: random.Random) -> None:
        """rng: draws rooms and names."""
        self.open: dict[int, OpenPair] = {}
        self._pools = pools
        self._who = who
        self._legs = legs
        self._rng = rng

    def __repr__(self) -> str:
        return f"<Pairing {len(self.open)} open>"

    # -- both legs -----------------------------------------------------------------------------------------------------

    def plan(
        self,
        tag: RequestTag,
        facts: Facts,
        pair: ServingPair,
        decoders: Candidates,
        now: float,
        trail: Trail | None = None,
        delay: float = 0.0,
        readers: Candidates | None = None,
    ) -> Plan:
        """Take the legs of an attempt.

        decoders  candidates of the decode leg
        readers   of the prefill leg; None: all that may take a request now
        """
        retries = 0 if trail is None else trail.retries
        opened = self.open.get(tag.number) or OpenPair()
        handed = opened.handed_at >= 0.0 and now - opened.handed_at < LEASE
        if handed:
            decode = self._legs.take(tag, facts, pair.decode, decoders, now, trail, delay, DECODE)
            decode.mark = opened.mark
            self._opened(tag, opened, decode)
            return Plan((decode,), delay, retries, True)
        if readers is None:
            readers = pair.prefill.candidates(now)
            spared = self._spared(facts, pair, decoders, readers, now)
            if spared is not None:
                serving, candidates = spared
                return Plan((self._legs.take(tag, facts, serving, candidates, now),))
        prefill = self._legs.take(tag, facts, pair.prefill, readers, now, trail, delay, PREFILL)
        try:
            decode = self._legs.take(tag, facts, pair.decode, decoders, now, trail, delay, DECODE)
        except Exception:  # a policy failed: it has taken nothing
            self._legs.give_back(prefill, now)
            raise
        self._opened(tag, opened, prefill, decode)
        opened.prefill, opened.handed_at = self._legs.open[prefill.lease], _NEVER
        decode.partner = prefill
        nixl = self._who.pairs.connector_of(pair) == NIXL
        if nixl:
            prefill.splice = nixl_prefill(facts.endpoint.name)
            if self._who.pairs.rules.pushes:
                prefill.mark = decode.mark = opened.mark = mark_of(self._rng)
        else:
            meeting = Meeting(opened.prefill.worker, self._rng)
            prompts = batch_size(facts)
            prefill.rid = decode.rid = meeting.rids(prompts)
            if prompts > 1:
                self._legs.open[decode.lease].occupy(prompts)
            prefill.splice = meeting.prefill
            decode.splice = meeting.decode(self._legs.open[decode.lease].worker)
        return Plan((prefill, decode), delay, retries, nixl)

    def _opened(self, tag: RequestTag, opened: OpenPair, *legs: PlannedLeg) -> None:
        opened.legs.update([leg.lease for leg in legs])
        self.open[tag.number] = opened

    def _spared(
        self, facts: Facts, pair: ServingPair, decoders: Candidates, readers: Candidates, now: float
    ) -> tuple[Serving, Candidates] | None:
        """Return who serves a request alone because most of its prompt is cached there, or it is done sooner."""
        pairs = self._who.pairs
        regular = self._who.naming.find(facts)
        alone: Serving = pair.decode
        if regular.workers:
            alone, candidates = regular, regular.candidates(now)
        elif pairs.connector_of(pair) == NIXL:
            candidates = decoders
        else:
            return None
        if not candidates or not (pairs.rules.uncached_tokens or pairs.rules.by_cost):
            return None
        choice = alone.policy.choose(facts, candidates, now)
        if pairs.is_short(facts, choice.matched, choice.worker):
            return alone, candidates
        if pairs.rules.by_cost and choice.total:
            other = pair.prefill.policy.choose(facts, readers, now)
            if _is_sooner(choice.worker, choice.total - choice.matched, other.worker, other.total - other.matched, now):
                return alone, candidates
        return None

    # -- what becomes of them ------------------------------------------------------------------------------------------

    def lease_of(self, number: int) -> Lease | None:
        """Return the lease of a request's latest prefill leg, which may have ended: its decode worker may blame it."""
        opened = self.open.get(number)
        return None if opened is None else opened.prefill

    def failed(self, number: int, lease: Lease, outcome: Outcome) -> None:
        """Take note that a leg failed: nothing may be used again of its pair, unless its worker was never reached."""
        opened = self.open.get(number)
        if opened is not None and (lease is opened.prefill or outcome not in UNREACHED):
            opened.handed_at = _NEVER

    def replaced(self, number: int, leg: PlannedLeg) -> None:
        """Take note that a failed leg has ended because another attempt follows; it need not be one of a pair."""
        opened = self.open.get(number)
        if opened is not None:
            opened.legs.discard(leg.lease)

    def is_last(self, number: int, lease: Lease, outcome: Outcome, now: float) -> bool:
        """Take note that a leg has ended; return whether its request has no other one."""
        opened = self.open.get(number)
        if opened is None:
            return True
        if lease is opened.prefill and outcome is _SERVED:
            lease.began(now)
            opened.handed_at = now
        opened.legs.discard(lease.number)
        if opened.legs:
            return False
        del self.open[number]
        return True

    def adopted(self, number: int, lease: Lease) -> None:
        """Take note of a leg that an earlier decider has planned."""
        self.open.setdefault(number, OpenPair()).legs.add(lease.number)


def _is_sooner(alone: Worker, alone_reads: int, prefill: Worker, prefill_reads: int, now: float) -> bool:
    """Return whether a worker alone has read a prompt sooner than a prefill worker, with what it takes from others.

    While a worker reads, the answers that it writes stand still, each of them. It is measured how fast workers read; of
    one that has not read anything yet, it is believed that it is as fast as the prefill worker.
    """
    if not prefill.work.active:
        return False
    reader = alone.work if alone.work.active and alone.work.prompts.weight else prefill.work
    own = alone.work.backlog(now) if alone.work.active else 0.0
    return own + reader.prefill(alone_reads) * (1.0 + alone.load) < prefill.work.until_read(prefill_reads, now)
