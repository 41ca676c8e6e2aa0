"""longest_prefix: the plainest of all affinities, as a baseline. Whoever has most of the prompt gets it, however busy.

What the workers hold is remembered as `cache_aware` does. Of several with equally much, and when nobody has a page of
it, the least loaded gets the request; then in turn.
"""

from __future__ import annotations

import random

from sglang_router.replay.load import UNIT
from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.prefix_tree.memory import TreeMemory
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker


class LongestPrefix(Policy):
    """See the module."""

    name = "longest_prefix"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self.memory = self._memory = TreeMemory(settings.max_tree_size)
        self._tree = self._memory.tree

    def __repr__(self) -> str:
        return f"<LongestPrefix turn {self._turn}, {self._tree!r}>"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the worker with the longest matching prefix."""
        text = facts.text[: self._tree.max_text]
        match = self._tree.match(facts.namespace, text)
        length, owners = match.best(candidates.mask)
        if length < UNIT:
            length, owners = 0, candidates.mask
        choice = self.least_loaded(candidates, "longest" if length else "miss", owners)
        choice.matched, choice.total, choice.note = length, len(text), match
        return choice

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Insert the request's text into the tree, as a prefix of the chosen worker."""
        super().chosen(choice, facts, now)
        self._tree.insert(choice.note, choice.worker.slot, now)

    def added(self, worker: Worker) -> None:
        """Give a worker a slot in the tree."""
        self._memory.add(worker)

    def removed(self, worker: Worker) -> None:
        """Free the worker's slot, and with it its prefixes."""
        self._memory.remove(worker)

    def emptied(self, worker: Worker) -> None:
        """Forget the worker's prefixes: it gets a new slot."""
        self.removed(worker)
        self.added(worker)

    def tidy(self, now: float, budget: int) -> bool:
        """Free the nodes of removed workers."""
        return self._tree.reclaim(budget) >= budget
