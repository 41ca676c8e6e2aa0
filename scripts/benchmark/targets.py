"""The targets, as a table: what each is, how it is started, and which version was found. To add one, add a row.

A target is a command that listens on a port in front of workers. Its program is one of this checkout (`source`: which
sources), a package of PyPI (`package`, installed in an environment of its own) or a program of the system (`program`).
Each is started with what its documentation gives for the policy that ours has, where it has one, and without a log line
for each request, which is in its favour: this router writes one for each, into a file.
"""

from __future__ import annotations

import filecmp
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from pathlib import Path

from scripts.benchmark.clients import SOURCES as NATIVE
from scripts.benchmark.environments import python_of
from scripts.benchmark.loads import Load, matches
from scripts.benchmark.options import Options
from scripts.benchmark.processes import BenchError, Processes, Server, free_ports
from scripts.reporting import ROOT

from sglang_router.words import counted

OURS, COMPILED, BEFORE = "ours", "compiled", "before"
REFERENCE, HAPROXY, DIRECT = "reference", "haproxy", "direct"
_COMPILED = ROOT / ".compiled" / "env"
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
AT_ONCE = {"SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "0"}
QUIET = ("--log-level", "error")


@dataclass(frozen=True)
class Place:
    """Where a target is started: what its command line or its configuration names."""

    program: str
    folder: Path
    port: int
    metrics_port: int
    workers: Sequence[int]
    flags: Sequence[str]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.workers]

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


def module(name: str, *flags: str) -> Callable[[Place], list[object]]:
    """Return how a router of the sglang-router family is started: all of them take the same words."""

    def command(place: Place) -> list[object]:
        listen = ["--host", "127.0.0.1", "--port", place.port, "--prometheus-port", place.metrics_port]
        return [place.program, "-m", name, *listen, *flags, *place.flags, "--worker-urls", *place.urls]

    return command


def haproxy(place: Place) -> list[object]:
    """One thread in C that does not read bodies: the lower bound for a proxy."""
    lines = [f"  bind 127.0.0.1:{place.port}"]
    lines += [f"  server w{number} 127.0.0.1:{port}" for number, port in enumerate(place.workers)]
    text = "\n".join([(NATIVE / "haproxy.cfg").read_text().rstrip(), *lines, ""])
    return [place.program, "-db", "-f", place.write("haproxy.cfg", text)]


def nginx(place: Place) -> list[object]:
    """One worker process, without buffers for answers."""
    servers = "\n    ".join(f"server 127.0.0.1:{port};" for port in place.workers)
    words = {"FOLDER": str(place.folder), "PORT": str(place.port), "WORKERS": servers}
    words["FILES"] = str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    text = re.sub("|".join(words), lambda found: words[found[0]], (NATIVE / "nginx.conf").read_text())
    return [place.program, "-e", "stderr", "-c", place.write("nginx.conf", text)]


def litellm(place: Place) -> list[object]:
    """One process; the strategy that its documentation recommends."""
    deployment = "  - model_name: mock\n    litellm_params: {{model: openai/mock, api_base: {url}/v1, api_key: none}}\n"
    text = (NATIVE / "litellm.yaml").read_text() + "".join(deployment.format(url=url) for url in place.urls)
    command = Path(place.program).with_name("litellm")
    return [command, "--config", place.write("litellm.yaml", text), "--host", "127.0.0.1", "--port", place.port]


@dataclass(frozen=True)
class Target:
    """One row.

    title   how tables call it; its version follows
    takes   patterns of loads; without any, all
    apart   measured only when --only names it: it answers a question of its own
    """

    name: str
    title: str
    command: Callable[[Place], list[object]]
    package: str = ""
    program: str = ""
    source: Callable[[Options, Path], Path | None] | None = None
    takes: tuple[str, ...] = ()
    apart: bool = False
    ready: str = "/readiness"
    environment: Mapping[str, str] = field(default_factory=dict)

    def takes_load(self, load: Load) -> bool:
        return matches(self.takes, load.name, load.group)


def checkout(options: Options, folder: Path) -> Path | None:
    return ROOT / "src"


def compiled(options: Options, folder: Path) -> Path | None:
    """Return where the compiled wheel is installed; None if it is not, or if it is not of this checkout's state."""
    place = next(_COMPILED.glob("lib/python*/site-packages"), _COMPILED)
    files = [path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")]
    same = all((place / path).exists() and filecmp.cmp(ROOT / "src" / path, place / path) for path in files)
    return place if same and any((place / "sglang_router").rglob(f"*{EXTENSION_SUFFIXES[0]}")) else None


def revision(options: Options, folder: Path) -> Path | None:
    """Unpack the sources as they were at the revision of --against. Raises: BenchError if there is no such revision."""
    if not options.against:
        return None
    place = folder / "before"
    if not place.exists():
        packed = subprocess.run(["git", "-C", str(ROOT), "archive", options.against, "src"], capture_output=True)
        if packed.returncode:
            raise BenchError(f"--against {options.against}: {packed.stderr.decode().strip()}")
        place.mkdir()
        subprocess.run(["tar", "-x", "-C", str(place)], input=packed.stdout, check=True)
    return place / "src"


def with_relays(name: str, title: str, source: Callable[[Options, Path], Path | None]) -> list[Target]:
    """Return the rows of one of our routers with one relay process and with two."""
    rows = []
    for count in (1, 2):
        launch = module(LAUNCHER, "--relay-processes", str(count))
        rows.append(
            Target(f"{name}-relays-{count}", f"{title}, {counted(count, 'relay')}", launch, source=source, apart=True)
        )
    return rows


LAUNCHER = "sglang_router.launch_router"
TARGETS = (
    Target(OURS, "this router", module(LAUNCHER), source=checkout),
    Target(COMPILED, "this router, compiled", module(LAUNCHER), source=compiled),
    Target(BEFORE, "before", module(LAUNCHER), source=revision),
    Target(
        REFERENCE,
        "sglang-router",
        module(LAUNCHER, "--policy", "cache_aware", *QUIET),
        package="sglang-router==0.3.2",
    ),
    Target("smg", "smg", module("smg.launch_router", "--policy", "cache_aware", *QUIET), package="smg==1.13.0"),
    Target(
        "vllm-router",
        "vllm-router",
        module("vllm_router.launch_router", "--policy", "cache_aware", *QUIET),
        package="vllm-router==0.1.17",
    ),
    Target(HAPROXY, "HAProxy", haproxy, program="haproxy"),
    Target("nginx", "nginx", nginx, program="nginx"),
    Target(
        "litellm",
        "LiteLLM",
        litellm,
        package="litellm[proxy]==1.100.0",
        takes=("200B", "4kB", "16kB", "60kB", "alone"),  # it makes every chunk anew: no delay can be told
        ready="/health/readiness",
        environment={"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    ),
    *with_relays(OURS, "this router", checkout),
    *with_relays(COMPILED, "this router, compiled", compiled),
)


@dataclass(frozen=True)
class Found:
    """A target that can be started: its program, and what it needs."""

    target: Target
    program: str
    version: str
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.target.title} {self.version}".rstrip()

    def start(self, processes: Processes, workers: Sequence[int]) -> Server:
        """Start it in front of workers; return it once it serves with all of them. Raises: BenchError."""
        port, metrics_port = free_ports(2)
        place = Place(self.program, processes.folder, port, metrics_port, workers, self.flags)
        started = processes.start(self.target.name, port, self.target.command(place), self.environment)
        try:
            return started.wait_ready(self.target.ready, len(workers))
        except BenchError:
            started.end()
            raise


def find(target: Target, options: Options, folder: Path) -> Found | str:
    """Return how a target can be started, or why not. Raises: BenchError for a wrong --against."""
    if target.source:
        source = target.source(options, folder)
        if source is None:
            return "not built from these sources (sh scripts/wheel)"
        told = options.against if target.name == BEFORE else version("sglang-router")
        more = {"PYTHONPATH": str(source), **AT_ONCE}
        return Found(target, sys.executable, told, options.flags, more)
    if target.package:
        python = python_of(target.name, target.package)
        if python is None:
            return f"{target.package} could not be installed from PyPI"
        return Found(target, str(python), target.package.partition("==")[2], environment=target.environment)
    program = shutil.which(target.program, path=SYSTEM_PATH)
    if program is None:
        return f"not installed; on Debian or Ubuntu: apt-get install {target.program}"
    return Found(target, program, program_version(program))


def program_version(program: str) -> str:
    """Return the first number with dots of what `program -v` says."""
    run = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
    told = re.search(r"\d+(\.\d+)+", run.stdout + run.stderr)
    return told[0] if told else ""


def wanted(options: Options) -> list[Target]:
    """Return the targets of --only, in the order of the table. `before` exists with --against only."""
    named = [each for each in TARGETS if matches(options.only, each.name) and (options.only or not each.apart)]
    return [each for each in named if each.name != BEFORE or options.against]
