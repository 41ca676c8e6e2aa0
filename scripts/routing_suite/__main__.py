"""The command: runs what is asked for, keeps the figures, and shows the tables. `scripts/routing-suite` runs it."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from scripts.benchmark.processes import BenchError
from scripts.real_engines.engines import SetupError
from scripts.reporting import machine
from scripts.routing_suite import live, page, real
from scripts.routing_suite.replays import policies, replay, takes
from scripts.routing_suite.routers import Contender, contenders
from scripts.routing_suite.rows import AGENTS, AZURE, ENGINED, LIVED, MOONCAKE, Engined, Lived, SuiteError, replayed
from scripts.routing_suite.samples import FILE, PROCESSES, REAL, REPLAYS, About, Cell, Samples
from scripts.routing_suite.scripted import Chain, script

from sglang_router.replay.comparison import figure_of

QUICK = 40
"""Requests of each load with --quick and --processes."""
SEEDS = {REPLAYS: 3, PROCESSES: 1, REAL: 1}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_replays(options: argparse.Namespace, samples: Samples) -> None:
    """Replay the loads with each policy, some at a time. Raises: SuiteError."""
    chosen = list(replayed(options.traces, options.only))
    names = [name for name in policies() if options.routers in name]
    if not chosen or not names:
        raise SuiteError(f"no load has {options.only!r} in its name, or no policy {options.routers!r}")
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(replay, load, name, options.seeds, options.quick)
            for load in chosen
            for name in names
            if takes(load, name)
        ]
        try:
            for done in as_completed(runs):
                cell = done.result()
                samples.add(cell)
                say(f"{cell.load}: {cell.contender}")
        finally:
            pool.shutdown(cancel_futures=True)


def run_processes(options: argparse.Namespace, samples: Samples) -> None:
    """Run the loads through each router. Raises: SuiteError, BenchError."""
    chosen = [load for load in LIVED if options.only in load.name]
    with tempfile.TemporaryDirectory(prefix="routing-suite-") as folder:
        routers = routers_for(options, Path(folder), chosen)
        for load in chosen:
            trace = load.trace + (f",requests={QUICK}" if options.quick else "")
            scripts = [script(trace, seed) for seed in range(1, options.seeds + 1)]
            taking = [each for each in routers if each.takes(load)]
            for first in range(0, len(taking), options.jobs):
                for cell in measured(load, taking[first : first + options.jobs], scripts):
                    samples.add(cell)


def routers_for(options: argparse.Namespace, folder: Path, loads: Sequence[object]) -> list[Contender]:
    """Return the routers that are asked for and can be started here. Raises: SuiteError without any, or any load."""
    found = list(contenders(folder, options.routers))
    for missing in (each for each in found if isinstance(each, str)):
        say(f"left out: {missing}")
    routers = [each for each in found if isinstance(each, Contender)]
    if not loads or not routers:
        raise SuiteError(f"no load has {options.only!r} in its name, or no router {options.routers!r}")
    return routers


def run_engines(options: argparse.Namespace, samples: Samples) -> None:
    """Run the loads for real engines through each router. Raises: SuiteError, BenchError, SetupError, OSError."""
    chosen = [load for load in ENGINED if options.only in load.name]
    with tempfile.TemporaryDirectory(prefix="routing-suite-") as folder:
        routers = [each for each in routers_for(options, Path(folder), chosen) if "session" not in each.name]
        for load in chosen:
            loaded, began = os.getloadavg()[0], time.time()
            runs: list[list[real.Outcome]] = [[] for _ in routers]
            for number, outcome in real.run(load, routers, options.seeds, QUICK if options.quick else 0):
                runs[number].append(outcome)
                say(told(load, routers[number].name, outcome.figures))
            for router, outcomes in zip(routers, runs, strict=True):
                samples.add(merged(REAL, load, router, outcomes, loaded, began))


def told(load: Lived | Engined, name: str, figures: dict[str, float]) -> str:
    """Return one run in a line."""
    return (
        f"{load.name}: {name}: {figures['hit']:.3f} cached, TTFT p90 {figures['ttft_p90'] * 1000:.0f} ms, "
        f"{figures['failed']:.0f} of {figures['requests']:.0f} failed, {figures['wall']:.0f} s, "
        f"{figures['cpu_machine']:.0%} of the machine busy"
    )


def measured(load: Lived, routers: Sequence[Contender], scripts: Sequence[list[Chain]]) -> list[Cell]:
    """Return the figures of one load with some routers, side by side, over all seeds. Raises: BenchError."""
    loaded, began = os.getloadavg()[0], time.time()
    runs = [live.run(load, routers, chains) for chains in scripts]
    cells = [
        merged(PROCESSES, load, router, [of_all[number] for of_all in runs], loaded, began)
        for number, router in enumerate(routers)
    ]
    for cell in cells:
        say(told(load, cell.contender, {name: cell.mean(name) for name in cell.figures}))
    return cells


def merged(
    kind: str,
    load: Lived | Engined,
    router: Contender,
    runs: Sequence[tuple[dict[str, float], dict[str, int]]],
    loaded: float,
    began: float,
) -> Cell:
    """Return what the runs with all seeds gave."""
    why: dict[str, int] = {}
    for _, reasons in runs:
        for reason, count in reasons.items():
            why[reason] = why.get(reason, 0) + count
    means = {name: figure_of([figures[name] for figures, _ in runs]) for name in runs[0][0]}
    several = len(runs) > 1
    shown = {name: {"mean": each.mean, "half_width": each.half if several else None} for name, each in means.items()}
    return Cell(kind, load.name, router.name, len(runs), shown, why, loaded, began)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/routing-suite", description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", action="store_true", help="routers as processes, in real time")
    parser.add_argument("--engines", action="store_true", help="routers as processes, before real engines")
    parser.add_argument("--traces", type=Path, help=f"folder with {AGENTS}, {MOONCAKE} and {AZURE}")
    parser.add_argument("--only", default="", help="the loads whose name has this word")
    parser.add_argument("--routers", default="", help="the policies or routers whose name has this word")
    parser.add_argument("--seeds", type=int, help="runs of each [default: 3, with --processes 1]")
    parser.add_argument("--quick", action="store_true", help="one seed and short loads; nothing is kept")
    parser.add_argument("--docs", action="store_true", help="write docs/routing.md from what was kept; run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="replays, or routers, at a time [default: 2]")
    options = parser.parse_args(words)
    if options.engines and options.processes:
        parser.error("--engines and --processes are two runs")
    options.kind = kind = REAL if options.engines else PROCESSES if options.processes else REPLAYS
    options.seeds = 1 if options.quick else options.seeds or SEEDS[kind]
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be above 0")
    return options


_RUNS = {REPLAYS: run_replays, PROCESSES: run_processes, REAL: run_engines}


def run(options: argparse.Namespace, words: Sequence[str]) -> str:
    """Do what the options ask for; return the tables. Raises: SuiteError, BenchError, SetupError, OSError."""
    if options.docs:
        samples = Samples(FILE)
        page.write(samples)
        return ""
    kind = options.kind
    partly = bool(options.only or options.routers)
    with tempfile.TemporaryDirectory(prefix="routing-suite-") as folder:
        samples = Samples(Path(folder) / FILE.name if options.quick else FILE)
        if not partly:
            samples.forget(kind)
        command = shlex.join(["sh", "scripts/routing-suite", *words])
        samples.add(About(kind, command, f"{datetime.now(timezone.utc):%Y-%m-%d}", machine(())))
        _RUNS[kind](options, samples)
        if not (options.quick or partly):
            page.write(samples)
        return page.TEXTS[kind](samples)


def main(words: Sequence[str]) -> int:
    options, pressed = parse(words), threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)  # also if the parent process ignored SIGINT
    try:
        text = run(options, words)
        if pressed.is_set():  # Python loses an exception that comes while it forks or frees an object
            raise KeyboardInterrupt
    except (SuiteError, BenchError, SetupError, OSError) as error:
        say(f"routing-suite: {error}")
        return 2
    except KeyboardInterrupt:
        say("\nrouting-suite: interrupted")
        return 130
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
