"""Replay many loads with each routing policy, and write the tables of docs/routing.md.

    LOADS × POLICIES ──> `sglang-router replay LOAD --policies POLICY --seeds 3 --json`, two at a time ──> tables

Everything is virtual: the same commit gives the same tables on each machine. `scripts/routing-suite` (a shell script)
runs it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scripts.reporting import ROOT, table

from sglang_router.config.table import OPTIONS
from sglang_router.replay.options import KINDS

PAGE = ROOT / "docs" / "routing.md"
BEGIN, END = "<!-- replayed: begin -->\n", "<!-- replayed: end -->\n"
SEEDS = 3
QUICK = 400
"""Requests of each load with --quick."""
AGENTS = "agent_sessions.jsonl.gz"
MOONCAKE = "mooncake_synthetic_trace.jsonl"
AZURE = "azure_llm_2023_conv.csv"
WANTED = (
    "cache_aware",
    "cost",
    "cost:session-affinity",
    "least_load",
    "power_of_two",
    "round_robin",
    "longest_prefix",
)
BASELINE = "round_robin"


class SuiteError(Exception):
    """The run cannot continue. The text is for the user."""


class Replayed(NamedTuple):
    """One load. trace: `gen:...`, or the name of a file in the folder of traces; flags: of `sglang-router replay`."""

    name: str
    trace: str
    flags: tuple[str, ...]


def _load(name: str, trace: str, flags: str) -> Replayed:
    return Replayed(name, trace, tuple(flags.split()))


FOUR = "--workers 4 --cache-tokens 300000"
SCARCE = "--workers 4 --cache-tokens 48000"
LOADS = (
    _load("64 groups x 8", "gen:groups,requests=512,rate=16", FOUR),
    _load("64 groups x 16", "gen:groups,requests=1024,rate=16", FOUR),
    _load("64 groups x 8, scarce cache", "gen:groups,requests=512,rate=16", SCARCE),
    _load("64 groups x 16, scarce cache", "gen:groups,requests=1024,rate=16", SCARCE),
    _load("one hot prefix", "gen:hot-prefix,rate=20", FOUR),
    _load("short groups, long strangers", "gen:strangers,rate=8", FOUR),
    _load("four engines, one at 0.4x", "gen:groups,rate=16", f"{FOUR} --speeds 1,1,1,0.4"),
    _load("four engines at 0.85x", "gen:groups,rate=16", f"{FOUR} --speeds 0.85"),
    _load("sessions, one system prompt", "gen:sessions,rate=2.5", FOUR),
    _load("flash crowds", "gen:bursts,rate=10", FOUR),
    _load("join, leave, restart", "gen:groups,rate=16", f"{FOUR} --join 60 --restart 1@100 --leave 0@150"),
    _load("agents, 1 M, 64 live", AGENTS, "--workers 8 --cache-tokens 1000000 --live 64"),
    _load("agents, 2 M, 64 live", AGENTS, "--workers 8 --cache-tokens 2000000 --live 64"),
    _load("agents, 1 M, 128 live", AGENTS, "--workers 8 --cache-tokens 1000000 --live 128"),
    _load("agents, 2 M, 128 live", AGENTS, "--workers 8 --cache-tokens 2000000 --live 128"),
    _load("Mooncake synthetic", MOONCAKE, "--workers 8 --cache-tokens 307200 --prefill-tokens-per-s 16000"),
    _load("Azure conversations", AZURE, "--workers 8 --cache-tokens 300000"),
)

Figures = dict[str, dict[str, Any]]


def policies() -> list[str]:
    """Return those of `WANTED` that this version has."""
    found = []
    for label in WANTED:
        name, *options = label.split(":")
        if name in KINDS and all(option.replace("-", "_") in OPTIONS for option in options):
            found.append(label)
    return found


def loads(folder: Path | None, only: str) -> Iterator[Replayed]:
    """Give the loads that can be replayed here, with the paths of their traces."""
    for load in LOADS:
        if only not in load.name:
            continue
        if load.trace.startswith("gen:"):
            yield load
        elif folder is not None and (folder / load.trace).is_file():
            yield load._replace(trace=str(folder / load.trace))


def replay(load: Replayed, policy: str, quick: bool) -> Figures:
    """Return the figures of one load with one policy."""
    words = [sys.executable, "-m", "sglang_router", "replay", load.trace, *load.flags, "--policies", policy]
    words += [
        "--json",
        "--quiet",
        "--seeds",
        str(1 if quick else SEEDS),
        *(["--requests", str(QUICK)] if quick else []),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SuiteError(f"{load.name} with {policy}: {done.stderr.strip()}")
    figures: Figures = json.loads(done.stdout)["policies"][0]["figures"]
    print(f"{load.name}: {policy}", file=sys.stderr, flush=True)
    return figures


# -- tables -----------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def summary(rows: Sequence[tuple[Replayed, dict[str, Figures]]], names: Sequence[str], figure: str) -> str:
    """Return one table: a line for each load, a column for each policy; the best in bold."""
    lines = []
    for load, found in rows:
        means = {name: found[name][figure]["mean"] for name in names}
        best = max(means.values()) if figure == "hit" else min(means.values())
        shown = {name: f"{mean:.3f}" if figure == "hit" else seconds(mean) for name, mean in means.items()}
        lines.append([load.name, *(f"**{shown[name]}**" if means[name] == best else shown[name] for name in names)])
    return table(["load", *names], lines, True)


HEAD = (
    *("policy", "cached", "+-", "TTFT p50", "p90", "+-", "p99", "mean / bound", "ITL p99", "whole p90"),
    *("balance", "SLO", "failed"),
)


def details(load: Replayed, found: dict[str, Figures]) -> str:
    """Return the table of one load, folded, under the command that gives it."""
    lines = []
    for name, figures in found.items():
        mean = {key: figure["mean"] for key, figure in figures.items()}
        half = {key: figure["half_width"] or 0.0 for key, figure in figures.items()}
        lines.append(
            [
                name,
                f"{mean['hit']:.3f}",
                f"{half['hit']:.3f}",
                seconds(mean["ttft_p50"]),
                seconds(mean["ttft_p90"]),
                seconds(half["ttft_p90"]),
                seconds(mean["ttft_p99"]),
                f"{mean['ttft_regret']:.2f}",
                seconds(mean["itl_p99"]),
                seconds(mean["e2e_p90"]),
                f"{mean['balance']:.2f}",
                f"{mean['slo']:.1%}",
                f"{mean['failed']:.0f}",
            ]
        )
    words = " ".join((Path(load.trace).name, *load.flags))
    return (
        f"<details><summary>{load.name}</summary>\n\n`sglang-router replay {words} --seeds {SEEDS}`\n\n"
        f"{table(HEAD, lines, True)}\n\n</details>\n"
    )


def report(rows: Sequence[tuple[Replayed, dict[str, Figures]]], names: Sequence[str]) -> str:
    """Return all tables in Markdown."""
    return "\n".join(
        [
            "Cached tokens, of all prompt tokens:\n",
            summary(rows, names, "hit"),
            "\nTime to first token, p90:\n",
            summary(rows, names, "ttft_p90"),
            "\nWhole request, p90:\n",
            summary(rows, names, "e2e_p90"),
            "",
            *(details(load, found) for load, found in rows),
        ]
    )


def write(text: str) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SuiteError(f"{PAGE.name} has no markers for the tables")
    PAGE.write_text(before + BEGIN + text + END + after)


def run(options: argparse.Namespace) -> str:
    names, chosen = policies(), list(loads(options.traces, options.only))
    if not chosen:
        raise SuiteError(f"no load has {options.only!r} in its name")
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [[pool.submit(replay, load, name, options.quick) for name in names] for load in chosen]
        try:
            done = [dict(zip(names, (each.result() for each in row), strict=True)) for row in waiting]
        finally:
            pool.shutdown(cancel_futures=True)
    return report(list(zip(chosen, done, strict=True)), names)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/routing-suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=Path, help=f"folder with {AGENTS}, {MOONCAKE} and {AZURE}")
    parser.add_argument(
        "--quick", action="store_true", help="one seed and short loads; docs/routing.md stays unchanged"
    )
    parser.add_argument(
        "--only", default="", help="the loads whose name has this word; docs/routing.md stays unchanged"
    )
    parser.add_argument("--jobs", type=int, default=2, help="replays at a time [default: 2]")
    options = parser.parse_args()
    try:
        text = run(options)
        if not (options.quick or options.only):
            write(text)
    except SuiteError as error:
        print(f"routing-suite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrouting-suite: interrupted", file=sys.stderr)
        return 130
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
