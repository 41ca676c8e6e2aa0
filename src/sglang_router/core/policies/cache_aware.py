"""cache_aware: a request goes to the worker whose KV cache holds the most of its prompt, unless that would overload it.

    imbalanced?   max_load - min_load > abs  and  max_load > rel * min_load
                      -> the shortest queue; among equals the longest prefix, then in turn         branch "imbalance"
    matched / total > cache_threshold, in more than a few bytes
                      -> the owner of the longest match; of several the least loaded, then in turn  branch "hit"
    else          -> the smallest tree; among equals the least loaded, then in turn                branch "miss"
    no text       -> the least loaded, in turn                                                     branch "no_text"

What the workers hold is not asked but remembered: `core.tree` keeps every text that was sent to each, within
`max_tree_size` bytes a worker, the least recently used forgotten first, as the engines do. A worker that is away for a
while keeps its entries, for its cache is still there; one that restarted or was flushed loses them.

A match of fewer than `_WORTH` bytes that is not the whole text saves the engine a few tokens and is no reason to leave
the balance: else all short prompts that begin with the same word ("Question 1", "Question 2") would go to one worker.

The rule for strangers (smallest tree) fills the caches evenly when requests come one at a time and every load is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_router.core.policies.base import Choice, Policy
from sglang_router.core.tree import Tree

if TYPE_CHECKING:
    import random

    from sglang_router.core.policies.base import PolicySettings
    from sglang_router.core.request import Facts
    from sglang_router.core.tree import Match
    from sglang_router.core.tree_node import Slot
    from sglang_router.core.worker import Worker


_WORTH = 16


class CacheAware(Policy):
    """See the module. `tree` is open to metrics; nobody else changes it."""

    name = "cache_aware"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self.tree = Tree(settings.max_tree_size)
        self._threshold = settings.cache_threshold
        self._abs = settings.balance_abs_threshold
        self._rel = settings.balance_rel_threshold
        self._by_slot: dict[int, Worker] = {}
        # Of the candidates seen last, which are the same tuple until the fleet changes: their mask and their slots.
        self._known: tuple[Worker, ...] = ()
        self._mask = 0
        self._books: list[Slot] = []

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        text = facts.text
        total = len(text) - facts.scaffold
        if total <= 0:
            return Choice(self.least_loaded(candidates), "no_text")
        match = self.tree.match(facts.namespace, text)
        loads = [worker.load for worker in candidates]
        low, high = min(loads), max(loads)
        if high - low > self._abs and high > self._rel * low:
            shortest = [worker for worker in candidates if worker.load == low]
            worker, branch = self._longest(shortest, match), "imbalance"
            matched = match.length(worker.slot) - facts.scaffold
        else:
            if candidates is not self._known:
                self._get_to_know(candidates)
            length, owners = match.best(self._mask)
            matched = length - facts.scaffold
            if matched > self._threshold * total and (matched >= _WORTH or matched == total):
                worker, branch = self._owner(owners), "hit"
            else:
                worker, branch = self._smallest(candidates), "miss"
                matched = match.length(worker.slot) - facts.scaffold
        self.tree.insert(match, worker.slot, now)
        return Choice(worker, branch, max(0, matched), total)

    def _get_to_know(self, candidates: tuple[Worker, ...]) -> None:
        self._known = candidates
        self._mask = sum(1 << worker.slot for worker in candidates)
        self._books = [self.tree.books(worker.slot) for worker in candidates]

    def _owner(self, owners: int) -> Worker:
        """The least loaded of an owner mask; it has the bits of candidates only."""
        if not owners & (owners - 1):
            return self._by_slot[owners.bit_length() - 1]
        several = []
        while owners:
            low = owners & -owners
            several.append(self._by_slot[low.bit_length() - 1])
            owners ^= low
        return self.least_loaded(several)

    def _longest(self, shortest: list[Worker], match: Match) -> Worker:
        if len(shortest) == 1:
            return shortest[0]
        lengths = [match.length(worker.slot) for worker in shortest]
        most = max(lengths)
        return self.rotate([w for w, length in zip(shortest, lengths, strict=True) if length == most])

    def _smallest(self, candidates: tuple[Worker, ...]) -> Worker:
        """Of the candidates known."""
        sizes = [books.size for books in self._books]
        low = min(sizes)
        if sizes.count(low) == 1:
            return candidates[sizes.index(low)]
        return self.least_loaded([w for w, s in zip(candidates, sizes, strict=True) if s == low])

    # -- notices -----------------------------------------------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        worker.slot = self.tree.add_slot()
        self._by_slot[worker.slot] = worker
        self._known = ()

    def removed(self, worker: Worker) -> None:
        del self._by_slot[worker.slot]
        self.tree.retire(worker.slot)
        self._known = ()

    def emptied(self, worker: Worker) -> None:
        self.removed(worker)
        self.added(worker)

    def tidy(self, now: float, budget: int) -> bool:
        done = self.tree.reclaim(budget)
        if done < budget:
            done += self.tree.expire(now - self.settings.max_idle, budget - done)
        return done >= budget
