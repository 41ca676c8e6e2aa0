"""What the figures say: under which loads a rival is better than this router, and which of our goals are reached.

Only figures of a target that answered (nearly) all requests of a load are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scripts.benchmark.loads import BY_NAME, LOADS
from scripts.benchmark.results import Results, Sample
from scripts.benchmark.targets import BEFORE, COMPILED, DIRECT, HAPROXY, OURS, REFERENCE, TARGETS

from sglang_router.words import counted

OWN = tuple(target.name for target in TARGETS if target.source and target.name != BEFORE)
JUDGED = (OURS, COMPILED)
"""Goals are of a router in one process."""
METRICS: dict[str, Callable[[Sample], float]] = {
    "CPU": lambda sample: sample.cpu,
    "p99": lambda sample: sample.p99,
    "RSS": lambda sample: sample.memory,
}
LOSSES_HEAD = ("rival", "load", *METRICS, "failed")
SAME = 1.02
"""Up to this ratio two figures count as equal."""


@dataclass(frozen=True)
class Loss:
    """A rival is better under a load: our figure by its, for each metric where that is above 1.

    `failed`: how many requests failed with us, though not with the rival; nothing else is compared then.
    """

    rival: str
    load: str
    ratios: dict[str, float]
    failed: float = 0.0

    @property
    def cells(self) -> list[str]:
        ratios = [f"{self.ratios[name]:.2f}" if name in self.ratios else "" for name in METRICS]
        return [*ratios, f"{self.failed:,.0f}" if self.failed else ""]


def rivals(results: Results) -> list[str]:
    return [name for name in results.targets if name not in (*OWN, BEFORE, DIRECT)]


def losses(results: Results) -> list[Loss]:
    """Return where rivals are better, by rival and then by load."""
    found = [loss(results, rival, load.name) for rival in rivals(results) for load in LOADS]
    return [each for each in found if each and (each.ratios or each.failed)]


def loss(results: Results, rival: str, load: str) -> Loss | None:
    """Compare with one rival; None if one of the two was not measured, or if requests failed with the rival."""
    ours, theirs = results.medians(load).get(OURS), results.median(load, rival)
    if not ours or not theirs:
        return None
    if not ours.sound:
        return Loss(rival, load, {}, max(ours.errors, 1))
    ratios = {name: read(ours) / read(theirs) for name, read in METRICS.items() if read(theirs)}
    return Loss(rival, load, {name: ratio for name, ratio in ratios.items() if ratio > SAME})


def losses_rows(results: Results) -> list[list[str]]:
    return [[results.targets[each.rival], BY_NAME[each.load].label, *each.cells] for each in losses(results)]


def losses_summary(results: Results) -> list[str]:
    """Return a sentence for each rival: under how many of the common loads it is better, in what."""
    told = []
    for rival in rivals(results):
        common = [each for load in LOADS if (each := loss(results, rival, load.name))]
        counts = {name: sum(name in each.ratios for each in common) for name in METRICS}
        counts["requests that fail with us"] = sum(each.failed > 0 for each in common)
        better = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "nothing"
        if common:
            told.append(f"{results.targets[rival]} is better, of {counted(len(common), 'load')}: {better}.")
    return told


@dataclass(frozen=True)
class Goal:
    """Our figure under a load must be at most `pure` times that of `peer`; `compiled`: of the compiled package."""

    load: str
    metric: str
    peer: str
    pure: float
    compiled: float

    def most(self, target: str) -> float:
        """Return the bound for one of our targets."""
        return self.compiled if target == COMPILED else self.pure

    @property
    def bounds(self) -> str:
        """Both bounds, for people; "-": none."""
        return " / ".join("-" if bound == math.inf else f"{bound:.2f}" for bound in (self.pure, self.compiled))


GOALS = (
    *(Goal(size, "CPU", REFERENCE, 0.38, 0.28) for size in ("200B", "4kB", "16kB", "60kB")),
    Goal("200B", "CPU", HAPROXY, math.inf, 3.2),
    Goal("16kB", "CPU", HAPROXY, math.inf, 2.6),
    *(Goal(size, "p99", REFERENCE, 0.80, 0.60) for size in ("200B", "4kB", "16kB")),
    Goal("60kB", "p99", REFERENCE, 1.00, 0.80),
    Goal("streams-500", "CPU", REFERENCE, 0.70, 0.58),
    Goal("streams-3000", "CPU", REFERENCE, 0.50, 0.42),
    Goal("streams-500", "CPU", HAPROXY, math.inf, 1.35),
    Goal("streams-500", "p99", HAPROXY, 1.20, 1.20),
)


def goals_head(results: Results) -> list[str]:
    return [
        "load",
        "figure",
        "of",
        "peer's",
        "pure / compiled",
        *(results.targets[name] for name in judged(results)),
        "reached",
    ]


def judged(results: Results) -> list[str]:
    return [name for name in JUDGED if name in results.targets]


def goals_rows(results: Results) -> list[list[str]]:
    """Return the goals that can be judged by the figures. `reached`: by which of our targets; "yes" is by all.

    A target that failed requests has no figure and reaches nothing.
    """
    rows = []
    for goal in GOALS:
        load, read = BY_NAME[goal.load], METRICS[goal.metric]
        peer = results.median(goal.load, goal.peer)
        measured = [name for name in judged(results) if name in results.samples.get(goal.load, {})]
        if not measured or not peer or not read(peer):
            continue
        ratios = {name: read(got) / read(peer) for name in judged(results) if (got := results.median(goal.load, name))}
        unit = f"us/{load.unit.removesuffix('s')}" if goal.metric == "CPU" else "ms"
        figure = read(peer) if goal.metric == "CPU" else read(peer) / 1e3
        cells = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in judged(results)]
        reached = [name for name, ratio in ratios.items() if ratio <= goal.most(name)]
        says = "yes" if len(reached) == len(measured) else ", ".join(reached) or "NO"
        peers = [results.targets[goal.peer], f"{figure:.2f}", goal.bounds]
        rows.append([load.label, f"{goal.metric} {unit}", *peers, *cells, says])
    return rows
