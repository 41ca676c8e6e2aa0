"""Which load meets which target when, and how long that takes. Arithmetic only.

The order of the targets rotates from round to round: who comes first in one comes last in the next. The seconds of each
load are what fits into the planned minutes, so that one command measures everything in a known time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.benchmark.loads import LOADS, Load, Room

LONGEST, SHORTEST = 3.0, 0.5
START = 1.5
"""Seconds until a target serves."""
WARM = 0.7
"""Seconds of the load before the first round, for each target."""
PER_WORKER = 0.01
"""Further seconds for each worker, until a target has found them all."""

Takes = Callable[[str, Load], bool]
"""Whether a target, by its name, is measured under a load."""


@dataclass(frozen=True)
class Step:
    """One load on one target in one round; rounds count from 1."""

    round: int
    load: Load
    target: str

    @property
    def seed(self) -> int:
        """Of the prompts: the same for all targets, another one in each round and for each load; never 0."""
        return self.round * len(LOADS) + LOADS.index(self.load)


def rooms(loads: Sequence[Load]) -> list[tuple[Room, list[Load]]]:
    """Group loads by their room, in the order of the first load of each."""
    found: dict[Room, list[Load]] = {}
    for load in loads:
        found.setdefault(load.room, []).append(load)
    return list(found.items())


def steps(loads: Sequence[Load], targets: Sequence[str], rounds: int, takes: Takes) -> list[Step]:
    """Return the steps of one room in their order."""
    found = []
    for number in range(rounds):
        turn = number % max(len(targets), 1)
        order = [*targets[turn:], *targets[:turn]]
        found += [Step(number + 1, load, name) for load in loads for name in order if takes(name, load)]
    return found


def step_seconds(load: Load, seconds: float) -> float:
    return load.fixed + seconds


def fixed_seconds(loads: Sequence[Load], targets: Sequence[str]) -> float:
    """Return the seconds of starting and warming up all targets in all rooms."""
    return sum(len(targets) * (START + WARM + PER_WORKER * room.workers) for room, _ in rooms(loads))


def planned_seconds(loads: Sequence[Load], targets: Sequence[str], rounds: int, takes: Takes, seconds: float) -> float:
    found = steps(loads, targets, rounds, takes)
    return fixed_seconds(loads, targets) + sum(step_seconds(step.load, seconds) for step in found)


def fitting_seconds(loads: Sequence[Load], targets: Sequence[str], rounds: int, takes: Takes, minutes: float) -> float:
    """Return the seconds of each load with which the whole takes that many minutes, from SHORTEST to LONGEST."""
    count = len(steps(loads, targets, rounds, takes))
    left = minutes * 60 - planned_seconds(loads, targets, rounds, takes, 0)
    return round(min(max(left / max(count, 1), SHORTEST), LONGEST), 1)


@dataclass
class Progress:
    """How much of the planned time is left, corrected by how long what is done has taken. Moments are of one clock.

    `limit`: the seconds within which everything must be done, at the cost of rounds; infinite if rounds are not to be
    left out.
    """

    planned: float
    began: float
    limit: float = math.inf
    done: float = 0.0

    def allows(self, now: float, coming: float, room: float) -> bool:
        """Whether a round of `coming` planned seconds can end in time, if `room` planned seconds end this room.

        Every room has its share of the limit, so that a slow one does not eat up the time of those that follow.
        """
        pace = max((now - self.began) / self.done, 1.0) if self.done else 1.0
        return now + coming * pace <= self.began + self.limit * room / self.planned

    def left(self, now: float) -> float:
        """Return the seconds that are left. Trusts the plan until a tenth of it is done."""
        pace = (now - self.began) / self.done if self.done > self.planned / 10 else 1.0
        return max(self.planned - self.done, 0) * max(pace, 0.1)
