"""The subject of the faults: engines and a router as real processes, and what must be true again after a fault.

    load ──> router ──┬──> engine 0
                      ├──> engine 1
                      └──> shim ──> engine 2      the network in which network faults happen

`Watch` records what an idle router uses (descriptors, tasks, memory); `Watch.settle` waits until the router is back at
that level, and names what is not.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.reliability.load import Load, Loop
from scripts.reliability.shim import Shim

from engines import end_engine, start_engine, wait_until_healthy
from routers import RouterProcess, ask, environment, free_port

CHECKOUT = Path(__file__).resolve().parents[2]
TREE = 200_000
"""Bytes of text that the router keeps for a worker: few, so that evictions happen all the time."""
FLAGS = (
    *("--health-check-interval-secs", "0.5", "--health-check-timeout-secs", "1", "--health-failure-threshold", "2"),
    *("--worker-startup-check-interval", "0.2", "--connect-timeout-secs", "2", "--request-timeout-secs", "30"),
    *("--cb-timeout-duration-secs", "1", "--cb-max-timeout-duration-secs", "2", "--slow-start-secs", "1"),
    *("--metrics-interval-secs", "0"),
    *("--upstream-idle-timeout-secs", "1", "--startup-wait-secs", "5", "--max-tree-size", str(TREE)),
)
STARTS_WITHIN = 30.0
SETTLES_WITHIN = 30.0
GROWS_BY = 24.0
"""MB by which a router may have grown since it was first idle: caches that fill, pages that the allocator keeps."""


class ReliabilityError(Exception):
    """The run cannot continue. The text is for the user."""


class Engine:
    """A built-in engine that can end and start again at its URL."""

    def __init__(self, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = flags
        self._process: subprocess.Popen[str] | None = None

    def start(self, *more: str) -> None:
        """Start it; return when it is healthy."""
        self._process, _ = start_engine("--port", str(self.port), *self._flags, *more)
        wait_until_healthy(self.url)

    @property
    def runs(self) -> bool:
        return self._process is not None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL; return when it has ended."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def end(self) -> None:
        """End it by SIGTERM, as an operator does."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            end_engine(process)

    def at_rest(self) -> bool:
        """Whether no request is running or queued there."""
        loads = ask(self.url, "GET", "/get_load").json()
        return not any(load["num_reqs"] + load["num_waiting_reqs"] for load in loads)


class Facts(NamedTuple):
    """What a router uses."""

    fds: int
    tasks: int
    megabytes: float


class Router(RouterProcess):
    """A router process that reports its tasks and its tree on request."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, door: Path) -> None:
        super().__init__(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/metrics", log)
        self.port = port
        self._door = door

    def until(self, holds: Callable[[], bool], within: float = STARTS_WITHIN) -> None:
        """Poll until a condition holds. Raises: ReliabilityError if it does not hold in time."""
        deadline = time.monotonic() + within
        while not holds():
            if self.process.poll() is not None:
                raise ReliabilityError(f"the router ended:\n{self.log()[-2000:]}")
            if time.monotonic() > deadline:
                states = {url: worker["health"] for url, worker in self.workers().items()}
                raise ReliabilityError(f"not within {within:g} s; workers: {states}")
            time.sleep(0.05)

    def inside(self) -> dict[str, Any]:
        """Return the report of scripts.reliability.inspected."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(STARTS_WITHIN)
            client.connect(str(self._door))
            client.sendall(b"\n")
            told: dict[str, Any] = json.loads(b"".join(iter(lambda: client.recv(65536), b"")))
            return told

    def facts(self) -> Facts:
        pid = self.process.pid
        fds = len(os.listdir(f"/proc/{pid}/fd"))
        return Facts(fds, self.inside()["tasks"], megabytes(pid))


def megabytes(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def start_router(folder: Path, urls: Sequence[str], *flags: str, port: int = 0) -> Router:
    """Start a router and wait until its workers are healthy. Without `port`, it gets any free port."""
    for _ in range(5):
        number = port or free_port()
        door = folder / f"router-{number}.{time.monotonic_ns():x}"
        log = door.with_suffix(door.suffix + ".log")
        words = ["--port", str(number), "--prometheus-port", "0", *FLAGS, *flags, "--worker-urls", *urls]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "scripts.reliability.inspected", str(door), *words],
                cwd=CHECKOUT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        router = Router(process, number, log, door)
        try:
            if _answers(router):
                return router
        except BaseException:  # Ctrl-C: nobody else knows the process yet
            process.kill()
            process.wait()
            raise
        if "is in use" not in router.log() or port:  # otherwise another process took the port: try another port
            break
    raise ReliabilityError(f"the router did not start, exit status {process.returncode}:\n{router.log()}")


def _answers(router: Router) -> bool:
    deadline = time.monotonic() + STARTS_WITHIN
    while router.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if router.get("/liveness").status == 200:
                return True
        time.sleep(0.01)
    return False


def stop_router(router: Router) -> list[str]:
    """End a router as an operator does; return what was wrong with its end or in its log."""
    try:
        router.end()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return [f"the end of the router: {error}"[-2000:]]
    finally:
        if router.process.poll() is None:
            router.process.kill()
            router.process.wait()
    return []


class Watch:
    """Records what an idle router uses, and checks that it is back at that level."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._until(lambda: not self._restless())
        self.level = router.facts()

    def settle(self, workers: int | None = None) -> list[str]:
        """Wait until the router is idle again; return what is not. `workers`: the expected number of workers."""
        found = ["the router has ended"]

        def at_rest() -> bool:
            found[:] = self._restless() + self._leaks(workers)
            return not found

        with contextlib.suppress(OSError):
            self._until(at_rest)
        return found

    def rebase(self) -> None:
        """Record the current level as that of an idle router; call it after a warm-up."""
        self.level = self.router.facts()

    def _restless(self) -> list[str]:
        """Return which requests are in flight, and which workers are not healthy."""
        wrong = []
        samples = self.router.samples()
        loads = {url: worker["load"] for url, worker in self.router.workers().items() if worker["load"]}
        if loads:
            wrong.append(f"loads are not 0: {loads}")
        for name, own in (("worker_load", 0), ("running_requests", 0), ("active_requests", 1), ("waiting_requests", 0)):
            if (value := samples.total(f"sgl_router_{name}")) > own:
                wrong.append(f"sgl_router_{name} is {value:g}")
        return wrong

    def _leaks(self, workers: int | None) -> list[str]:
        told, level, now = self.router.inside(), self.level, self.router.facts()
        known = self.router.workers()
        wrong = []
        sick = [url for url, worker in known.items() if not worker["is_healthy"]]
        if sick and workers is None:
            wrong.append(f"not healthy: {', '.join(sick)}")
        if workers is not None and len(known) != workers:
            wrong.append(f"{len(known)} workers instead of {workers}")
        slack = 2 * len(known)  # a health check and a load query of each worker may be in flight
        if now.fds > level.fds + slack:
            wrong.append(f"{now.fds} descriptors, {level.fds} before")
        if now.tasks > level.tasks + slack:
            wrong.append(f"{now.tasks} tasks, {level.tasks} before: {told['kinds']}")
        if now.megabytes > level.megabytes + GROWS_BY:
            wrong.append(f"{now.megabytes:.0f} MB, {level.megabytes:.0f} before")
        if told["held"] != told["edges"] or told["sizes"] != told["owned"]:
            wrong.append(f"the tree says {told['held']} {told['sizes']}, and has {told['edges']} {told['owned']}")
        if max(told["sizes"], default=0) > told["bound"]:
            wrong.append(f"the tree remembers more than its bound: {told['sizes']}")
        return wrong

    def _until(self, holds: Callable[[], bool]) -> None:
        """Return when the condition holds, or after the time limit."""
        deadline = time.monotonic() + SETTLES_WITHIN
        while not holds() and time.monotonic() < deadline and self.router.process.poll() is None:
            time.sleep(0.05)


class Field:
    """See the module. `urls` are the workers' URLs for the router; `rate` and `clients` are those of its loads."""

    def __init__(self, folder: Path, seed: int, engine: Sequence[str], router: Sequence[str]) -> None:
        self.folder = folder
        self.seed = seed
        self.rate = 0.0
        self.clients = 10
        self.loop = Loop()
        self.engines = [Engine(*engine) for _ in range(3)]
        self.flags = router
        self.shim = Shim(free_port(), self.engines[2].port)
        self.urls = [self.engines[0].url, self.engines[1].url, self.shim.url]
        self.router: Router | None = None
        self.watch: Watch | None = None
        self.outage = 0.0
        """Seconds without any engine; set by a fault that ends all engines."""
        self._more: list[Shim] = []

    def start(self) -> None:
        """Start the engines, the shim and the router that most faults share."""
        for engine in self.engines:
            engine.start()
        self.loop.run(self.shim.start())
        self.router = start_router(self.folder, self.urls, *self.flags)
        self.router.until_healthy(*self.urls)
        self.watch = Watch(self.router)

    def stop(self) -> list[str]:
        """End all processes; return what was wrong with the router's end."""
        wrong = stop_router(self.router) if self.router is not None else []
        for engine in self.engines:
            with contextlib.suppress(Exception):  # a failure to end one process must not keep the others running
                engine.end()
        with contextlib.suppress(Exception):
            for shim in (self.shim, *self._more):
                self.loop.run(shim.stop())
        self.loop.close()
        return wrong

    def more(self, shim: Shim) -> Shim:
        """Add another shim in front of an engine. It stays until the end, because connections through it may stay."""
        self.loop.run(shim.start())
        self._more.append(shim)
        return shim

    def load(self, port: Callable[[], int], **more: Any) -> Load:
        """Return a load that is not started yet; `more` as in Load."""
        return Load(self.loop, port, seed=self.seed, **({"clients": self.clients, "rate": self.rate} | more))

    def mend(self) -> None:
        """Undo a fault: all engines run, the network works, and the router has the three workers again."""
        self.loop.run(self.shim.set("pass"))
        for engine in self.engines:
            if engine.runs:
                engine.signal(signal.SIGCONT)
            else:
                engine.start()
        router = self.router
        assert router is not None
        known = router.workers()
        for url in known.keys() - set(self.urls):
            router.ask("DELETE", worker_path(url))
        for url in self.urls:
            if url not in known:
                router.post("/workers", {"url": url})
            elif known[url].get("draining"):
                router.post(worker_path(url, "resume"))


def worker_path(url: str, verb: str = "") -> str:
    """Return the path of a worker in the control plane."""
    path = "/workers/" + url.replace(":", "%3A").replace("/", "%2F")
    return f"{path}/{verb}" if verb else path


@contextlib.contextmanager
def field(folder: Path, seed: int, engine: Sequence[str] = (), router: Sequence[str] = ()) -> Iterator[Field]:
    """Return a started Field; `engine` and `router` are more flags. Raises: ReliabilityError if its end was not
    clean."""
    made = Field(folder, seed, engine, router)
    wrong: list[str] = []
    try:
        made.start()
        yield made
    finally:
        wrong = made.stop()
    if wrong:
        raise ReliabilityError("\n".join(wrong))
