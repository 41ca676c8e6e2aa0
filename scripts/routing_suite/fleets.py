"""Several routers before the same engines, with a store between them and without: what a fleet loses against one.

For each load and number of routers, two fleets run side by side, each with engines of its own: one shares what it
knows, the other does not. Requests go to the routers of a fleet in turn, also those of one session. All of that is
repeated with other requests of the same kind: how the work of some hundred requests falls on eight engines is chance,
too, so a figure without its spread says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from scripts.benchmark.options import parse
from scripts.benchmark.processes import BenchError
from scripts.benchmark.targets import OURS, TARGETS, Found, find
from scripts.reliability.page import write_tables
from scripts.reporting import ROOT, machine, table
from scripts.routing_suite import live
from scripts.routing_suite.routers import Contender, flags
from scripts.routing_suite.rows import Lived, SuiteError
from scripts.routing_suite.scripted import script

from valkeys import ValkeyServer, valkey_server

PAGE = ROOT / "docs" / "scale.md"
EIGHT = (1.0,) * 8
POLICY = "cost"
FLEETS = (
    Lived("64 groups x 8", "groups,requests=512,rate=24", speeds=EIGHT),
    Lived("one hot prefix", "hot-prefix,requests=480,rate=24", speeds=EIGHT),
    Lived("sessions, one system prompt", "sessions,requests=360,rate=4,turns=6,think=2", speeds=EIGHT, sessions=True),
)
SIZES = (1, 4, 8)
SEEDS = 3
ALONE, SHARED = "each alone", "as one"
HEAD = ("load", "routers", "", "cached", "of one router's", "TTFT p90 ms", "busiest engine", "routers' CPU", "failed")


class FleetRow(NamedTuple):
    """What one fleet did. kind: ALONE or SHARED; figures: of each of its runs."""

    load: str
    size: int
    kind: str
    figures: Sequence[dict[str, float]]

    @property
    def means(self) -> dict[str, float]:
        """The mean of each figure; of failed requests their sum."""
        means = {name: statistics.fmean(each[name] for each in self.figures) for name in self.figures[0]}
        return means | {"failed": sum(each["failed"] for each in self.figures)}

    def cells(self, one: float) -> list[str]:
        """Return it for the table. one: the cached tokens of one router."""
        found, balances = self.means, [each["balance"] for each in self.figures]
        spread = f" +- {statistics.stdev(balances):.2f}" if len(balances) > 1 else ""
        return [
            self.load,
            str(self.size),
            self.kind if self.size > 1 else "",
            f"{found['hit']:.3f}",
            f"{found['hit'] / one:.2f}" if one else "-",
            f"{found['ttft_p90'] * 1000:.0f}",
            f"{found['balance']:.2f}{spread}",
            f"{found['cpu_router']:.2f}",
            f"{found['failed']:.0f}",
        ]


def contender(name: str, words: Sequence[str], folder: Path) -> Contender:
    """Return our router with some flags. Raises: SuiteError, when it cannot be started."""
    target = next(each for each in TARGETS if each.name == OURS)
    found = find(target, replace(parse([]), flags=tuple(words)), folder)
    if not isinstance(found, Found):
        raise SuiteError(found)
    return Contender(name, found)


def measure(load: Lived, size: int, options: argparse.Namespace, store: ValkeyServer, folder: Path) -> list[FleetRow]:
    """Run the fleets of one size, once with each seed. Raises: BenchError, SuiteError."""
    policy = flags(f"{options.policy}:session-affinity" if load.sessions else options.policy)
    figures: dict[str, list[dict[str, float]]] = {}
    for seed in range(1, options.seeds + 1):
        prefix = f"{FLEETS.index(load)}-{size}-{seed}"
        kinds = {ALONE: policy}
        if size > 1:
            kinds[SHARED] = (*policy, "--shared-state", store.url, "--shared-state-prefix", prefix)
        fleets = [contender(kind, words, folder) for kind, words in kinds.items()]
        results = live.run(load, fleets, script(load.trace, seed), size)
        for kind, (found, _) in zip(kinds, results, strict=True):
            figures.setdefault(kind, []).append(found)
    return [FleetRow(load.name, size, kind, found) for kind, found in figures.items()]


def run(options: argparse.Namespace) -> list[list[str]]:
    """Run all; return the rows of the table. Raises: BenchError, SuiteError."""
    rows: list[list[str]] = []
    chosen = [load for load in FLEETS if options.only in load.name]
    if not chosen:
        raise SuiteError(f"no load has {options.only!r} in its name")
    with tempfile.TemporaryDirectory(prefix="fleet-suite-") as folder, valkey_server() as store:
        for load in chosen:
            one = 0.0
            for size in options.sizes:
                for row in measure(load, size, options, store, Path(folder)):
                    one = row.means["hit"] if size == 1 else one
                    rows.append(row.cells(one))
                    print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/fleet-suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="the loads whose name has this word")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="numbers of routers")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="runs of each, with other requests")
    parser.add_argument("--policy", default=POLICY, metavar="NAME", help="the policy; of sessions, with their affinity")
    parser.add_argument("--write", action="store_true", help="write the table into docs/scale.md")
    options = parser.parse_args(words)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    try:
        rows = run(options)
    except (SuiteError, BenchError) as error:
        print(f"fleet-suite: {error}", file=sys.stderr)
        return 2
    print(table(HEAD, rows, markdown=False))
    if options.write:
        about = "; ".join(each.about for each in FLEETS if options.only in each.name)
        about += f". `{options.policy}`, means of {options.seeds} runs with different requests, +- their deviation"
        write_tables("fleets", f"{machine(())} {about}.\n\n{table(HEAD, rows, markdown=True)}", PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
