"""Measures this router beside the reference (sglang-router 0.3.2, in Rust), HAProxy, and no router at all.

    load or streams ──> target ──> worker (4 ports)      native clients and workers (scripts/native), all on loopback
          |                |
      rates, delays    CPU time and memory of its whole session, from /proc

`scripts/bench` (a shell script) prepares the environments and runs this. All targets of a part run at the same time,
and are measured one after the other, round by round, in an order that rotates: a disturbance of the machine meets
them all. What is printed are medians over the rounds. Every target gets the same prompts.

CPU time per request or chunk is the figure to trust on a small or shared machine: requests per second also depend
on what the clients and workers leave of it. The line `direct` (no router) shows what these alone can do.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "scripts" / "native"
PLACE = ROOT / ".bench-venv"
OURS, REFERENCE, HAPROXY, DIRECT = "sglang_router", "reference 0.3.2", "haproxy", "direct"
WORKERS = 4
GROUPS = 64  # of prompts that share their first three quarters
READY_WITHIN = 60.0  # seconds, as all times here
ENDS_WITHIN = 10.0
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
MEMORY_LIMIT = 400.0  # MB
MEMORY_STEPS, MEMORY_STEP = 6, 50_000  # distinct prompts: 300,000


class BenchError(Exception):
    """The benchmark cannot go on; its text is for the user."""


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


# -- processes ---------------------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    """Runs in the child: the kernel ends it if the benchmark itself is killed (PR_SET_PDEATHSIG of prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Session:
    """A command in a session of its own, with all processes it starts."""

    process: subprocess.Popen[str]
    log: Path

    def stats(self) -> Iterator[list[str]]:
        """For each process: the fields of /proc/PID/stat from the third on (proc(5))."""
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has just ended
                    told = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                    if int(told[3]) == self.process.pid:
                        yield told

    def cpu(self) -> float:
        """Seconds in user and system mode since the start, all processes; in steps of 1 / TICK each."""
        return sum(int(stat[11]) + int(stat[12]) for stat in self.stats()) / TICK

    def memory(self) -> float:
        """Resident memory of all processes, in MB."""
        return sum(int(stat[21]) for stat in self.stats()) * PAGE / 1e6

    def end(self) -> None:
        """SIGTERM, then SIGKILL, to the whole group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(ENDS_WITHIN)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(f"    {line}" for line in lines) or "    (empty)"


@contextlib.contextmanager
def session(name: str, folder: Path, command: Sequence[str]) -> Iterator[Session]:
    """Runs `command` inside the block. Standard output is its pipe, standard error its log."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command,
            cwd=folder,  # not the checkout: the reference would import this package
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if name == "worker" else sink,
            stderr=sink,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    started = Session(process, log)
    try:
        yield started
    finally:
        started.end()
        if process.stdout:
            process.stdout.close()


def build(folder: Path) -> None:
    """Compiles the native workers and clients into `folder`. BenchError if there is no compiler."""
    compiler = os.environ.get("CC", "cc")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("worker", "load", "streams"):
        command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(folder / name), f"{NATIVE}/{name}.c"]
        try:
            subprocess.run(command, check=True, timeout=60)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BenchError(f"a C compiler is needed (apt-get install gcc libc6-dev): {error}") from None


# -- targets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Something that requests can be sent to; without a session it is the worker itself."""

    name: str
    port: int
    session: Session | None = None


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def healthy_workers(port: int) -> int:
    """What a router's /readiness tells; 0 while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=5) as answer:
            told: dict[str, Any] = json.load(answer)
            return int(told.get("healthy_workers", WORKERS))  # HAProxy passes the question on to a worker
    except (OSError, http.client.HTTPException):
        return 0


def wait_ready(target: Target) -> Target:
    """Returns `target` when it serves with all workers."""
    assert target.session is not None
    deadline = time.monotonic() + READY_WITHIN
    while healthy_workers(target.port) < WORKERS:
        with contextlib.suppress(subprocess.TimeoutExpired):
            target.session.process.wait(0.1)
            raise BenchError(f"{target.name} ended. Its log:\n{target.session.tail()}")
        if time.monotonic() > deadline:
            raise BenchError(f"{target.name} was not ready in {READY_WITHIN:.0f} s. Its log:\n{target.session.tail()}")
    return target


@dataclass
class Bench:
    """Starts what is measured; everything has ended when `stack` is closed."""

    folder: Path  # for logs and configurations
    natives: Path
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self, name: str, *command: str) -> Session:
        return self.stack.enter_context(session(name, self.folder, command))

    def workers(self, chunks: int, interval_ms: int) -> list[int]:
        """Starts the workers; their ports."""
        started = self.start("worker", str(self.natives / "worker"), str(WORKERS), str(chunks), str(interval_ms))
        assert started.process.stdout is not None
        ports = [int(word) for word in started.process.stdout.readline().split()]
        if len(ports) != WORKERS:
            raise BenchError(f"the worker did not start. Its log:\n{started.tail()}")
        return ports

    def router(self, name: str, python: Path, workers: Sequence[int], flags: Sequence[str]) -> Target:
        port, metrics_port = free_ports(2)
        command = [str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(metrics_port), *flags]
        command += ["--worker-urls", *(f"http://127.0.0.1:{worker}" for worker in workers)]
        return wait_ready(Target(name, port, self.start(name, *command)))

    def haproxy(self, program: str, workers: Sequence[int]) -> Target:
        """The limit of what a proxy can do: one thread in C that does not look at bodies."""
        (port,) = free_ports(1)
        servers = "".join(f"  server w{n} 127.0.0.1:{worker}\n" for n, worker in enumerate(workers))
        path = self.folder / "haproxy.cfg"
        path.write_text(
            "global\n  nbthread 1\n  maxconn 8000\n"
            "defaults\n  mode http\n  http-reuse always\n  option http-no-delay\n"
            "  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
            f"listen bench\n  bind 127.0.0.1:{port}\n  balance leastconn\n{servers}"
        )
        return wait_ready(Target(HAPROXY, port, self.start(HAPROXY, program, "-db", "-f", str(path))))

    def targets(self, workers: Sequence[int], options: argparse.Namespace) -> list[Target]:
        """All there are. The reference logs errors only: at its default it would log lines for every request."""
        found = [self.router(OURS, Path(sys.executable), workers, options.flags)]
        if options.reference.exists():
            flags = ("--policy", "cache_aware", "--log-level", "error")
            found.append(self.router(REFERENCE, options.reference, workers, flags))
        if options.haproxy:
            found.append(self.haproxy(options.haproxy, workers))
        return [*found, Target(DIRECT, workers[0])]

    def client(self, name: str, *words: object, within: float) -> dict[str, float]:
        """Runs a client to its end; what it printed."""
        command = [str(self.natives / name), *map(str, words)]
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=within + READY_WITHIN,
            start_new_session=True,
        )
        told: dict[str, float] = json.loads(result.stdout)
        return told


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One kind of load: a row for each target."""

    label: str
    client: str  # the native program
    connections: int
    size: int  # of a prompt, in bytes
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Loads that are measured with the same workers and targets. `unit` is what CPU time is divided by."""

    unit: str
    columns: tuple[str, str, str]  # heads of rate, median and p99
    chunks: int
    interval_ms: int
    loads: Sequence[Load]


REQUESTS = Part(
    "requests",
    ("requests/s", "p50 ms", "p99 ms"),
    100,
    0,
    [
        Load("200 B", "load", 32, 200),
        Load("4 kB", "load", 32, 4_000),
        Load("16 kB", "load", 32, 16_000),
        Load("64 kB", "load", 32, 64_000),
        Load("1 kB, 1 connection", "load", 1, 1_000),
        Load("1 kB, 100 chunks at once", "load", 32, 1_000, ("stream",)),
    ],
)
STREAMS = Part(
    "chunks",
    ("streams/s", "delay p50 ms", "delay p99 ms"),
    50,
    20,
    [Load("500 streams", "streams", 500, 1_000), Load("1,500 streams", "streams", 1_500, 1_000)],
)


@dataclass(frozen=True)
class Sample:
    """One target under one load in one round, or the medians of several. Times in microseconds, memory in MB."""

    rate: float
    p50: float
    p99: float
    cpu: float  # per request or chunk
    memory: float
    errors: float


def measure(bench: Bench, part: Part, load: Load, target: Target, seconds: float, seed: int) -> Sample:
    before = target.session.cpu() if target.session else 0.0
    words = (target.port, load.connections, seconds, load.size, GROUPS, seed, *load.extra)
    told = bench.client(load.client, *words, within=seconds)
    spent, memory = 0.0, 0.0
    if target.session:
        spent, memory = target.session.cpu() - before, target.session.memory()
        os.truncate(target.session.log, 0)  # a line for each request, at a high rate
    cpu = spent * 1e6 / max(told[part.unit], 1)
    return Sample(told["rate"], told["p50_us"], told["p99_us"], cpu, memory, told["errors"])


Results = dict[Load, dict[str, list[Sample]]]


def run_part(bench: Bench, part: Part, options: argparse.Namespace) -> Results:
    """All rounds of a part: the samples of each target under each load."""
    targets = bench.targets(bench.workers(part.chunks, part.interval_ms), options)
    results: Results = {load: {target.name: [] for target in targets} for load in part.loads}
    for target in targets:
        measure(bench, part, part.loads[0], target, 0.5, 0)  # code and connections get warm
    for number in range(options.rounds):
        turn = number % len(targets)
        for load in part.loads:
            for target in targets[turn:] + targets[:turn]:
                sample = measure(bench, part, load, target, options.seconds, number + 1)
                results[load][target.name].append(sample)
                shown = f"{sample.rate:,.0f} {part.columns[0]}, {sample.cpu:.1f} us of CPU each of the {part.unit}"
                say(f"round {number + 1}/{options.rounds}: {load.label}: {target.name}: {shown}")
    bench.stack.close()
    return results


def memory_rows(bench: Bench, flags: Sequence[str]) -> Iterator[list[str]]:
    """Resident memory while distinct prompts go through this router: one row for each kind of prompt."""
    for size, groups in ((400, GROUPS), (400, 0), (4_000, GROUPS)):
        label = f"{size:,} B, {'three quarters' if groups else 'nothing'} shared"
        target = bench.router(OURS, Path(sys.executable), bench.workers(1, 0), flags)
        assert target.session is not None
        readings, errors, rates = [target.session.memory()], 0.0, []
        for step in range(MEMORY_STEPS):
            words = (target.port, 32, 300, size, groups, step + 1, MEMORY_STEP)
            told = bench.client("load", *words, within=300)
            os.truncate(target.session.log, 0)
            readings.append(target.session.memory())
            errors += told["errors"]
            rates.append(told["rate"])
            say(f"{label}: {(step + 1) * MEMORY_STEP:,} prompts: {readings[-1]:.0f} MB, {told['rate']:,.0f} requests/s")
        bench.stack.close()
        verdict = "yes" if max(readings) <= MEMORY_LIMIT and not errors else "NO"
        shown = [f"{reading:.0f}" for reading in readings]
        yield [label, *shown, f"{statistics.median(rates):,.0f}", f"{errors:.0f}", verdict]


# -- what is shown -----------------------------------------------------------------------------------------------------


def median_of(samples: Sequence[Sample]) -> Sample:
    """Medians, but the sum of the errors."""
    middle = {f.name: statistics.median(getattr(sample, f.name) for sample in samples) for f in fields(Sample)}
    return Sample(**{**middle, "errors": sum(sample.errors for sample in samples)})


def spread(samples: Sequence[Sample]) -> str:
    """Of CPU time over the rounds: half of the range, relative to the median."""
    values = [sample.cpu for sample in samples]
    return f"{(max(values) - min(values)) / 2 / statistics.median(values):.0%}" if min(values) else "-"


def rows_of(results: Results) -> Iterator[list[str]]:
    for load, by_target in results.items():
        medians = {name: median_of(samples) for name, samples in by_target.items()}
        peer = medians.get(REFERENCE)
        for name, got in medians.items():
            cells = [f"{got.rate:,.0f}", f"{got.p50 / 1e3:.2f}", f"{got.p99 / 1e3:.2f}"]
            cells += [f"{got.p99 / peer.p99:.2f}" if peer and peer.p99 else "-"]
            if name == DIRECT:
                cells += ["-"] * 4
            else:
                cells += [f"{got.cpu:.1f}", spread(by_target[name])]
                cells += [f"{got.cpu / peer.cpu:.2f}" if peer and peer.cpu else "-", f"{got.memory:.0f}"]
            yield [load.label, name, *cells, f"{got.errors:.0f}"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Aligned, also in Markdown. The first columns hold words, up to the one called `target` if there is one."""
    lefts = [n == 0 or "target" in head[n:] for n in range(len(head))]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    shapes = list(zip(widths, lefts, strict=True))
    lines = [
        [cell.ljust(width) if left else cell.rjust(width) for cell, (width, left) in zip(row, shapes, strict=True)]
        for row in [head, *rows]
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width if left else "-" * (width - 1) + ":" for width, left in shapes])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(flags: Sequence[str]) -> str:
    """What the figures were measured on and with."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((fact.partition(":")[2].strip() for fact in facts if "model name" in fact), platform.machine())
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}; sglang_router "
        f"{version('sglang-router')}, commit {git.stdout.strip()}, {' '.join(flags) or 'default options'}; CPU time "
        f"in ticks of {1000 / TICK:.0f} ms; load average before the start {os.getloadavg()[0]:.2f}."
    )


def show_memory(bench: Bench, options: argparse.Namespace) -> bool:
    """The table of `--memory`; whether the limit held and no request failed."""
    steps = [f"{step * MEMORY_STEP:,}" for step in range(1, MEMORY_STEPS + 1)]
    head = ["MB after ... distinct prompts", "none", *steps, "requests/s", "errors", f"<= {MEMORY_LIMIT:.0f} MB"]
    rows = list(memory_rows(bench, options.flags))
    print(f"{options.about}\n\n{table(head, rows, options.markdown)}")
    return all(row[-1] == "yes" for row in rows)


def show_speed(bench: Bench, options: argparse.Namespace) -> bool:
    """The tables of requests and streams; whether all requests to this router succeeded."""
    if not options.reference.exists():
        say("skipped: sglang-router==0.3.2, not installed (scripts/bench does that where PyPI answers)")
    if not options.haproxy:
        say("skipped: HAProxy, not installed (apt-get install haproxy)")
    print(f"{options.about} Medians of {options.rounds} rounds of {options.seconds:g} s.", flush=True)
    good = True
    for part in (REQUESTS, STREAMS):
        results = run_part(bench, part, options)
        good = good and not any(sample.errors for by_target in results.values() for sample in by_target[OURS])
        rate, median, late = part.columns
        head = ["load", "target", rate, median, late, "of ref.", f"CPU us/{part.unit[:-1]}", "+-", "of ref.", "RSS MB"]
        print(f"\n{table([*head, 'errors'], list(rows_of(results)), options.markdown)}", flush=True)
    return good


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are shown (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of each load (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of 1.2 s: rough")
    parser.add_argument("--memory", action="store_true", help="resident memory over 300,000 distinct prompts instead")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/performance.md")
    parser.add_argument("--reference", type=Path, default=PLACE / "reference/bin/python", help="Python that has 0.3.2")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of this router; must come last")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 1.2
    options.haproxy = shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    options.about = machine(options.flags)
    return options


def main() -> int:
    options = parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # also where SIGINT was ignored before us
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each stream takes two of a router
    with tempfile.TemporaryDirectory(prefix="sglang-router-bench-") as folder:
        bench = Bench(Path(folder), PLACE / "native")
        try:
            build(bench.natives)
            return 0 if (show_memory if options.memory else show_speed)(bench, options) else 1
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            say(str(error))
            return 2
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # nothing may interrupt the ending
            bench.stack.close()


if __name__ == "__main__":
    sys.exit(main())
