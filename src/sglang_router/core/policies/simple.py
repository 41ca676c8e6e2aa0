"""The policies that look at nothing but the candidates: random, round_robin, power_of_two, least_load."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from sglang_router.core.policies.base import Choice, Policy

if TYPE_CHECKING:
    from sglang_router.core.request import Facts
    from sglang_router.core.worker import Worker


class Random(Policy):
    """Any worker, with equal chance."""

    name = "random"

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        return Choice(self.rng.choice(candidates), "random")


class RoundRobin(Policy):
    """Each worker in turn, in order of registration.

    The turn is remembered as the worker served last, not as a count: workers that come and go shift nobody else's turn.
    """

    name = "round_robin"
    _last = 0

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        following = bisect_right(candidates, self._last, key=_order)
        worker = candidates[following] if following < len(candidates) else candidates[0]
        self._last = worker.order
        return Choice(worker, "turn")


def _order(worker: Worker) -> int:
    return worker.order


class PowerOfTwo(Policy):
    """The less loaded of two drawn at random (Mitzenmacher 2001): near the best balance, without a herd."""

    name = "power_of_two"

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        if len(candidates) == 1:
            return Choice(candidates[0], "only")
        one, other = self.rng.sample(candidates, 2)
        return Choice(one if one.load <= other.load else other, "two")


class LeastLoad(Policy):
    """The worker with the fewest running requests; equals in turn."""

    name = "least_load"

    def choose(self, facts: Facts, candidates: tuple[Worker, ...], now: float) -> Choice:
        return Choice(self.least_loaded(candidates), "least")
