"""The routers that are compared as processes. Other routers come from PyPI, as in `scripts/bench`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from scripts.benchmark.options import parse
from scripts.benchmark.processes import Processes, Server
from scripts.benchmark.targets import LAUNCHER, OURS, QUIET, REFERENCE, TARGETS, Found, find, module
from scripts.routing_suite.replays import policies
from scripts.routing_suite.rows import Lived

OWN = "ours"
OWN_POLICIES = ("cache_aware", "cost", "cost:session-affinity")
CACHE_AWARE = "cache_aware"
"""The policy of the targets of `scripts/bench`."""
RIVALS = (
    (REFERENCE, CACHE_AWARE),
    ("smg", CACHE_AWARE),
    ("vllm-router", CACHE_AWARE),
    (REFERENCE, "power_of_two"),
    (REFERENCE, "round_robin"),
)
_ALONE = {"PYTHONPATH": ""}  # another router must not find our modules


class Contender(NamedTuple):
    """One router with one policy. name: as tables call it."""

    name: str
    found: Found

    def takes(self, load: Lived) -> bool:
        """Return whether it is run with a load: what differs for sessions only, for those only."""
        return load.sessions or "session" not in self.name

    def start(self, processes: Processes, workers: list[int]) -> Server:
        """Start it in front of workers. Raises: BenchError."""
        return self.found.start(processes, workers)


def flags(label: str) -> tuple[str, ...]:
    """Return the flags of our router for a policy as `sglang-router replay --policies` names it."""
    name, *options = label.split(":")
    return ("--policy", name, *(word for each in options for word in f"--{each}".split("=", 1)))


def contenders(folder: Path, word: str = "") -> Iterator[Contender | str]:
    """Give all routers whose name has this word; for one that cannot be started here, why."""
    known = {target.name: target for target in TARGETS}
    options = parse([])
    for label in (label for label in policies() if label in OWN_POLICIES and word in f"{OWN} {label}"):
        found = find(known[OURS], replace(options, flags=flags(label)), folder)
        yield found if isinstance(found, str) else Contender(f"{OWN} {label}", found)
    for name, policy in RIVALS:
        target = known[name]
        title = f"{target.title} {target.package.partition('==')[2]} {policy}"
        if word not in title:
            continue
        found = find(target, options, folder)
        if not isinstance(found, str):
            if policy != CACHE_AWARE:
                target = replace(target, command=module(LAUNCHER, "--policy", policy, *QUIET))
            found = replace(found, target=target, environment={**found.environment, **_ALONE})
        yield found if isinstance(found, str) else Contender(title, found)
