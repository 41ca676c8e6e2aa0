"""The options of scripts/bench."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.reporting import ROOT

PLACE = ROOT / ".bench-venv"
LAST = PLACE / "last.json"
CORE_TARGETS, CORE_LOADS = "ours,reference,haproxy,direct", "sizes,streams"
QUICK_LOADS = "200B,4kB,16kB,streams-500"
CHANGE_TARGETS, CHANGE_LOADS = "ours,before", "200B,4kB,streams-500"


@dataclass(frozen=True)
class Options:
    """What to measure, how long, and what to show. `only` and `loads` are patterns; empty ones mean everything."""

    only: tuple[str, ...]
    loads: tuple[str, ...]
    rounds: int
    seconds: float | None
    minutes: float
    against: str
    memory: bool
    listing: bool
    source: Path | None
    json: Path
    markdown: bool
    goals: bool
    chart: Path | None
    docs: bool
    flags: tuple[str, ...]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="scripts/bench", description="Measure this router beside others.")
    what = made.add_argument_group("what is measured")
    what.add_argument("--core", action="store_true", help="this router, 0.3.2, HAProxy; sizes and streams; 12 minutes")
    what.add_argument("--quick", action="store_true", help="one round of 1 s of a few loads on the same: rough")
    what.add_argument("--only", metavar="TARGETS", help="such as ours,smg: names, or patterns of them")
    what.add_argument("--loads", metavar="NAMES", help="such as sizes,open-4kB,streams-*: names, groups, or patterns")
    what.add_argument("--against", metavar="REVISION", default="", help="beside this package as it was at a revision")
    what.add_argument("--memory", action="store_true", help="resident memory over a million distinct prompts instead")
    what.add_argument("--list", action="store_true", dest="listing", help="name all targets and loads, and end")
    how = made.add_argument_group("how long")
    how.add_argument("--rounds", type=int, help="of which medians are shown (default: 5)")
    how.add_argument("--seconds", type=float, help="of each load (default: what fits into --minutes, at most 3)")
    how.add_argument("--minutes", type=float, help="planned for the whole (default: 38; with --core 11)")
    shown = made.add_argument_group("what is shown")
    shown.add_argument("--from", type=Path, dest="source", metavar="FILE", help="show a former run; measure nothing")
    shown.add_argument("--json", type=Path, default=LAST, metavar="FILE", help=f"raw samples (default: {_short(LAST)})")
    shown.add_argument("--markdown", action="store_true", help="tables in Markdown")
    shown.add_argument("--targets", action="store_true", dest="goals", help="our goals, and whether they are reached")
    shown.add_argument("--chart", type=Path, metavar="FILE", help="draw the SVG")
    shown.add_argument("--docs", action="store_true", help="write tables and chart into docs/performance.md and .svg")
    made.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of this router; must come last")
    return made


def parse(words: Sequence[str]) -> Options:
    """Read the command line. Ends the process with status 2 if it is wrong."""
    reading = parser()
    given = reading.parse_args(words)
    only, loads, minutes = _defaults(given)
    rounds = given.rounds or (1 if given.quick else 5)
    seconds = given.seconds or (1.0 if given.quick else None)
    if rounds < 1 or (seconds or 1) <= 0 or (given.minutes or 1) <= 0:
        reading.error("--rounds, --seconds and --minutes must be above 0")
    return Options(
        only=_words(given.only or only),
        loads=_words(given.loads or loads),
        rounds=rounds,
        seconds=seconds,
        minutes=given.minutes or minutes,
        against=given.against,
        memory=given.memory,
        listing=given.listing,
        source=given.source,
        json=given.json.absolute(),
        markdown=given.markdown,
        goals=given.goals,
        chart=given.chart,
        docs=given.docs,
        flags=tuple(given.flags),
    )


def _defaults(given: argparse.Namespace) -> tuple[str, str, float]:
    """Return the targets, loads and minutes that the mode means; empty words mean all."""
    if given.against:
        return CHANGE_TARGETS, CHANGE_LOADS, 11
    if given.quick:
        return CORE_TARGETS, QUICK_LOADS, 11
    if given.core:
        return CORE_TARGETS, CORE_LOADS, 11
    return "", "", 38


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT))
