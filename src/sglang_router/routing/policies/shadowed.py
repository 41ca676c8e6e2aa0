"""A policy with another one in its shadow: the other is asked about the same requests, and not obeyed.

    choose   the policy chooses; the shadow is asked with the same candidates; both before either learns of it
    chosen   the policy learns of its choice; the shadow learns which worker really got the request
    others   both hear of workers that come, go and lose their caches

So what the shadow remembers follows reality, and what it would have chosen is what it would choose if it took over at
this moment. `Choice.shadow` says what that is; `ShadowTally` sums it up.

Workers have one seat, one slot in a memory of prefixes and one roster, which are those of the policy that is obeyed. So
the shadow sees *twins* of the workers, with the same figures, and seats of their own. They are brought up to date for
each decision, which takes 0.8 us for each candidate. Without a shadow, this module is not used at all.

A shadow that fails never hurts a request: it is switched off, what it remembers is freed, and `failed` hears why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from sglang_router.routing.candidates import Candidates, candidates_of
from sglang_router.routing.considered import Considered
from sglang_router.routing.decision_record import ShadowChoice
from sglang_router.routing.facts import Facts
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker

Failed = Callable[[str, Exception], None]
"""Takes the name of a shadow policy, and why it was switched off."""


class ShadowTally:
    """What the shadows of all pools would have done: plain numbers, read by a scrape of the metrics.

    agreed, differed  decisions
    matched           bytes of routing text that the shadow believes to be cached at the worker it would have chosen
    actual_matched    and at the worker that got the request
    cost              sum of the costs that it sees there; 0 for policies without costs
    actual_cost       and at the worker that got the request
    failures          shadows that were switched off
    """

    __slots__ = ("actual_cost", "actual_matched", "agreed", "cost", "differed", "failures", "matched", "policy")

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.agreed = self.differed = 0
        self.matched = self.actual_matched = 0
        self.cost = self.actual_cost = 0.0
        self.failures = 0

    def __repr__(self) -> str:
        return f"<ShadowTally {self.policy}: {self.agreed} agreed, {self.differed} differed>"

    def count(self, shadow: ShadowChoice, worker: Worker) -> None:
        """Count a decision; worker: who got the request."""
        if shadow.worker == worker.url:
            self.agreed += 1
        else:
            self.differed += 1
        self.matched += shadow.matched
        self.actual_matched += shadow.actual_matched
        self.cost += shadow.cost or 0.0
        self.actual_cost += shadow.actual_cost or 0.0


class _Both:
    """The notes of both policies on one choice; it stands for the note of the policy that is obeyed."""

    __slots__ = ("note", "shadow")

    def __init__(self, note: Any, shadow: Choice) -> None:
        self.note = note
        self.shadow = shadow


class Shadowed(Policy):
    """See the module. It is called as the policy that is obeyed: `label`, and has its memory."""

    name = "shadowed"

    def __init__(self, obeyed: Policy, shadow: Policy, tally: ShadowTally, failed: Failed) -> None:
        super().__init__(obeyed.settings, obeyed.rng)
        self.label = obeyed.label
        self.memory = obeyed.memory
        self._obeyed = obeyed
        self._shadow = shadow
        self._tally = tally
        self._failed = failed
        self._on = True  # the shadow has not failed
        self._tidies = True  # and can free what it remembers, also when it has failed at something else
        self._twins: dict[Worker, Worker] = {}

    def __repr__(self) -> str:
        return f"<Shadowed {self._obeyed!r} by {self._shadow!r}{'' if self._on else ', which failed'}>"

    # -- decisions -----------------------------------------------------------------------------------------------------

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose as the policy that is obeyed, and note what its shadow would have chosen."""
        choice = self._obeyed.choose(facts, candidates, now)
        if self._on:
            try:
                shadow = self._ask(choice, facts, candidates, now)
            except Exception as error:  # a fault of the shadow
                self._switch_off(error)
            else:
                choice.note = _Both(choice.note, shadow)
        return choice

    def _ask(self, choice: Choice, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Return the shadow's choice among the twins, and note it in the choice that counts."""
        policy, actual = self._shadow, self._twins[choice.worker]
        twins = candidates_of([self._twin(worker) for worker in candidates])
        shadow = policy.choose(facts, twins, now)
        twin = shadow.worker
        looked_at = {each.worker: each for each in policy.consider(facts, twins.those(_set_of(twin, actual)), now)}
        wanted, got = looked_at[twin.url], looked_at[actual.url]
        choice.shadow = ShadowChoice(
            policy.label, twin.url, shadow.branch, wanted.matched, got.matched, wanted.cost, got.cost
        )
        return shadow

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Let both policies learn who gets the request."""
        both = choice.note
        if not isinstance(both, _Both):
            self._obeyed.chosen(choice, facts, now)
            return
        choice.note = both.note
        self._obeyed.chosen(choice, facts, now)
        both.note, choice.note = choice.note, both
        if choice.shadow is not None:
            self._tally.count(choice.shadow, choice.worker)
        if self._on:
            both.shadow.worker = self._twins[choice.worker]
            self._quietly(lambda: self._shadow.chosen(both.shadow, facts, now))

    def consider(self, facts: Facts, candidates: Candidates, now: float) -> list[Considered]:
        """Return what the candidates mean to the policy that is obeyed."""
        return self._obeyed.consider(facts, candidates, now)

    def unread(self, choice: Choice, facts: Facts) -> None:
        """Let both policies know that the worker did not read the request."""
        both = choice.note
        if not isinstance(both, _Both):
            self._obeyed.unread(choice, facts)
            return
        choice.note = both.note
        self._obeyed.unread(choice, facts)
        choice.note = both
        self._quietly(lambda: self._shadow.unread(both.shadow, facts))

    def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
        """Let both policies know what the engine told of the answer."""
        both = choice.note
        if not isinstance(both, _Both):
            self._obeyed.reported(choice, facts, usage, now)
            return
        choice.note = both.note
        self._obeyed.reported(choice, facts, usage, now)
        choice.note = both
        self._quietly(lambda: self._shadow.reported(both.shadow, facts, usage, now))

    def adjust(self, settings: PolicySettings) -> None:
        """Let both policies follow other settings."""
        super().adjust(settings)
        self._obeyed.adjust(settings)
        self._quietly(lambda: self._shadow.adjust(settings))

    # -- notices -------------------------------------------------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        """Let both know that a worker joined the pool."""
        self._obeyed.added(worker)
        twin = Worker(worker.spec, worker.id, worker.order, worker.since)
        twin.circuit, twin.work, twin.tokens = worker.circuit, worker.work, worker.tokens
        self._twins[worker] = twin
        self._quietly(lambda: self._shadow.added(twin))
        self._number()

    def removed(self, worker: Worker) -> None:
        """Let both know that a worker left the pool."""
        self._obeyed.removed(worker)
        twin = self._twins.pop(worker)
        self._quietly(lambda: self._shadow.removed(twin))
        self._number()

    def emptied(self, worker: Worker) -> None:
        """Let both know that a worker's cache is empty."""
        self._obeyed.emptied(worker)
        twin = self._twins[worker]
        self._quietly(lambda: self._shadow.emptied(twin))
        self._number()

    def tidy(self, now: float, budget: int) -> bool:
        """Clean up both memories."""
        busy = self._obeyed.tidy(now, budget)
        if not self._tidies:
            return busy
        try:
            return self._shadow.tidy(now, budget) or busy
        except Exception as error:  # a fault of the shadow
            self._tidies = False
            if self._on:
                self._switch_off(error)
            return busy

    # -- twins ---------------------------------------------------------------------------------------------------------

    def _twin(self, worker: Worker) -> Worker:
        """Return the twin of a worker, with the figures of now."""
        twin = self._twins[worker]
        if twin.spec is not worker.spec:
            twin.describe(worker.spec)
        twin.load = worker.load
        twin.waiting = worker.waiting
        twin.report = worker.report
        twin.life = worker.life
        twin.work = worker.work
        return twin

    def _number(self) -> None:
        """Give the twins their seats, by the rule of `routing.pools`."""
        if self._shadow.memory is not None:
            for twin in self._twins.values():
                twin.seat = twin.slot
        else:
            for seat, twin in enumerate(sorted(self._twins.values(), key=_order)):
                twin.seat = seat

    # -- faults --------------------------------------------------------------------------------------------------------

    def _quietly(self, work: Callable[[], None]) -> None:
        """Let the shadow do something; switch it off when it fails."""
        if self._on:
            try:
                work()
            except Exception as error:  # a fault of the shadow
                self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        self._on = False
        for twin in self._twins.values():
            with contextlib.suppress(Exception):  # let it forget everything, if it can: `tidy` frees it
                self._shadow.removed(twin)
        self._tally.failures += 1
        self._failed(self._shadow.label, error)


def _set_of(one: Worker, other: Worker) -> int:
    return 1 << one.seat | 1 << other.seat


def _order(worker: Worker) -> int:
    return worker.order
