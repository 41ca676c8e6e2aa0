"""What a policy is: `choose` says which candidate gets a request, `chosen` records that it got it.

To write one, subclass Policy and define `name` and `choose`. The smallest one is `LeastLoad` in
`routing.policies.simple`; docs/write-a-policy.md leads from the file to live traffic. Do not look at all candidates:
that takes a hundred times as long among a thousand workers as among ten, and a test refuses it. Ask
`candidates.roster`, which keeps sets of workers by load (`routing.roster`). The rules of the game:

1.  `choose` changes nothing that a second call could notice: no counter, no table, no random generator. So a policy can
    be asked twice, in the shadow of another one, by an explanation, or by a replay. All that changes is in `chosen`,
    and in `reported`, which hears what engines tell of the answers.
2.  `branch` is the reason in one word; it appears in metrics and the access log.
3.  Load need not be counted: `worker.load` is right for every policy, because taking a lease is the counting.
4.  Equal workers are taken in turn: `in_turn` and `least_loaded` make the choice, `chosen` advances the turn.
5.  Chance is drawn beforehand: keep a number of `self.rng.random()`, use it in `choose`, and draw the next one in
    `chosen`, see `Random` in `routing.policies.simple`.
6.  A policy that overrides `chosen` calls `super().chosen`, and one with more state shows it in `__repr__`.
7.  One that knows more of a candidate than its load (what it has cached, what it would cost) says so in `consider`.

A policy belongs to one pool, and hears of its workers by `added`, `removed` and `emptied`. One that remembers what the
workers' caches hold says so by `memory`: metrics, the state file and the scaling of replicas read it there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.considered import Considered
from sglang_router.routing.decision_record import ShadowChoice
from sglang_router.routing.facts import Facts
from sglang_router.routing.native import mypyc_attr
from sglang_router.routing.prefix_tree.image import Builder, Walk
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.usage import Usage
from sglang_router.routing.worker import Worker


class Choice:
    """The answer of a policy.

    worker   the candidate that gets the request
    branch   the reason, one word
    matched  bytes of routing text that the worker is believed to have cached, of `total`
    note     what `chosen` needs to know beside the facts; private to the policy
    tied     other candidates were as good, so that it was this worker's turn
    shadow   what the policy of --shadow-policy would have done; None: there is none
    learned  set by `chosen`: bytes of the text that the memory did not believe the worker to have; learned_at: when
    noted    set by `chosen` of a memory that others share: what `Informed.promise` returned
    """

    __slots__ = ("branch", "learned", "learned_at", "matched", "note", "noted", "shadow", "tied", "total", "worker")

    learned_at: float
    noted: int

    def __init__(
        self, worker: Worker, branch: str, matched: int = 0, total: int = 0, note: Any = None, tied: bool = False
    ) -> None:
        self.worker = worker
        self.branch = branch
        self.matched = matched
        self.total = total
        self.note = note
        self.tied = tied
        self.shadow: ShadowChoice | None = None
        self.learned = 0

    def __repr__(self) -> str:
        return f"<Choice {self.worker.url} {self.branch} {self.matched}/{self.total}>"


class PrefixMemory(Protocol):
    """What a policy remembers of prefixes, for metrics, state file and autoscaling. Sizes in bytes of routing text."""

    @property
    def nodes(self) -> int:
        """Number of nodes, into which the texts are divided."""

    @property
    def held(self) -> int:
        """Bytes in memory; a text that several workers have is counted once."""

    @property
    def retired_size(self) -> int:
        """Bytes of removed or emptied workers that are not freed yet."""

    def size(self, worker: Worker) -> int:
        """Return the bytes that a worker is believed to have cached."""

    def entries(self, worker: Worker) -> int:
        """Return the number of texts that a worker is believed to have cached."""

    def evictions(self, worker: Worker) -> int:
        """Return the number of a worker's nodes evicted for size or age, since it was added or emptied."""

    def evicted_bytes(self, worker: Worker) -> int:
        """Return the bytes of those nodes."""

    def walk(self) -> Walk:
        """Return a walk, which reads everything in small steps; the memory may change between two steps."""

    def builder(self, slots: Mapping[int, int], shift: float, now: float) -> Builder:
        """Return what fills an empty memory with the records of a walk.

        slots  the live slot for each slot of the records
        shift  seconds from the time of the records to that of this memory
        now    seconds; no use is later
        """


@mypyc_attr(allow_interpreted_subclasses=True)
class Policy:
    """The base of all policies, see the module.

    label   what metrics, logs and records call it
    memory  what it remembers of prefixes; None for most policies
    """

    name: ClassVar[str] = ""

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        self.label = self.name
        self.settings = settings
        self.rng = rng
        self.memory: PrefixMemory | None = None
        caches = settings.kv_caches
        self._turn = 0 if caches is None or caches.shared is None else caches.shared.turn

    def __repr__(self) -> str:
        return f"<{type(self).__name__} turn {self._turn}>"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose one of the candidates, of which there is at least one. Change nothing."""
        raise NotImplementedError

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Record that the request of these facts goes to the worker of this choice."""
        if choice.tied:
            self._turn += 1

    def consider(self, facts: Facts, candidates: Candidates, now: float) -> list[Considered]:
        """Return what each of a few candidates means to this policy, to explain a choice. Change nothing.

        Call it before `chosen`, which makes the text known at the chosen worker.
        """
        return [Considered(worker.url, 0, None, None, worker.load) for worker in candidates]

    def unread(self, choice: Choice, facts: Facts) -> None:
        """Take note that the worker did not read the request that it was chosen for, so its cache has not changed."""

    def reported(self, choice: Choice, facts: Facts, usage: Usage | None, now: float) -> None:
        """Take note of the end of a request that the worker of this choice has served: once for each.

        usage  what the engine told of its answer; None: nothing
        """

    def adjust(self, settings: PolicySettings) -> None:
        """Follow other settings from now on, and forget nothing. Sizes of memories stay as they were."""
        self.settings = settings

    # -- notices, which a policy may ignore --------------------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        """Take note that a worker joined the pool."""

    def removed(self, worker: Worker) -> None:
        """Take note that a worker left the pool for good."""

    def emptied(self, worker: Worker) -> None:
        """Take note that a worker's cache is empty: it restarted, or was flushed."""

    def tidy(self, now: float, budget: int) -> bool:
        """Do up to `budget` steps of cleaning up; return whether there is more to do. A timer calls it."""
        return False

    # -- for `choose` ------------------------------------------------------------------------------------------------

    def in_turn(self, candidates: Candidates, tied: int, branch: str) -> Choice:
        """Choose one of a set of equal candidates, each in turn."""
        if not tied & (tied - 1):
            return Choice(candidates.at(tied.bit_length() - 1), branch)
        return Choice(candidates.nth(tied, (self._turn + 1) % tied.bit_count()), branch, tied=True)

    def least_loaded(self, candidates: Candidates, branch: str, among: int = -1) -> Choice:
        """Choose the candidate with the fewest leases, of all or of a set of them; equal ones in turn."""
        mask = candidates.mask & among
        if mask & (mask - 1):
            mask = candidates.roster.least_loaded(mask)
        return self.in_turn(candidates, mask, branch)
