"""`sglang-router replay`: read the options, run each policy with each seed, and show what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_router.errors import ConfigError
from sglang_router.replay.comparison import Row
from sglang_router.replay.options import Contender, ReplayOptions, parse_options
from sglang_router.replay.report import report
from sglang_router.replay.result import Result
from sglang_router.replay.simulation import Simulation
from sglang_router.replay.sources import load_of
from sglang_router.replay.table import as_json, table

_SHOW_EVERY = 1.0


class Progress:
    """One line on standard error about the run that goes on, if that is a terminal."""

    def __init__(self, quiet: bool) -> None:
        self._on = not quiet and sys.stderr.isatty()
        self._next = time.monotonic() + _SHOW_EVERY

    def of(self, title: str) -> Callable[[float, int], None]:
        """Return what a simulation calls with the virtual time and the number of ended requests."""

        def watch(now: float, ended: int) -> None:
            if self._on and time.monotonic() >= self._next:
                self._next = time.monotonic() + _SHOW_EVERY
                sys.stderr.write(f"\r{title}: {now:,.0f} s, {ended:,} requests ended \x1b[K")
                sys.stderr.flush()

        return watch

    def clear(self) -> None:
        """Remove the line."""
        if self._on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def main(argv: Sequence[str], prog: str = "sglang-router replay") -> int:
    """Run the command; return its exit status. Raises: ConfigError."""
    options = parse_options(argv, prog)
    progress = Progress(options.quiet)
    try:
        rows = compare(options, progress)
    finally:
        progress.clear()
    if options.report:
        _write(Path(options.report), report(options.trace, options.about, rows))
    print(as_json(options.trace, rows) if options.json else table(rows), end="")
    if not options.quiet:
        requests = sum(len(run.served) for row in rows for run in row.runs)
        wall = sum(run.wall for row in rows for run in row.runs)
        print(f"{requests:,} requests in {wall:.1f} s: {requests / (wall or 1.0):,.0f} per second", file=sys.stderr)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"--report {path}: cannot be written: {error.strerror}") from None


def compare(options: ReplayOptions, progress: Progress) -> list[Row]:
    """Run each policy with each seed."""
    rows = []
    for contender in options.contenders:
        runs = [_run(options, contender, options.seed + n, progress) for n in range(options.seeds)]
        rows.append(Row(contender.label, runs, options.slo_ttft, options.slo_itl))
    return rows


def _run(options: ReplayOptions, contender: Contender, seed: int, progress: Progress) -> Result:
    load = load_of(options, seed)
    watch = progress.of(f"{contender.label}, seed {seed}")
    began = time.perf_counter()
    simulation = Simulation(options.setup(contender.args, load.page), load, contender.kind, seed, watch)
    result = simulation.run()
    result.wall = time.perf_counter() - began
    return result
