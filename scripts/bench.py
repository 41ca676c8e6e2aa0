"""Measure this router, the reference router (sglang-router 0.3.2, in Rust), HAProxy, and no router at all.

    load or streams ──> target ──> worker (4 ports)      native clients and workers (scripts/native), all on loopback
          |                |
      rates, delays    CPU time and memory of its whole session, from /proc

`scripts/bench` (a shell script) prepares the environments and runs this. All targets run at the same time and are
measured one after the other, round by round, in an order that rotates, so that a disturbance of the machine affects
all of them. They get the same prompts. The tables show medians over the rounds. On a small or shared machine, trust the
CPU time: requests per second also depend on how much CPU clients and workers use. `direct` is clients and workers
without a router.
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
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "scripts" / "native"
PLACE = ROOT / ".bench-venv"
OURS, REFERENCE, HAPROXY, DIRECT = "sglang_router", "reference 0.3.2", "haproxy", "direct"
BEFORE = "before"
WORKERS = 4
AT_ONCE = {"SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "0"}
GROUPS = 64  # groups of prompts; those of a group share their first three quarters
READY_WITHIN = 60.0  # seconds, as all times here
ENDS_WITHIN = 10.0
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
MEMORY_LIMIT = 400  # MB
MEMORY_STEPS, MEMORY_STEP = 6, 50_000  # distinct prompts: 300,000


class BenchError(Exception):
    """The benchmark cannot continue. The text is for the user."""


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


# -- processes ---------------------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    """Called in the child: the kernel kills it if the benchmark itself is killed (PR_SET_PDEATHSIG of prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Server:
    """A command in its own session, with all processes that it starts. It listens on `port`."""

    name: str
    port: int
    process: subprocess.Popen[str]
    log: Path

    def _stats(self) -> Iterator[list[str]]:
        """Yield, for each process, the fields of /proc/PID/stat from the third on (proc(5))."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # the process has just ended
                told = path.read_text().rpartition(")")[2].split()
                if int(told[3]) == self.process.pid:
                    yield told

    def cpu(self) -> float:
        """Return the seconds of all processes in user and system mode since the start, in steps of 1 / TICK each."""
        return sum(int(stat[11]) + int(stat[12]) for stat in self._stats()) / TICK

    def memory(self) -> float:
        """Return the resident memory of all processes, in MB."""
        return sum(int(stat[21]) for stat in self._stats()) * PAGE / 1e6

    def wait_ready(self) -> Server:
        """Wait until it serves with all workers; return itself."""
        deadline = time.monotonic() + READY_WITHIN
        while healthy_workers(self.port) < WORKERS:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise self.failure(f"ended with status {self.process.wait(0.1)}")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready in {READY_WITHIN:.0f} s")
        return self

    def failure(self, what: str) -> BenchError:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return BenchError("\n    ".join([f"{self.name} {what}. Its log ends with:", *lines]))

    def end(self) -> None:
        """Send SIGTERM, then SIGKILL, to the whole process group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(ENDS_WITHIN)
        if self.process.stdout:
            self.process.stdout.close()


def healthy_workers(port: int) -> int:
    """Return the number of healthy workers in a router's /readiness; 0 while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=5) as answer:
            return int(json.load(answer).get("healthy_workers", WORKERS))  # HAProxy forwards the request to a worker
    except (OSError, http.client.HTTPException):
        return 0


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@dataclass
class Bench:
    """Starts routers, workers and clients. All have ended when `stack` is closed."""

    folder: Path  # for logs and configurations
    natives: Path = PLACE / "native"
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def build(self) -> None:
        """Compile the workers and clients. Raises: BenchError if there is no compiler."""
        self.natives.mkdir(parents=True, exist_ok=True)
        for name in ("worker", "load", "streams"):
            command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-Wall", "-Wextra"]
            command += ["-o", str(self.natives / name), str(NATIVE / f"{name}.c")]
            try:
                subprocess.run(command, check=True, timeout=60)
            except (OSError, subprocess.CalledProcessError) as error:
                raise BenchError(f"a C compiler is needed (apt-get install gcc libc6-dev): {error}") from None

    def start(self, name: str, port: int, *command: object, told: bool = False, source: Path | None = None) -> Server:
        """Run `command`; with `told`, its standard output is a pipe instead of the log. `source`: of this package."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,  # not the checkout, where the reference router would import this package
                env={**os.environ, **AT_ONCE, **({} if source is None else {"PYTHONPATH": str(source)})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if told else sink,
                stderr=sink,
                text=True,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        server = Server(name, port, process, log)
        self.stack.callback(server.end)
        return server

    def workers(self, chunks: int, interval_ms: int) -> tuple[Server, list[int]]:
        """Start the workers, all in one process; return it and their ports."""
        started = self.start(DIRECT, 0, self.natives / "worker", WORKERS, chunks, interval_ms, told=True)
        assert started.process.stdout is not None
        ports = [int(word) for word in started.process.stdout.readline().split()]
        if len(ports) != WORKERS:
            raise started.failure("told no ports")
        started.port = ports[0]
        return started, ports

    def router(
        self, name: str, python: Path | str, workers: Sequence[int], flags: Sequence[str], source: Path | None = None
    ) -> Server:
        port, metrics_port = free_ports()
        command = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", port, *flags]
        urls = [f"http://127.0.0.1:{worker}" for worker in workers]
        server = self.start(
            name, port, *command, "--prometheus-port", metrics_port, "--worker-urls", *urls, source=source
        )
        return server.wait_ready()

    def haproxy(self, program: str, workers: Sequence[int]) -> Server:
        """Return HAProxy, the lower bound for a proxy: one thread in C that does not read bodies."""
        port, _ = free_ports()
        lines = [f"  bind 127.0.0.1:{port}", *(f"  server w{n} 127.0.0.1:{w}" for n, w in enumerate(workers))]
        path = self.folder / "haproxy.cfg"
        path.write_text("\n".join([(NATIVE / "haproxy.cfg").read_text().rstrip(), *lines, ""]))
        return self.start(HAPROXY, port, program, "-db", "-f", path).wait_ready()

    def sources_of(self, revision: str) -> Path:
        """Unpack this package as it was at a revision. Raises: BenchError if there is no such revision."""
        place = self.folder / "before"
        if not place.exists():
            archive = ["git", "-C", str(ROOT), "archive", revision, "src"]
            packed = subprocess.run(archive, capture_output=True, check=False)
            if packed.returncode:
                raise BenchError(f"--against {revision}: {packed.stderr.decode().strip()}")
            place.mkdir()
            subprocess.run(["tar", "-x", "-C", str(place)], input=packed.stdout, check=True)
        return place / "src"

    def targets(self, part: Part, options: argparse.Namespace) -> list[Server]:
        """Return all targets. The reference router logs errors only: a line for every request would cost it time."""
        direct, workers = self.workers(part.chunks, part.interval_ms)
        found = [self.router(OURS, sys.executable, workers, options.flags)]
        if options.against:
            return [
                *found,
                self.router(BEFORE, sys.executable, workers, options.flags, self.sources_of(options.against)),
            ]
        if options.reference.exists():
            flags = ("--policy", "cache_aware", "--log-level", "error")
            found.append(self.router(REFERENCE, options.reference, workers, flags))
        if options.haproxy:
            found.append(self.haproxy(options.haproxy, workers))
        return [*found, direct]

    def client(self, name: str, target: Server, connections: int, seconds: float, *words: object) -> dict[str, float]:
        """Run a client to its end; return what it printed."""
        command = map(str, (self.natives / name, target.port, connections, seconds, *words))
        told = subprocess.run([*command], stdout=subprocess.PIPE, check=True, timeout=seconds + READY_WITHIN).stdout
        os.truncate(target.log, 0)  # it may get a line for each request
        return dict(json.loads(told))


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One kind of load: a row for each target. `size` is the size of a prompt in bytes."""

    label: str
    client: str
    connections: int
    size: int
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Loads that are measured with the same workers and targets. CPU time is divided by the number of `unit`s."""

    unit: str
    heads: Sequence[str]  # of rate, median and p99
    chunks: int
    interval_ms: int
    loads: Sequence[Load]


SIZES = {"200 B": 200, "4 kB": 4_000, "16 kB": 16_000, "64 kB": 64_000}
CALLS = [Load(label, "load", 32, size) for label, size in SIZES.items()]
CALLS += [Load("1 kB, alone", "load", 1, 1_000), Load("1 kB, 100 chunks at once", "load", 32, 1_000, ("stream",))]
PACED = [Load(f"{count:,} streams", "streams", count, 1_000) for count in (500, 1_500)]
PARTS = (
    Part("requests", ("requests/s", "p50 ms", "p99 ms"), chunks=100, interval_ms=0, loads=CALLS),
    Part("chunks", ("streams/s", "delay p50 ms", "delay p99 ms"), chunks=50, interval_ms=20, loads=PACED),
)


BEFORE_AND_AFTER = (replace(PARTS[0], loads=CALLS[:2]), replace(PARTS[1], loads=PACED[:1]))
"""What a change of the hot path is measured by, with --against."""


@dataclass(frozen=True)
class Sample:
    """The result of one target under one load in one round, or the medians of several. Times in us, memory in MB."""

    rate: float
    p50: float
    p99: float
    cpu: float  # per request or chunk
    memory: float
    errors: float


Results = dict[Load, dict[str, list[Sample]]]


def measure(bench: Bench, part: Part, load: Load, target: Server, seconds: float, seed: int) -> Sample:
    before = target.cpu()
    told = bench.client(load.client, target, load.connections, seconds, load.size, GROUPS, seed, *load.extra)
    cpu = (target.cpu() - before) * 1e6 / max(told[part.unit], 1)
    return Sample(told["rate"], told["p50_us"], told["p99_us"], cpu, target.memory(), told["errors"])


def run_part(bench: Bench, part: Part, options: argparse.Namespace) -> Results:
    """Measure all rounds of a part; return the samples of each target under each load."""
    targets = bench.targets(part, options)
    results: Results = {load: {target.name: [] for target in targets} for load in part.loads}
    for target in targets:
        measure(bench, part, part.loads[0], target, 0.5, 0)  # warm up code and connections
    for number in range(options.rounds):
        turn = number % len(targets)
        for load in part.loads:
            for target in targets[turn:] + targets[:turn]:
                sample = measure(bench, part, load, target, options.seconds, number + 1)
                results[load][target.name].append(sample)
                shown = f"{sample.rate:,.0f} {part.heads[0]}, p99 {sample.p99 / 1e3:.2f} ms"
                say(f"round {number + 1}/{options.rounds}: {load.label}: {target.name}: {shown}")
    bench.stack.close()
    return results


def measure_memory(bench: Bench, size: int, groups: int, flags: Sequence[str]) -> list[str]:
    """Measure resident memory while distinct prompts go through this router; return a row of the table."""
    label = f"{size:,} B, {'three quarters' if groups else 'nothing'} shared"
    target = bench.router(OURS, sys.executable, bench.workers(1, 0)[1], flags)
    readings, errors, rates = [target.memory()], 0.0, []
    for step in range(1, MEMORY_STEPS + 1):
        told = bench.client("load", target, 32, 300, size, groups, step, MEMORY_STEP)
        readings.append(target.memory())
        errors += told["errors"] + MEMORY_STEP - told["requests"]
        rates.append(told["rate"])
        say(f"{label}: {step * MEMORY_STEP:,} prompts: {readings[-1]:.0f} MB")
    bench.stack.close()
    verdict = "yes" if max(readings) <= MEMORY_LIMIT and not errors else "NO"
    return [label, *map("{:.0f}".format, readings), f"{statistics.median(rates):,.0f}", f"{errors:.0f}", verdict]


# -- tables ------------------------------------------------------------------------------------------------------------


def median_of(samples: Sequence[Sample]) -> Sample:
    """Return the medians, except for errors: their sum."""
    middle = {f.name: statistics.median(getattr(sample, f.name) for sample in samples) for f in fields(Sample)}
    return Sample(**{**middle, "errors": sum(sample.errors for sample in samples)})


def spread(samples: Sequence[Sample]) -> str:
    """Return the spread of CPU time over the rounds: half of the range, relative to the median."""
    values = [sample.cpu for sample in samples]
    half = (max(values) - min(values)) / 2
    return f"{half / statistics.median(values):.0%}" if half else "-"


def rows_of(results: Results) -> Iterator[list[str]]:
    for load, by_target in results.items():
        medians = {name: median_of(samples) for name, samples in by_target.items()}
        peer = medians.get(BEFORE) or medians.get(REFERENCE)
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
    """Return an aligned table, in Markdown if wanted. The columns up to `target`, if there is one, contain words."""
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
    """Describe the machine and the versions of a measurement."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((fact.partition(":")[2].strip() for fact in facts if "model name" in fact), platform.machine())
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}; sglang_router "
        f"{version('sglang-router')}, commit {git.stdout.strip()}, {' '.join(flags) or 'default options'}; CPU time "
        f"in ticks of {1000 / TICK:.0f} ms; load average before the start {os.getloadavg()[0]:.2f}."
    )


def show_memory(bench: Bench, options: argparse.Namespace) -> bool:
    """Print the table of `--memory`; return whether memory stayed below the limit and no request failed."""
    steps = [f"{step * MEMORY_STEP:,}" for step in range(1, MEMORY_STEPS + 1)]
    head = ["MB after ... distinct prompts", "none", *steps, "requests/s", "errors", f"<= {MEMORY_LIMIT} MB"]
    print(machine(options.flags), flush=True)
    rows = [measure_memory(bench, *kind, options.flags) for kind in ((400, GROUPS), (400, 0), (4_000, GROUPS))]
    print(f"\n{table(head, rows, options.markdown)}")
    return all(row[-1] == "yes" for row in rows)


def show_speed(bench: Bench, options: argparse.Namespace) -> bool:
    """Print the tables of requests and streams; return whether all requests to this router succeeded."""
    if options.against:
        say(f"beside revision {options.against}")
    elif not options.reference.exists():
        say("skipped: sglang-router==0.3.2, not installed (scripts/bench does that where PyPI answers)")
    if not options.against and not options.haproxy:
        say("skipped: HAProxy, not installed (apt-get install haproxy)")
    print(f"{machine(options.flags)} Medians of {options.rounds} rounds of {options.seconds:g} s.", flush=True)
    good = True
    for part in BEFORE_AND_AFTER if options.against else PARTS:
        results = run_part(bench, part, options)
        good = good and not any(sample.errors for by_target in results.values() for sample in by_target[OURS])
        head = ["load", "target", *part.heads, "of ref.", f"CPU us/{part.unit[:-1]}", "+-", "of ref.", "RSS MB"]
        print(f"\n{table([*head, 'errors'], list(rows_of(results)), options.markdown)}", flush=True)
    return good


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are shown (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of each load (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of 1 s: rough")
    parser.add_argument("--memory", action="store_true", help="resident memory over 300,000 distinct prompts instead")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/performance.md")
    parser.add_argument("--against", metavar="REVISION", help="measure beside this package as it was at a revision")
    parser.add_argument("--reference", type=Path, default=PLACE / "reference/bin/python", help="Python that has 0.3.2")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of this router; must come last")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 1
    options.haproxy = shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    return options


def main() -> int:
    options = parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # also if the parent process ignored SIGINT
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each stream takes two of a router
    with tempfile.TemporaryDirectory(prefix="sglang-router-bench-") as folder:
        bench = Bench(Path(folder))
        try:
            bench.build()
            return 0 if (show_memory if options.memory else show_speed)(bench, options) else 1
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            say(str(error))
            return 2
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # nothing may interrupt the clean-up
            bench.stack.close()


if __name__ == "__main__":
    sys.exit(main())
