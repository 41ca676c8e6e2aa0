"""Measure goodput under overload: requests answered in time per second, as the offered load grows.

    clients that do not wait for each other ──> router ──> 2 built-in engines, 8 requests at a time each

1. The capacity is the throughput of a closed loop. The sustainable load (1x) is the largest part of it at which,
   without any limits, 99 of 100 requests that arrive at random (a Poisson process) are answered in time.
2. 0.5x to 5x are offered to a router with limits, which follow from the goal and that rate (`limits`), then to a router
   without limits.

In time means: the first token within two seconds, and the end of the stream within four, when the client disconnects.
Only requests that arrive after a warm-up count, so that a queue has had the time to grow. `scripts/overload` (a shell
script) runs it.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.reporting import table

from arrivals import Answer, keep_busy, offer, schedule
from engines import engine_processes
from routers import RouterProcess, ask, router_process
from sglang_router import __version__

PAGE = Path(__file__).resolve().parents[1] / "docs" / "overload.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"

GOAL = 2.0
"""Seconds to the first token."""
PATIENCE = 4.0
"""Seconds after which a client disconnects."""
WAIT = 1.5
"""Seconds that a request may be queued: the goal minus the time that an engine needs for the first token."""
ENGINES = 2
BATCH = 8
ENGINE = ("--max-running-requests", str(BATCH), "--decode-base-ms", "16")
PARTS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Shares of the capacity that are tried for the sustainable load."""
FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
NEEDED = 0.9
"""Least goodput at 3x, as a share of that at 1x."""
SETTLES_WITHIN = 30.0
WIDTH = 50
HEAD = (
    *("load", "limits", "offered/s", "goodput/s", "of 1x", "first token p50 ms", "p99 ms"),
    *("late", "429", "408", "Retry-After s"),
)


class OverloadError(Exception):
    """The run cannot continue. The text is for the user."""


@dataclass(frozen=True)
class Length:
    """Seconds of a measurement: of the warm-up, and of the part that counts."""

    warm_up: float
    counted: float


@dataclass
class Row:
    """The result of one load. Rates per second, times in seconds; the counts are requests."""

    factor: float
    limited: bool
    offered: float
    goodput: float
    answers: list[Answer]

    @property
    def firsts(self) -> list[float]:
        """Times to first token of the requests that were answered in time, sorted."""
        return sorted(answer.first for answer in self.answers if answer.within(GOAL))

    @property
    def refusals(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status in (408, 429)]

    @property
    def late(self) -> int:
        """Streams that began late, or whose client disconnected before their end."""
        return sum(not answer.within(GOAL) and answer.status in (0, 200) for answer in self.answers)

    def cells(self, one: float) -> list[str]:
        """`one`: the goodput at 1x with the same limits."""
        statuses = Counter(answer.status for answer in self.refusals)
        again = sorted({int(answer.retry_after or 0) for answer in self.refusals})
        firsts = self.firsts
        places = [int(share * (len(firsts) - 1)) for share in (0.5, 0.99)] if firsts else []
        middle, most = [f"{firsts[place] * 1e3:,.0f}" for place in places] or ["-", "-"]
        return [
            f"{self.factor:g}x",
            "yes" if self.limited else "none",
            f"{self.offered:.1f}",
            f"{self.goodput:.1f}",
            f"{self.goodput / one:.0%}",
            middle,
            most,
            str(self.late),
            str(statuses[429]),
            str(statuses[408]),
            "-".join(map(str, sorted({again[0], again[-1]}))) if again else "",
        ]


def limits(rate: float) -> tuple[str, ...]:
    """Return the options that keep the goal at this rate of requests per second."""
    return (
        *("--max-running-per-worker", str(BATCH)),
        *("--queue-timeout-secs", f"{WAIT:g}"),
        *("--queue-size", str(round(WAIT * rate))),
    )


# -- measurements ------------------------------------------------------------------------------------------------------


def measure(
    router: RouterProcess, urls: Sequence[str], factor: float, rate: float, length: Length, limited: bool
) -> Row:
    """Offer `rate`, then wait until no request is left in the engines."""
    lot = random.Random(f"{factor}")  # the same requests with limits and without
    everything = offer(router.url, schedule(rate, length.warm_up + length.counted, lot), PATIENCE)
    answers = [answer for answer in everything if answer.at >= length.warm_up]
    row = Row(factor, limited, len(answers) / length.counted, 0.0, answers)
    row.goodput = len(row.firsts) / length.counted
    strange = {answer.status for answer in answers} - {0, 200, 408, 429}
    if strange:
        raise OverloadError(f"answers with status {', '.join(map(str, sorted(strange)))}:\n{router.log()[-2000:]}")
    deadline = time.monotonic() + SETTLES_WITHIN
    while not all(idle(url) for url in urls):
        if time.monotonic() > deadline:
            raise OverloadError(f"the engines still have requests {SETTLES_WITHIN:g} s after the last client left")
        time.sleep(0.05)
    return row


def idle(url: str) -> bool:
    return not any(load["num_reqs"] for load in ask(url, "GET", "/get_load").json())


def sustainable(router: RouterProcess, urls: Sequence[str], length: Length, say: Callable[[str], None]) -> float:
    """Return the requests per second that the engines can answer in time when requests arrive at random."""
    seconds = length.warm_up + length.counted / 2
    answers = keep_busy(router.url, 2 * ENGINES * BATCH, seconds, PATIENCE)  # twice, so that no engine is ever idle
    capacity = sum(answer.whole and answer.at >= 1 for answer in answers) / (seconds - 1)
    say(f"a closed loop gets {capacity:.1f} requests/s")
    for part in PARTS:
        row = measure(router, urls, part, part * capacity, length, False)
        share = len(row.firsts) / max(len(row.answers), 1)
        say(f"{row.offered:.1f} requests/s by chance: {share:.1%} in time")
        if share >= 0.99:
            return part * capacity
    raise OverloadError("not even half of the capacity is answered in time: the machine is too busy, or too slow")


def run(length: Length, say: Callable[[str], None]) -> tuple[float, list[Row]]:
    """Measure the sustainable rate, and a row for each load: with limits, then without."""
    common = ("--disable-access-log", "--prometheus-port", "0")
    rows = []
    with engine_processes(ENGINES, *ENGINE) as urls:
        with router_process(urls, *common) as router:
            rate = sustainable(router, urls, length, say)
        for limited in (True, False):
            with router_process(urls, *common, *(limits(rate) if limited else ())) as router:
                for factor in FACTORS:
                    row = measure(router, urls, factor, factor * rate, length, limited)
                    say(f"{factor:g}x, {'limits' if limited else 'no limits'}: {row.goodput:.1f}/s in time")
                    rows.append(row)
    return rate, rows


# -- tables ------------------------------------------------------------------------------------------------------------


def goodput_at(rows: Sequence[Row], factor: float, limited: bool) -> float:
    return next(row.goodput for row in rows if row.factor == factor and row.limited == limited)


def curve(rows: Sequence[Row]) -> str:
    """Draw a bar for each row; a full line is the largest goodput."""
    most = max(row.goodput for row in rows)
    lines = []
    for factor in FACTORS:
        for limited, label, mark in ((True, f"{factor:g}x", "#"), (False, "", ".")):
            goodput = goodput_at(rows, factor, limited)
            lines.append(f"{label:>5} {mark * round(WIDTH * goodput / most):<{WIDTH}} {goodput:5.1f}")
    return "\n".join(["goodput in requests/s by load:  # with limits  . without", "", *lines])


def report(rate: float, rows: Sequence[Row]) -> str:
    """Return figures, table and curve in Markdown."""
    cells = [row.cells(goodput_at(rows, 1.0, row.limited)) for row in rows]
    flags = f"{' '.join(ENGINE)}` each; limits: `{' '.join(limits(rate))}"
    facts = f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {__version__}"
    return (
        f"Sustainable: {rate:.1f} requests/s. {ENGINES} engines, `{flags}`. {facts}.\n\n"
        f"{table(HEAD, cells, True)}\n\n```\n{curve(rows)}\n```\n"
    )


def write(text: str) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise OverloadError(f"{PAGE.name} has no markers for the table")
    PAGE.write_text(before + BEGIN + text + END + after)


def faults(rows: Sequence[Row]) -> list[str]:
    """Return what is wrong."""
    found = []
    share = goodput_at(rows, 3.0, True) / max(goodput_at(rows, 1.0, True), 1e-9)
    if share < NEEDED:
        found.append(f"goodput at 3x is {share:.0%} of that at 1x, which is less than {NEEDED:.0%}")
    mute = sum(not refusal.retry_after for row in rows for refusal in row.refusals)
    if mute:
        found.append(f"{mute} error answers have no Retry-After")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/overload", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short measurements; docs/overload.md stays unchanged")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `finally` ends engines and router
    length = Length(3.0, 4.0) if options.quick else Length(5.0, 12.0)
    try:
        rate, rows = run(length, lambda line: print(line, file=sys.stderr, flush=True))
        text = report(rate, rows)
        if not options.quick:
            write(text)
    except (OverloadError, AssertionError) as error:
        print(f"overload: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\noverload: interrupted", file=sys.stderr)
        return 130
    print(text)
    wrong = faults(rows)
    for fault in wrong:
        print(f"overload: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
