"""Run the router under load and frequent faults for a long time, and check that nothing grows, leaks or gets slower.

The router gets 70 % of the load that it can sustain here, which is measured first. Clients check every answer, and no
prompt is sent twice. Several times a minute an engine dies, hangs or restarts with a cold cache, or the network fails.
Printed each minute: outcomes of the requests, times, memory, descriptors, the prefix tree; and, next to the p99 of the
calm part of the minute, the p99 of a few requests that go to an engine directly: a busy machine delays both. After the
warm-up, a line is fitted to each column (least squares); the run fails if one grows by more than its tolerance.

The tree takes in as much text as 10,000,000 prompts an hour of 200 bytes: as the engines here answer fewer requests,
each prompt is longer. `scripts/soak` (a shell script) prepares the environment and runs this.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.reliability.command import run, say
from scripts.reliability.faults import CUT, FAULTS, Fault
from scripts.reliability.field import Field, field
from scripts.reliability.load import Load, Tally
from scripts.reliability.page import write_tables
from scripts.reliability.slopes import Tolerance, growth
from scripts.reporting import machine, table

CHURN = 10_000_000 * 200 / 3600
"""Bytes of new text per second."""
SHARE = 0.7
CLIENTS = 16
"""Clients that send requests all the time, to measure the sustainable load."""
PACED_CLIENTS = 96
"""Clients that keep the rate: enough that some are free while a fault delays others."""
CONTROL = 20.0
"""Requests per second that go to an engine directly. Their delay is caused by the machine, not by the router."""
TOKENS = (2, 12)
SIZES = (200, 12_000)
"""Least and most bytes of a prompt."""
FAULT_LASTS = 7.0
CALM_SHARE = 0.35
"""Share of each minute, at its end, that is without faults. The slope is fitted to the p99 of this part."""
RECOVERS_IN = 2.0
ENGINE = ("--speed", "20")
ROUTER = ("--max-tree-size", str(4 << 20))
OUTAGES = ("nothing", "all workers gone and back")
ALLOWED = (*CUT, "cut aborted by the engine")
HEAD = (
    *(
        "minute",
        "requests",
        "answered",
        "failed",
        "p50 ms",
        "p99 ms",
        "calm p99 ms",
        "direct p99 ms",
        "gap s",
        "CPU us",
    ),
    *("RSS MB", "fds", "tree MB", "tree entries"),
)
TOLERANCES = (
    Tolerance("RSS MB", share=0.05, least=6.0),
    Tolerance("fds", share=0.1, least=10.0),
    Tolerance("calm p99 - direct p99 ms", share=0.5, least=50.0),
    Tolerance("CPU us", share=0.25, least=20.0),
    Tolerance("tree MB", share=0.05, least=0.5),
    Tolerance("tree entries", share=0.1, least=200.0),
)
"""How much each column may grow over the run, after the warm-up."""


@dataclass
class Minute:
    """The figures of one window of time, and those at its end. Times in seconds."""

    number: float
    all: Tally
    calm: Tally
    direct: Tally  # during the same time as `calm`
    cpu: float  # of the router, per request
    megabytes: float
    fds: int
    tree: float
    entries: float

    def value(self, column: str) -> float:
        values = {
            "RSS MB": self.megabytes,
            "fds": float(self.fds),
            "CPU us": self.cpu * 1e6,
            "calm p99 - direct p99 ms": (self.calm.quantile(0.99) - self.direct.quantile(0.99)) * 1e3,
            "tree MB": self.tree / 1e6,
            "tree entries": self.entries,
        }
        return values[column]

    def cells(self) -> list[str]:
        bad = ", ".join(f"{count} {what}" for what, count in sorted(self.all.bad.items())) or "0"
        times = [self.all.quantile(0.5), self.all.quantile(0.99), self.calm.quantile(0.99), self.direct.quantile(0.99)]
        last = [*(f"{each * 1e3:.1f}" for each in times), f"{self.all.gap:.2f}", f"{self.cpu * 1e6:.0f}"]
        numbers = [f"{self.number:g}", f"{self.all.requests:,}", f"{self.all.answered:,}", bad]
        tree = [f"{self.tree / 1e6:.2f}", f"{self.entries:,.0f}"]
        return [*numbers, *last, f"{self.megabytes:.1f}", str(self.fds), *tree]


def sustainable(place: Field, port: Callable[[], int], size: int, seconds: float) -> float:
    """Measure the requests per second when every client sends the next request as soon as it has its answer."""
    load = place.load(port, clients=CLIENTS, size=size, tokens=TOKENS)
    load.start()
    time.sleep(seconds)
    load.stop()
    return load.tally().answered / seconds


def measured(place: Field, port: Callable[[], int], seconds: float) -> tuple[float, int]:
    """Return the sustainable rate, and the size of prompts at which it gives the wanted bytes per second. Larger
    prompts lower the rate, so it is searched for in three steps."""
    size, rate = 2000, 0.0
    for _ in range(3):
        rate = max(sustainable(place, port, size, seconds), 1.0)
        size = int(min(max(CHURN / (SHARE * rate), SIZES[0]), SIZES[1]))
    return rate, size


def window(place: Field, load: Load, control: Load, faults: list[Fault], number: float, seconds: float) -> Minute:
    """Cause some faults, stay calm for a while, then record the router's figures."""
    router = place.router
    assert router is not None
    began, cpu = time.monotonic(), cpu_of(router.process.pid)
    lasts = min(FAULT_LASTS, 0.3 * seconds)
    while time.monotonic() + lasts < began + (1 - CALM_SHARE) * seconds:
        fault = faults.pop(0)
        faults.append(fault)
        fault.strike(place, lasts)
        place.mend()
    calm = time.monotonic() + RECOVERS_IN
    time.sleep(max(RECOVERS_IN, began + seconds - time.monotonic()))
    facts, samples, end = router.facts(), router.samples(), time.monotonic()
    held = samples.total("sgl_router_tree_held_bytes")
    entries = samples.total("sgl_router_tree_entries")
    tally = load.tally(began, end)
    used = (cpu_of(router.process.pid) - cpu) / max(1, tally.requests)
    calm_ones = load.tally(calm, end), control.tally(calm, end)
    return Minute(number, tally, *calm_ones, used, facts.megabytes, facts.fds, held, entries)


def cpu_of(pid: int) -> float:
    """Return the seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def verdict(minutes: Sequence[Minute]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table of slopes, and what is wrong."""
    warm = max(1, round(0.2 * len(minutes)))
    settled = minutes[warm:]
    rows, wrong = [], []
    for tolerance in TOLERANCES:
        values = [minute.value(tolerance.column) for minute in settled]
        grown, allowed = growth(values), tolerance.of(values)
        good = grown <= allowed
        rows.append([tolerance.column, f"{grown:+.2f}", f"{allowed:.2f}", "flat" if good else "GROWS"])
        if not good:
            wrong.append(f"{tolerance.column} grew by {grown:.2f}, more than {allowed:.2f}")
    for minute in minutes:
        for what, count in minute.all.bad.items():
            if not what.startswith(ALLOWED):
                wrong.append(f"minute {minute.number:g}: {count} x {what}")
    return rows, wrong


def soak(options: argparse.Namespace, folder: Path) -> tuple[str, list[Minute], list[str]]:
    """Run the soak. Return the first measurement in words, the minutes, and what was wrong at the end."""
    minutes: list[Minute] = []
    lot = random.Random(options.seed)
    faults = [fault for fault in FAULTS if fault.name not in OUTAGES]
    lot.shuffle(faults)
    seconds = min(60.0, max(12.0, options.minutes * 60 / 10))
    with field(folder, options.seed, ENGINE, ROUTER) as place:
        router, watch = place.router, place.watch
        assert router is not None
        assert watch is not None
        most, size = measured(place, lambda: router.port, options.measure)
        rate = options.rate or SHARE * most
        said = f"sustained {most:.0f} requests/s with prompts of {size:,} bytes; soaked with {rate:.0f}/s."
        say(said)
        place.clients = PACED_CLIENTS
        load = place.load(lambda: router.port, rate=rate, size=size, tokens=TOKENS)
        control = place.load(lambda: place.engines[0].port, rate=CONTROL, size=size, tokens=TOKENS)
        load.start()
        control.start()
        try:
            end = time.monotonic() + options.minutes * 60
            while time.monotonic() < end:
                number = round((len(minutes) + 1) * seconds / 60, 2)
                minutes.append(window(place, load, control, faults, number, seconds))
                say("  ".join(minutes[-1].cells()))
        finally:
            load.stop()
            control.stop()
        watch.level = watch.level._replace(megabytes=minutes[len(minutes) // 5].megabytes)
        wrong = watch.settle()
    return said, minutes, wrong


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and faults (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0, help="requests/s, instead of 70 %% of what is measured")
    parser.add_argument("--measure", type=float, default=5, help="seconds for each of three measurements before")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/reliability.md")
    return parser.parse_args()


def show(options: argparse.Namespace, folder: Path) -> bool:
    """Do the whole run and print its tables; return whether nothing was wrong."""
    started = machine(["options of scripts/reliability/field.py"])
    said, minutes, wrong = soak(options, folder)
    slopes, more = verdict(minutes)
    cells = [minute.cells() for minute in minutes]
    head = ("over the run", "grown by", "tolerance", "verdict")
    both = [table(HEAD, cells, markdown=m) + "\n\n" + table(head, slopes, markdown=m) for m in (False, True)]
    print(both[0])
    if options.write:
        write_tables("soak", f"{started} {said}\n\n{both[1]}")
    for what in wrong + more:
        say(f"WRONG  {what}")
    return not wrong and not more


def main() -> int:
    options = parse()
    return run("soak", lambda folder: show(options, folder))


if __name__ == "__main__":
    sys.exit(main())
