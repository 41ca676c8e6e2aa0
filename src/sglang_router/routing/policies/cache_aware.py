"""cache_aware: a request goes to the worker whose KV cache holds the most of its prompt, unless that would overload it.

    imbalanced?   max_load - min_load > abs  and  max_load > rel * min_load
                      -> the least loaded; of equal ones the longest prefix, then in turn          branch "imbalance"
    matched / total > cache_threshold, in more than a few bytes
                      -> the owner of the longest match; of several the least loaded, then in turn  branch "hit"
    else          -> the smallest tree; of equal ones the least loaded, then in turn               branch "miss"
    no text       -> the least loaded, in turn                                                     branch "no_text"

What the workers hold is not asked but remembered: `routing.prefix_tree.tree` keeps every text that was sent to each,
within `max_tree_size` bytes a worker, and evicts the least recently used first, as the engines do. A prompt longer than
an eighth of that counts only with its beginning. `choose` matches, `chosen` inserts where the match ended, so that the
next request with this prefix follows at once; `unread` takes it out again when the worker refused the request (4xx) or
never had it. A worker that is away for a while keeps its entries, because its cache is still there; one that restarted
or was flushed loses them.

A match of fewer than `_WORTH` bytes that is not the whole text saves the engine a few tokens and is no reason to leave
the balance: else all short prompts that begin with the same word ("Question 1", "Question 2") would go to one worker.

The rule for unknown prompts (smallest tree) fills the caches evenly when requests come one at a time and every load is
0.
"""

from __future__ import annotations

import random

from sglang_router.routing.facts import Facts
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.prefix_tree.memory import TreeMemory
from sglang_router.routing.prefix_tree.slot import Slot
from sglang_router.routing.prefix_tree.tree import Match
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker

_WORTH = 16


class CacheAware(Policy):
    """See the module. `tree` belongs to the memory; it is read here."""

    name = "cache_aware"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self.memory = self._memory = TreeMemory(settings.max_tree_size)
        self.tree = self._memory.tree
        self._longest_text = self.tree.max_text
        self._threshold = settings.cache_threshold
        self._abs = settings.balance_abs_threshold
        self._rel = settings.balance_rel_threshold
        self._by_slot: dict[int, Worker] = {}
        # Derived from the candidates seen last, which are the same tuple until the pool changes: no state of its own.
        self._known: tuple[Worker, ...] = ()
        self._mask = 0
        self._books: list[Slot] = []

    def __repr__(self) -> str:
        return f"<CacheAware turn {self._turn}, {self.tree!r}>"

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        """Choose the worker with the longest matching prefix, unless load or a short match speak against it."""
        text, scaffold = facts.text, facts.scaffold
        if len(text) > self._longest_text:
            text = text[: self._longest_text]
        total = len(text) - scaffold
        if total <= 0:
            return self.least_loaded(candidates, "no_text")
        match = self.tree.match(facts.namespace, text)
        loads = [worker.load for worker in candidates]
        # While the highest load is below the threshold, no difference can be above it.
        if (high := max(loads)) > self._abs and self._imbalanced(low := min(loads), high):
            choice = self._longest([worker for worker in candidates if worker.load == low], match)
            matched = match.length(choice.worker.slot) - scaffold
        else:
            if candidates is not self._known:
                self._get_to_know(candidates)
            length, owners = match.best(self._mask)
            matched = length - scaffold
            if matched > self._threshold * total and (matched >= _WORTH or matched == total):
                several = owners & (owners - 1)
                choice = self._owner(owners) if several else Choice(self._by_slot[owners.bit_length() - 1], "hit")
            else:
                choice = self._smallest(candidates)
                matched = match.length(choice.worker.slot) - scaffold if matched > 0 else 0
        choice.matched = matched if matched > 0 else 0
        choice.total = total
        choice.note = match
        return choice

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Insert the request's text into the tree, as a prefix of the chosen worker."""
        if choice.tied:
            self._turn += 1
        match: Match | None = choice.note
        if match is not None:
            choice.note = None  # it refers to nodes of the tree, which may go before the request ends
            choice.learned = self.tree.insert(match, choice.worker.slot, now)
            choice.learned_at = now

    def unread(self, choice: Choice, facts: Facts) -> None:
        """Take what the request added out of the tree, as far as no other request has used it."""
        if choice.learned and choice.worker.slot in self._by_slot:
            self.tree.forget(facts.namespace, facts.text, choice.worker.slot, choice.learned, choice.learned_at)

    def _imbalanced(self, low: int, high: int) -> bool:
        """Return whether the loads differ by so much that the cache no longer matters."""
        return high - low > self._abs and high > self._rel * low

    def _get_to_know(self, candidates: tuple[Worker, ...]) -> None:
        self._known = candidates
        self._mask = sum(1 << worker.slot for worker in candidates)
        self._books = [self.tree.books(worker.slot) for worker in candidates]

    def _owner(self, owners: int) -> Choice:
        """Choose the least loaded of several owners; the mask has the bits of candidates only."""
        several = []
        while owners:
            low = owners & -owners
            several.append(self._by_slot[low.bit_length() - 1])
            owners ^= low
        return self.least_loaded(several, "hit")

    def _longest(self, shortest: list[Worker], match: Match) -> Choice:
        """Choose, of workers with equally short queues, the one with the longest prefix."""
        if len(shortest) == 1:
            return Choice(shortest[0], "imbalance")
        lengths = [match.length(worker.slot) for worker in shortest]
        most = max(lengths)
        return self.in_turn([w for w, length in zip(shortest, lengths, strict=True) if length == most], "imbalance")

    def _smallest(self, candidates: tuple[Worker, ...]) -> Choice:
        """Choose the candidate with the smallest tree."""
        sizes = [books.size for books in self._books]
        low = min(sizes)
        if sizes.count(low) == 1:
            return Choice(candidates[sizes.index(low)], "miss")
        return self.least_loaded([w for w, s in zip(candidates, sizes, strict=True) if s == low], "miss")

    # -- notices -----------------------------------------------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        """Give a worker a slot in the tree."""
        self._by_slot[self._memory.add(worker)] = worker
        self._known = ()

    def removed(self, worker: Worker) -> None:
        """Free the worker's slot, and with it its prefixes."""
        del self._by_slot[self._memory.remove(worker)]
        self._known = ()

    def emptied(self, worker: Worker) -> None:
        """Forget the worker's prefixes: it gets a new slot."""
        self.removed(worker)
        self.added(worker)

    def tidy(self, now: float, budget: int) -> bool:
        """Free the nodes of removed workers; evict what is too much, then what was unused for `max_idle` seconds."""
        done = self.tree.reclaim(budget)
        if done < budget:
            done += self.tree.trim(budget - done)
        if done < budget:
            done += self.tree.expire(now - self.settings.max_idle, budget - done)
        return done >= budget
