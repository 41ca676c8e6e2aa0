"""The policies that look at nothing but the candidates: random, round_robin, power_of_two, least_load."""

from __future__ import annotations

import random
from bisect import bisect_right, insort

from sglang_router.routing.candidates import Candidates
from sglang_router.routing.facts import Facts
from sglang_router.routing.policies.base import Choice, Policy
from sglang_router.routing.rules import PolicySettings
from sglang_router.routing.worker import Worker


class _Drawing(Policy):
    """A policy with random choices. `_lot` is the number in [0, 1) that decides the next request."""

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self._lot = rng.random()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} lot {self._lot:.6f}>"

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Draw the random number for the next choice."""
        self._lot = self.rng.random()


class Random(_Drawing):
    """Any worker, with equal chance."""

    name = "random"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose any candidate."""
        return Choice(candidates[int(self._lot * len(candidates))], "random")


class PowerOfTwo(_Drawing):
    """The less loaded of two drawn at random (Mitzenmacher 2001): near the best balance, without a herd."""

    name = "power_of_two"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the less loaded of two random candidates."""
        count = len(candidates)
        if count == 1:
            return Choice(candidates[0], "only")
        # One lot draws an ordered pair of two different workers: the first of all, the second of the others.
        first, second = divmod(int(self._lot * (count * (count - 1))), count - 1)
        one, other = candidates[first], candidates[second + (second >= first)]
        return Choice(one if one.load <= other.load else other, "two")


class RoundRobin(Policy):
    """Each worker in turn, in order of registration.

    The turn is remembered as the worker served last, not as a count, so that workers that come and go do not shift the
    turn of the others.
    """

    name = "round_robin"

    def __init__(self, settings: PolicySettings, rng: random.Random) -> None:
        super().__init__(settings, rng)
        self._last = 0  # the order of the worker served last
        self._orders: list[int] = []  # of the workers of the pool; their places in it are the seats

    def __repr__(self) -> str:
        return f"<RoundRobin after worker {self._last}>"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the candidate after the last chosen one, in order of registration."""
        seat, mask = bisect_right(self._orders, self._last), candidates.mask
        following = mask >> seat << seat or mask
        return Choice(candidates.at((following & -following).bit_length() - 1), "turn")

    def chosen(self, choice: Choice, facts: Facts, now: float) -> None:
        """Remember the chosen worker."""
        self._last = choice.worker.order

    def added(self, worker: Worker) -> None:
        """Take note of the worker's order."""
        insort(self._orders, worker.order)

    def removed(self, worker: Worker) -> None:
        """Forget the worker's order."""
        self._orders.remove(worker.order)


class LeastLoad(Policy):
    """The worker with the fewest running requests; equal ones in turn."""

    name = "least_load"

    def choose(self, facts: Facts, candidates: Candidates, now: float) -> Choice:
        """Choose the candidate with the fewest requests in flight."""
        return self.least_loaded(candidates, "least")
