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
or was flushed loses them. With --kv-events, what a worker itself says it holds takes the place of that memory; with
--shared-state, what other routers sent there counts as well: a prompt that nobody knows goes to one of the workers to
which all together have sent little, and while the store cannot be reached, where every router would send it
(`routing.prefix_tree.informed`).

A match of fewer than `_WORTH` bytes that is not the whole text saves the engine a few tokens and is no reason to leave
the balance: else all short prompts that begin with the same word ("Question 1", "Question 2") would go to one worker.

The rule for unknown prompts (smallest tree) fills the caches evenly when requests come one at a time and every load is
0.
"""

from __future__ import annotations

import random
from typing import Final

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.considered import Considered
from sglang_router.routing.facts import Facts
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.prefix_tree.informed import Informed
from sglang_router.routing.prefix_tree.memory import TreeMemory
from sglang_router.routing.prefix_tree.tree import Match
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker

_WORTH: Final = 16


class CacheAware(Policy):
    """See the module. `tree` belongs to the memory; it is read here."""

    name = "cache_aware"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self.memory = self._memory = TreeMemory(settings.max_tree_size, settings.kv_caches)
        self._informed = self._memory.informed
        self.tree = self._memory.tree
        self._longest_text = self.tree.max_text
        self._by_slot: dict[int, Worker] = {}
        self.adjust(settings)

    def __repr__(self) -> str:
        return f"<CacheAware turn {self._turn}, {self.tree!r}>"

    def adjust(self, settings: PolicySettings) -> None:
        """Follow other thresholds from now on."""
        super().adjust(settings)
        self._threshold = settings.cache_threshold
        self._abs = settings.balance_abs_threshold
        self._rel = settings.balance_rel_threshold

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the worker with the longest matching prefix, unless load or a short match speak against it."""
        text, scaffold = facts.text, facts.scaffold
        if len(text) > self._longest_text:
            text = text[: self._longest_text]
        total = len(text) - scaffold
        if total <= 0:
            return self.least_loaded(candidates, "no_text")
        match = self.tree.match(facts.namespace, text)
        if self._informed is not None:  # without a call: most routers do not ask
            match = self._informed.inform(match, facts)
        mask = candidates.mask  # the seats are the slots of the tree
        if candidates.roster.high > self._abs and self._imbalanced(candidates):
            choice, length = self._longest(candidates, match)
            matched = length - scaffold
        else:
            length, owners = match.best(mask)
            matched = length - scaffold
            if matched > self._threshold * total and (matched >= _WORTH or matched == total):
                if owners & (owners - 1):
                    choice = self.least_loaded(candidates, "hit", owners)
                else:
                    choice = Choice(candidates.at(owners.bit_length() - 1), "hit")
            else:
                smallest = 0 if self._informed is None else self._stranger(self._informed, match, candidates)
                if not smallest:
                    smallest = self.tree.smallest(mask)
                if smallest & (smallest - 1):
                    choice = self.least_loaded(candidates, "miss", smallest)
                else:
                    choice = Choice(candidates.at(smallest.bit_length() - 1), "miss")
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
            if self._informed is not None:
                slot = choice.worker.slot
                choice.noted = self._informed.promise(match, slot)
                self.tree.bound(slot, self._informed.part(slot, self.tree.max_size))

    def consider(self, facts: Facts, candidates: Candidates, now: float) -> list[Considered]:
        """Return what is known of the text at each of these candidates."""
        found, text, scaffold = super().consider(facts, candidates, now), facts.text, facts.scaffold
        match = self.tree.match(facts.namespace, text[: self._longest_text])
        if self._informed is not None:
            match = self._informed.inform(match, facts)
        for worker, each in zip(candidates, found, strict=True):
            each.matched = max(match.length(worker.slot) - scaffold, 0)
        return found

    def unread(self, choice: Choice, facts: Facts) -> None:
        """Take what the request added out of the tree, as far as no other request has used it."""
        if choice.learned and self._by_slot.get(choice.worker.slot) is choice.worker:
            namespace, slot = facts.namespace, choice.worker.slot
            taken = self.tree.forget(namespace, facts.text, slot, choice.learned, choice.learned_at)
            if taken and self._informed is not None:
                self._informed.unread(namespace, facts.text[: self._longest_text], slot, choice.noted, taken)

    def _stranger(self, informed: Informed, match: Match, candidates: Candidates) -> int:
        """Return where a text goes that nobody has, by what other routers tell, or all agree on; 0: they do not say."""
        agreed = informed.agree(match, candidates.mask, candidates.roster)
        return 1 << agreed[0] if agreed else informed.emptiest(match, candidates.mask)

    def _imbalanced(self, candidates: Candidates) -> bool:
        """Return whether the loads differ by so much that the cache no longer matters."""
        roster, mask = candidates.roster, candidates.mask
        high = roster.most(mask)
        if high <= self._abs:
            return False
        low = roster.least(mask)
        return high - low > self._abs and high > self._rel * low

    def _longest(self, candidates: Candidates, match: Match) -> tuple[Choice, int]:
        """Choose, of the workers with equally short queues, the one with the longest prefix; return its length too."""
        shortest = candidates.roster.least_loaded(candidates.mask)
        length, owners = match.best(shortest)
        return self.in_turn(candidates, owners or shortest, "imbalance"), length

    # -- notices -----------------------------------------------------------------------------------------------------

    def added(self, worker: Worker) -> None:
        """Give a worker a slot in the tree."""
        self._by_slot[self._memory.add(worker)] = worker

    def removed(self, worker: Worker) -> None:
        """Free the worker's slot, and with it its prefixes."""
        del self._by_slot[self._memory.remove(worker)]

    def emptied(self, worker: Worker) -> None:
        """Forget the worker's prefixes: it gets a new slot."""
        self.removed(worker)
        self.added(worker)

    def tidy(self, now: float, budget: int) -> bool:
        """Free the nodes of removed workers; evict what is too much, then what was unused for `max_idle` seconds."""
        return self._memory.tidy(now - self.settings.max_idle, budget) >= budget
