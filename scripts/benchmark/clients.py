"""The native programs of scripts/native: built, and run to their result."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.loads import Load, Room
from scripts.benchmark.processes import BenchError, Processes, Server
from scripts.reporting import ROOT

SOURCES = ROOT / "scripts" / "native"
NAMES = ("worker", "load", "streams", "arrivals", "idle")
SHARED = 64
"""Beginnings of prompts; those that have the same one share their first three quarters."""
PATIENCE = 60.0  # seconds that a client may take longer than planned
NO_COMPILER = "a C compiler is needed; on Debian or Ubuntu: apt-get install gcc libc6-dev"


@dataclass(frozen=True)
class Natives:
    """The programs, in a folder."""

    folder: Path

    def build(self) -> Natives:
        """Compile all of them; return itself. Raises: BenchError if that is not possible."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            command = [*(shlex.split(os.environ.get("CC", "")) or ["cc"]), "-std=gnu11", "-O2", "-Wall", "-Wextra"]
            command += ["-o", str(self.folder / name), str(SOURCES / f"{name}.c"), "-lm"]
            try:
                subprocess.run(command, check=True, timeout=60)
            except (OSError, subprocess.CalledProcessError) as error:
                raise BenchError(f"{NO_COMPILER} ({error})") from None
        return self

    def workers(self, processes: Processes, room: Room) -> tuple[Server, list[int]]:
        """Start the workers of a room, all in one process; return it and their ports. Raises: BenchError."""
        command = [self.folder / "worker", room.workers, room.chunks, room.interval_ms]
        started = processes.start("direct", 0, command, {}, piped=True)
        assert started.process.stdout is not None
        ports = [int(word) for word in started.process.stdout.readline().split()]
        if len(ports) != room.workers:
            raise started.failure("told no ports")
        started.port = ports[0]
        return started, ports

    def load(self, load: Load, target: Server, seconds: float, seed: int) -> dict[str, float]:
        """Put a load on a target; return what the client printed. Raises: BenchError."""
        words = [load.amount, seconds, load.size, SHARED, seed, *filter(None, [load.word])]
        return self.run(load.client, target, seconds, *words)

    def run(self, name: str, target: Server, seconds: float, *words: object) -> dict[str, float]:
        """Run a client on a target to its end; return what it printed. Raises: BenchError."""
        command = [*map(str, (self.folder / name, target.port, *words))]
        try:
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=seconds + PATIENCE)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise BenchError(f"the client {name} failed on {target.name}: {error}") from None
        os.truncate(target.log, 0)  # it may get a line for each request
        return dict(json.loads(run.stdout))

    @contextlib.contextmanager
    def idle(self, target: Server, count: int, seed: int) -> Iterator[int]:
        """Hold idle connections to a target; yield how many it has accepted."""
        command = [*map(str, (self.folder / "idle", target.port, count, seed))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            try:
                yield int(holder.stdout.readline() or 0)
            finally:
                holder.stdin.close()
