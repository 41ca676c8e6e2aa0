"""Cause faults, one after the other, while a load checks every answer; check invariants after each of them.

Invariants: every request got exactly one answer, or an end that shows that it is incomplete; no byte of a stream is
missing or duplicated; loads are 0 again; descriptors and tasks are back to their level; memory is flat; the bytes that
the prefix tree reports equal the sum over its edges. `scripts/chaos` (a shell script) prepares the environment and runs
this.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.reliability.command import run, say
from scripts.reliability.faults import CUT, FAULTS, NOBODY, Fault
from scripts.reliability.field import Field, ReliabilityError, field
from scripts.reliability.load import Load, Tally
from scripts.reliability.own import OWN_FAULTS, OwnFault
from scripts.reliability.page import write_tables
from scripts.reporting import machine, table

WARM_UP = 4.0
IN_FLIGHT = 2.0
"""Clients per request a second: enough clients stay free while others wait for an engine that hangs."""
SLICE = (
    *("kill -9", "SIGSTOP, SIGCONT", "connections refused", "connections reset", "black hole", "flapping"),
    *("all workers gone and back", "rolling drain with streams", "add/remove storm"),
    *("full disk for logs", "256 descriptors", "SIGTERM under load"),
)
"""The faults of `--slice`, for the test suite."""
HEAD = ("fault", "requests", "answered", "failed", "longest gap s", "router MB", "verdict")


@dataclass
class Row:
    """The outcome of one fault."""

    fault: str
    requests: int
    answered: int
    bad: dict[str, int]
    gap: float
    megabytes: float
    wrong: list[str]

    def cells(self) -> list[str]:
        bad = ", ".join(f"{count} {what}" for what, count in sorted(self.bad.items())) or "0"
        verdict = "holds" if not self.wrong else "BROKEN"
        gap, memory = f"{self.gap:.2f}", f"{self.megabytes:.0f}"
        return [self.fault, f"{self.requests:,}", f"{self.answered:,}", bad, gap, memory, verdict]


def row_of(name: str, allowed: Sequence[str], tally: Tally, limit: float, megabytes: float, wrong: list[str]) -> Row:
    """Return the row of a fault. Its verdict: `wrong` so far, and everything that clients saw but must not see."""
    told = [f"{n} x {what}" for what, n in tally.bad.items() if not any(what.startswith(one) for one in allowed)]
    if tally.gap > limit:
        told.append(f"no request was answered for {tally.gap:.1f} s")
    if not tally.answered:
        told.append("no request was answered")
    return Row(name, tally.requests, tally.answered, dict(tally.bad), tally.gap, megabytes, told + wrong)


def strike(place: Field, fault: Fault, seconds: float, patience: float) -> Row:
    """Cause one fault of those that share the same router, under load; return its row."""
    router, watch = place.router, place.watch
    assert router is not None
    assert watch is not None
    load = place.load(lambda: router.port)
    load.start()
    wrong = []
    try:
        fault.strike(place, seconds)
    except AssertionError as error:
        wrong.append(str(error)[:500])
    load.stop()
    tally = load.tally()
    place.mend()
    wrong += watch.settle()
    memory = watch.router.facts().megabytes
    return row_of(fault.name, allowed_of(place, fault), tally, place.outage + patience, memory, wrong)


def allowed_of(place: Field, fault: Fault) -> tuple[str, ...]:
    """With --resume-streams, no stream may break as long as one engine is left."""
    if "--resume-streams" not in place.flags or NOBODY[0] in fault.allowed:
        return fault.allowed
    return tuple(what for what in fault.allowed if what not in CUT)


def strike_own(place: Field, fault: OwnFault, seconds: float, patience: float) -> Row:
    seen = fault.strike(place, seconds)
    tally = seen.load.tally()
    return row_of(fault.name, fault.allowed, tally, place.outage + patience, seen.megabytes, seen.wrong)


def strike_all(options: argparse.Namespace, names: Sequence[str], folder: Path) -> list[Row]:
    """Run all selected faults; print each as it is over."""
    rows = []
    shared = {fault.name: fault for fault in FAULTS}
    own = {fault.name: fault for fault in OWN_FAULTS}
    with field(folder, options.seed, router=options.flags) as place:
        place.rate, place.clients = options.rate, int(IN_FLIGHT * options.rate)
        warm_up(place)
        for number, name in enumerate(names):
            place.seed, place.outage = options.seed + number, 0.0
            if name in shared:
                row = strike(place, shared[name], options.seconds, options.patience)
            else:
                row = strike_own(place, own[name], options.seconds, options.patience)
            rows.append(row)
            say("  ".join(row.cells()))
            for what in row.wrong:
                say(f"    {what}")
    return rows


def warm_up(place: Field) -> None:
    """Fill caches and warm up code. What the router uses afterwards is the level it must return to."""
    router, watch = place.router, place.watch
    assert router is not None
    assert watch is not None
    load: Load = place.load(lambda: router.port)
    load.start()
    time.sleep(WARM_UP)  # the duration of the warm-up, not a wait for an event
    load.stop()
    if wrong := watch.settle():
        raise ReliabilityError("not at rest after the warm-up: " + "; ".join(wrong))
    watch.rebase()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all faults together (default: %(default)s)")
    parser.add_argument("--only", metavar="FAULT", help="faults whose name holds this word")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and of what clients do (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=50, help="requests a second (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=5, help="longest gap in service, in s (default: %(default)s)")
    parser.add_argument("--slice", action="store_true", help="the important faults, 4 s each: for the test suite")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of the router, more; must come last")
    options = parser.parse_args()
    names = [fault.name for fault in (*FAULTS, *OWN_FAULTS)]
    options.faults = [n for n in names if (options.only or "") in n and (not options.slice or n in SLICE)]
    if not options.faults:
        parser.error(f"--only {options.only}: no such fault; there are {', '.join(names)}")
    options.seconds = 4.0 if options.slice else max(4.0, options.minutes * 60 / len(options.faults) - 5.0)
    return options


def show(options: argparse.Namespace, folder: Path) -> bool:
    """Run all faults and print their table; return whether every promise held."""
    started = machine(["options of scripts/reliability/field.py", *options.flags])
    rows = strike_all(options, options.faults, folder)
    cells = [row.cells() for row in rows]
    print(table(HEAD, cells, markdown=False))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows]))
    if options.write:
        write_tables("chaos", f"{started} {options.seconds:.0f} s a fault.\n\n{table(HEAD, cells, markdown=True)}")
    return not any(row.wrong for row in rows)


def main() -> int:
    options = parse()
    return run("chaos", lambda folder: show(options, folder))


if __name__ == "__main__":
    sys.exit(main())
