"""One live run: engines with empty caches, a router before them, and a client that plays a script; some side by side.

    client ──> router ──> engines      processes on loopback; engines mostly sleep, as the time that they model passes

Afterwards nothing runs any more. The engines' own counters say how the work was spread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import uvloop
from scripts.benchmark.processes import Processes, Server, free_ports
from scripts.reporting import ROOT, TICK
from scripts.routing_suite.client import Player
from scripts.routing_suite.figures import Costs, figures, reasons
from scripts.routing_suite.routers import Contender
from scripts.routing_suite.rows import Lived
from scripts.routing_suite.scripted import Chain

PAGE_SIZE = 16
"""Tokens of a page of the engines' caches, as in replays."""
RESTARTED = 1


class Engines:
    """The engines of one run. work: tokens that processes computed that have ended, by engine."""

    def __init__(self, load: Lived, processes: Processes) -> None:
        self._load = load
        self._processes = processes
        self.ports = free_ports(len(load.speeds))
        self._servers = [self._start(number) for number in range(len(load.speeds))]
        for server in self._servers:
            server.wait_ready("/v1/models", 1)
        self._ended = [0.0] * len(load.speeds)
        self._cpu = 0.0

    def _start(self, number: int) -> Server:
        port, load = self.ports[number], self._load
        words = ["--port", port, "--capacity-tokens", load.cache, "--page-size", PAGE_SIZE]
        words += ["--speed", load.speeds[number]]
        command = [sys.executable, "-m", "sglang_router.engine", *words]
        return self._processes.start(f"engine-{number}", port, command, {"PYTHONPATH": str(ROOT / "src")})

    def kill(self, number: int) -> None:
        """Kill an engine; what it computed counts on."""
        server = self._servers[number]
        self._ended[number] += computed(server.port)
        self._cpu += server.cpu()
        server.process.kill()
        server.process.wait()

    def restart(self, number: int) -> None:
        """Start an engine again, with an empty cache."""
        self._servers[number] = self._start(number)

    def cpu(self) -> float:
        """Return the CPU time of all of them, in seconds."""
        return self._cpu + sum(server.cpu() for server in self._servers)

    def work(self) -> list[float]:
        """Return the tokens that each has computed, divided by its speed. One may still be about to start again."""
        for server in self._servers:
            server.wait_ready("/v1/models", 1)
        found = [before + computed(server.port) for before, server in zip(self._ended, self._servers, strict=True)]
        return [tokens / speed for tokens, speed in zip(found, self._load.speeds, strict=True)]


def computed(port: int) -> float:
    """Return the tokens that an engine has computed: of prompts without the cached ones, and of answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {name: float(value) for name, value in re.findall(r"^sglang:(\w+)_tokens_total\{.*\} (\S+)", text, re.M)}
    return found["prompt"] - found["cached"] + found["generation"]


def machine_cpu() -> float:
    """Return the CPU time of all programs of the machine since its start, in seconds."""
    user, nice, system, _, _, interrupts, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / TICK


class Stage:
    """Routers of one kind with their engines, and the client's view of them."""

    def __init__(self, load: Lived, contender: Contender, processes: Processes, routers: int) -> None:
        self._load = load
        self._engines = Engines(load, processes)
        self._routers = [contender.start(processes, self._engines.ports) for _ in range(routers)]
        self._player = Player(*(router.port for router in self._routers))
        self._began: tuple[float, ...] = ()

    def begin(self) -> None:
        """Begin to count CPU time."""
        self._began = self._readings()

    def _readings(self) -> tuple[float, ...]:
        routers = sum(router.cpu() for router in self._routers)
        return time.monotonic(), routers, self._engines.cpu(), time.process_time(), machine_cpu()

    async def play(self, chains: list[Chain]) -> None:
        """Send all requests; meanwhile an engine restarts, if the load has that."""
        playing = asyncio.ensure_future(self._player.play(chains))
        if self._load.restart:
            await asyncio.sleep(self._load.restart)
            await asyncio.to_thread(self._engines.kill, RESTARTED)
            await asyncio.sleep(self._load.down)
            self._engines.restart(RESTARTED)
        await playing

    def result(self, beside: int) -> tuple[dict[str, float], dict[str, int]]:
        """Return the figures, and why requests failed. beside: stages that one client played at once."""
        wall, router, engines, client, machine = (
            after - before for before, after in zip(self._began, self._readings(), strict=True)
        )
        costs = Costs(wall, router, engines, client / beside, machine, os.cpu_count() or 1)
        return figures(self._player.sent, self._engines.work(), costs), reasons(self._player.sent)


async def _play(stages: Sequence[Stage], chains: list[Chain]) -> None:
    await asyncio.gather(*(stage.play(chains) for stage in stages))


def run(
    load: Lived, contenders: Sequence[Contender], chains: list[Chain], routers: int = 1
) -> list[tuple[dict[str, float], dict[str, int]]]:
    """Run some routers side by side; return the figures of each, and why requests failed. routers: of each kind, that
    get the requests in turn. Raises: BenchError."""
    with tempfile.TemporaryDirectory(prefix="routing-suite-") as folder, contextlib.ExitStack() as stack:
        stages = []
        for number, contender in enumerate(contenders):
            place = Path(folder) / str(number)
            place.mkdir()
            stages.append(Stage(load, contender, Processes(place, stack), routers))
        for stage in stages:
            stage.begin()
        uvloop.run(_play(stages, chains))
        return [stage.result(len(stages)) for stage in stages]
