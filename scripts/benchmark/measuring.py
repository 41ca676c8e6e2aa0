"""Carries out the plan: starts the targets of each room, puts the loads on them, and collects the samples."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.benchmark import plan, tree
from scripts.benchmark.clients import Natives
from scripts.benchmark.loads import BY_NAME, GROUPS, Load, Room, matches, selected, unknown
from scripts.benchmark.options import Options
from scripts.benchmark.processes import BenchError, Processes, Server, say
from scripts.benchmark.results import Results, Sample
from scripts.benchmark.targets import DIRECT, OURS, TARGETS, Found, find, wanted
from scripts.reporting import machine

from sglang_router.words import counted

WARM_UP = 0.5  # seconds
LATE = 1.03
"""By which the planned minutes may be exceeded; then rounds are left out."""


@dataclass
class Measuring:
    """One run. `found` are the targets that can be started; `direct`: also measure the workers without a router."""

    options: Options
    natives: Natives
    processes: Processes
    found: list[Found]
    direct: bool

    def run(self, results: Results, loads: Sequence[Load]) -> None:
        """Measure everything; results are written to the file of --json after each room. Raises: BenchError."""
        names = list(results.targets)
        planned = plan.planned_seconds(loads, names, results.rounds, self.takes, results.seconds)
        say(
            f"{counted(len(loads), 'load')} on {counted(len(names), 'target')}, {counted(results.rounds, 'round')} of "
            f"{results.seconds:g} s: about {planned / 60:.1f} minutes"
        )
        limit = math.inf if self.options.seconds else max(self.options.minutes * 60, planned) * LATE
        progress = plan.Progress(planned, time.monotonic(), limit)
        for room, those in plan.rooms(loads):
            self.run_room(results, room, those, progress)
            results.write(self.options.json)

    def run_room(self, results: Results, room: Room, loads: Sequence[Load], progress: plan.Progress) -> None:
        """Measure the loads of a room; rounds for which the time does not suffice are left out. Raises: BenchError."""
        workers, ports = self.natives.workers(self.processes, room)
        servers = {each.target.name: server for each in self.found if (server := self.started(each, ports, loads))}
        if self.direct:
            servers[DIRECT] = workers
        ends = progress.done + plan.planned_seconds(loads, [*servers], results.rounds, self.takes, results.seconds)
        self.warm_up(servers, loads)
        progress.done += plan.fixed_seconds(loads, [*servers])
        found = plan.steps(loads, [*servers], results.rounds, self.takes)
        for number, steps in itertools.groupby(found, lambda step: step.round):
            those = list(steps)
            coming = sum(plan.step_seconds(step.load, results.seconds) for step in those)
            if number > 1 and not progress.allows(time.monotonic(), coming, ends):
                say(f"left out, to end in time: rounds from {number} on in front of {room.workers} workers")
                break
            for step in those:
                self.take(results, step, servers[step.target], progress)
        progress.done = ends
        self.processes.stack.close()

    def warm_up(self, servers: Mapping[str, Server], loads: Sequence[Load]) -> None:
        """Put the lightest load on each target, so that code and connections are warm."""
        for name, server in servers.items():
            lightest = min((load for load in loads if self.takes(name, load)), key=lambda load: load.amount * load.size)
            self.attempt(lightest, server, WARM_UP, 0)

    def take(self, results: Results, step: plan.Step, server: Server, progress: plan.Progress) -> None:
        """Take one sample, and say so. Raises: BenchError."""
        got = self.attempt(step.load, server, results.seconds, step.seed)
        progress.done += plan.step_seconds(step.load, results.seconds)
        if got is None:
            return
        results.add(step.load.name, step.target, got)
        minutes, seconds = divmod(round(progress.left(time.monotonic())), 60)
        say(
            f"{minutes}:{seconds:02} left, round {step.round}/{results.rounds}: {step.load.label}: {step.target}: "
            f"{got.rate:,.0f}/s, p99 {got.p99 / 1e3:.2f} ms, CPU {got.cpu:.1f} us"
        )

    def attempt(self, load: Load, server: Server, seconds: float, seed: int) -> Sample | None:
        """Put a load on a target once; None, with a line that says why, if that fails with one that is not ours.

        Raises: BenchError, if it fails with this router.
        """
        try:
            return sample(self.natives, load, server, seconds, seed)
        except BenchError as error:
            if any(each.target.source for each in self.found if each.target.name == server.name):
                raise
            say(f"no sample: {error}")
            return None

    def started(self, each: Found, ports: Sequence[int], loads: Sequence[Load]) -> Server | None:
        """Start a target; None, with a line that says why, if it is not one of ours and does not serve."""
        if not any(each.target.takes_load(load) for load in loads):
            return None
        try:
            return each.start(self.processes, ports)
        except BenchError as error:
            if each.target.source:
                raise
            say(f"left out in front of {len(ports)} workers: {error}")
            return None

    def takes(self, name: str, load: Load) -> bool:
        return all(each.target.takes_load(load) for each in self.found if each.target.name == name)


def sample(natives: Natives, load: Load, target: Server, seconds: float, seed: int) -> Sample:
    """Put a load on a target once. Raises: BenchError."""
    with contextlib.ExitStack() as stack:
        open_ = stack.enter_context(natives.idle(target, load.idle, seed)) if load.idle else 0
        before = target.cpu()
        told = natives.load(load, target, seconds, seed)
        cpu = target.cpu() - before
        memory = target.memory()
    return Sample(
        count=told[load.unit],
        rate=told["rate"],
        p50=told["p50_us"],
        p99=told["p99_us"],
        p999=told["p999_us"],
        cpu=0.0 if target.name == DIRECT else cpu * 1e6 / max(told[load.unit], 1),
        memory=0.0 if target.name == DIRECT else memory,
        errors=told["errors"] + load.idle - open_,
    )


def check_names(options: Options) -> None:
    """Raises: BenchError if --loads or --only names something that is not in the tables."""
    loads = [*BY_NAME, *(group.name for group in GROUPS), tree.NAME]
    targets = [*(target.name for target in TARGETS), DIRECT]
    for flag, patterns, names in (("--loads", options.loads, loads), ("--only", options.only, targets)):
        if strange := unknown(patterns, names):
            raise BenchError(f"{flag}: nothing is called {', '.join(strange)}; there are {', '.join(names)}")


def measure(options: Options, processes: Processes) -> Results:
    """Measure what the options ask for. Raises: BenchError, also if there is nothing to measure."""
    check_names(options)
    loads, with_tree = selected(options.loads), matches(options.loads, tree.NAME)
    about = machine(options.flags)
    found = []
    for target in wanted(options):
        got = find(target, options, processes.folder)
        if isinstance(got, str):
            say(f"left out: {target.name}: {got}")
        else:
            found.append(got)
    direct = matches(options.only, DIRECT)
    if not found and not direct:
        raise BenchError("none of these targets is there")
    natives = Natives(processes.folder / "native").build()
    run = Measuring(options, natives, processes, found, direct)
    titles = {each.target.name: each.title for each in found} | ({DIRECT: "no router"} if direct else {})
    fitting = plan.fitting_seconds(loads, [*titles], options.rounds, run.takes, options.minutes)
    results = Results(about, options.rounds, options.seconds or fitting, titles)
    run.run(results, loads)
    if with_tree and OURS in titles:
        say("the prefix tree by itself")
        results.tree = tree.measured()
        results.write(options.json)
    return results
