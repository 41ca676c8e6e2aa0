"""Real engines instead of simulated ones: routers before them one after the other, each with empty caches.

    launch_server ──> engines                          started once for a load (`real_engines`)
    client ──> router ──> the same engines             for each router; then the caches are emptied

The model is tiny and has random weights, so the engines are quick, and two cores are shared by all processes: cached
tokens are what real caches hold, and times can be compared within a load, not with other machines. An engine whose
cache cannot be emptied is started again for each router.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop
from scripts.benchmark.processes import BenchError, Processes, Server
from scripts.real_engines.engines import ENGINES, Engine
from scripts.real_engines.launched import CourseError, Launched
from scripts.routing_suite.client import Player
from scripts.routing_suite.figures import Costs, figures, reasons
from scripts.routing_suite.live import machine_cpu
from scripts.routing_suite.routers import OWN, Contender
from scripts.routing_suite.rows import Engined
from scripts.routing_suite.scripted import Chain, script

STARTS_WITHIN = 600.0
"""Seconds. Several engines start at once on the cores that everything shares."""
MODEL = "built-in"
"""The name by which the client asks."""
PREDICTED = "predicted"
_COMPUTED = {
    "sglang": ("sglang:prompt_tokens_total", "sglang:cached_tokens_total", "sglang:generation_tokens_total"),
    "vllm": ("vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total", "vllm:generation_tokens_total"),
    "llamacpp": ("llamacpp:prompt_tokens_total", "", "llamacpp:tokens_predicted_total"),
}
"""Counters of an engine: tokens of prompts, of those the cached ones (llama.cpp counts the others), of answers."""
_PREDICTED = "sgl_router_predicted_cached_tokens_total"


class Outcome(NamedTuple):
    """What one run gave: its figures by name, and why requests failed."""

    figures: dict[str, float]
    reasons: dict[str, int]


class Started:
    """The engines of one load, behind a launcher that is not asked for anything. Raises: SetupError, CourseError."""

    def __init__(self, load: Engined, folder: Path) -> None:
        self.engine: Engine = ENGINES[load.engine]
        self._load = load
        self._folder = folder
        self._python = self.engine.install()
        self._runs = 0
        self._run = self._start()

    def _start(self) -> Launched:
        from scripts.real_engines import models  # imported here: it needs a module of the tests

        engine, load = self.engine, self._load
        model = models.tiny(self._folder)
        if engine.folder:
            model = models.hugging_face(model, self._folder)
        arguments = ["--backend", engine.name, "--model-path", str(model), "--dp-size", str(load.engines)]
        if engine.folder:
            arguments += ["--engine-python", self._python]
        arguments += [*(flag.format(name=MODEL) for flag in engine.flags), *load.flags]
        self._runs += 1
        run = Launched(self._folder / f"run{self._runs}", arguments, engine.environ)
        try:
            run.until(lambda: run.healthy() == load.engines, STARTS_WITHIN, "not all engines are healthy")
        except BaseException:
            run.end()
            raise
        return run

    @property
    def ports(self) -> list[int]:
        """Where the engines listen."""
        return [urlsplit(worker["url"]).port or 0 for worker in self._run.workers()]

    def empty(self) -> None:
        """Empty the caches; of engines that cannot, or that are still busy with what a router left, by a restart."""
        if self.engine.flush and self._run.ask("POST", "/flush_cache").status == 200:
            return
        self._run.end()
        self._run = self._start()

    def computed(self) -> list[float]:
        """Return the tokens that each engine has computed since its start."""
        prompt, cached, output = _COMPUTED[self.engine.name]
        found = [_counters(port) for port in self.ports]
        return [each.get(prompt, 0.0) - each.get(cached, 0.0) + each.get(output, 0.0) for each in found]

    def end(self) -> None:
        """End the engines."""
        self._run.end()


def _counters(port: int) -> dict[str, float]:
    """Return the counters that a process tells at /metrics, summed over their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return counters(answer.read().decode())


def counters(text: str) -> dict[str, float]:
    """Return the values in an exposition by name, summed over their labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", text, re.M):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def _predicted(router: Server, player: Player) -> float:
    """Return the tokens that our router predicted as cached, as a share of all prompt tokens; others tell none: -1."""
    prompts = sum(sent.answer.prompt for sent in player.sent)
    return _counters(router.port).get(_PREDICTED, 0.0) / (prompts or 1)


def _play(engines: Started, contender: Contender, chains: list[Chain], folder: Path) -> Outcome:
    """Send a load through one router. Raises: BenchError, OSError."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        router = contender.start(Processes(folder, stack), engines.ports)
        player = Player(router.port)
        before, began = engines.computed(), (time.monotonic(), router.cpu(), time.process_time(), machine_cpu())
        uvloop.run(player.play(chains))
        ended = (time.monotonic(), router.cpu(), time.process_time(), machine_cpu())
        wall, of_router, client, machine = (after - first for first, after in zip(began, ended, strict=True))
        work = [after - first for first, after in zip(before, engines.computed(), strict=True)]
        costs = Costs(wall, of_router, 0.0, client, machine, os.cpu_count() or 1)
        found = figures(player.sent, work, costs)
        found[PREDICTED] = _predicted(router, player) if contender.name.startswith(OWN) else -1.0
        return Outcome(found, reasons(player.sent))


def run(load: Engined, contenders: Sequence[Contender], seeds: int, requests: int) -> Iterator[tuple[int, Outcome]]:
    """Give, for each seed and router, the number of the router and what it did. requests: 0: as the load says.

    Raises: SetupError, BenchError, OSError.
    """
    trace = load.trace + (f",requests={requests}" if requests else "")
    with tempfile.TemporaryDirectory(prefix="routing-suite-") as place:
        folder = Path(place)
        try:
            engines = Started(load, folder)
        except CourseError as error:
            raise BenchError(f"{load.name}: {error}") from None
        try:
            for seed in range(1, seeds + 1):
                chains = script(trace, seed)
                for number, contender in enumerate(contenders):
                    if number or seed > 1:
                        engines.empty()
                    yield number, _play(engines, contender, chains, folder / f"{seed}-{number}")
        except CourseError as error:
            raise BenchError(f"{load.name}: {error}") from None
        finally:
            engines.end()
