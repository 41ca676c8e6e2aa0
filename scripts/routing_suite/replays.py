"""Runs `sglang-router replay LOAD --policies POLICY --json`. In virtual time: the same on each machine."""

from __future__ import annotations

import json
import subprocess
import sys

from scripts.routing_suite.rows import Replayed, SuiteError
from scripts.routing_suite.samples import REPLAYS, Cell, Figures

from sglang_router.config.table import OPTIONS
from sglang_router.replay.options import KINDS

QUICK = 400
"""Requests of each load with --quick."""
WANTED = (
    "cache_aware",
    "cost",
    "cost:session-affinity",
    "cost:session-admission",
    "least_load",
    "power_of_two",
    "round_robin",
    "longest_prefix",
)


def policies() -> list[str]:
    """Return those of `WANTED` that this version has."""
    found = []
    for label in WANTED:
        name, *options = label.split(":")
        if name in KINDS and all(option.replace("-", "_") in OPTIONS for option in options):
            found.append(label)
    return found


def takes(load: Replayed, policy: str) -> bool:
    """Return whether a policy is replayed with a load: what differs for sessions only, for those only."""
    return load.sessions or "session" not in policy


def replay(load: Replayed, policy: str, seeds: int, quick: bool) -> Cell:
    """Return the figures of one load with one policy. Raises: SuiteError."""
    words = [sys.executable, "-m", "sglang_router", "replay", load.trace, *load.flags, "--policies", policy]
    words += ["--json", "--quiet", "--seeds", str(seeds), *(["--requests", str(QUICK)] if quick else [])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SuiteError(f"{load.name} with {policy}: {done.stderr.strip()}")
    figures: Figures = json.loads(done.stdout)["policies"][0]["figures"]
    return Cell(REPLAYS, load.name, policy, seeds, figures)
