"""Processes in sessions of their own, with all processes that they start: CPU time, memory, readiness, end."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.reporting import TICK

READY_WITHIN, PER_WORKER = 60.0, 0.15  # seconds, as all times here; for each worker that a target must find
ENDS_WITHIN = 10.0
PAGE = os.sysconf("SC_PAGE_SIZE")
LOG_LINES = 15


class BenchError(Exception):
    """The benchmark cannot continue, or a target cannot be measured. The text is for the user."""


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


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
        """Return the seconds of all threads of all processes, user and system, since the start; in ticks."""
        return sum(int(stat[11]) + int(stat[12]) for stat in self._stats()) / TICK

    def memory(self) -> float:
        """Return the resident memory of all processes, in MB."""
        return sum(int(stat[21]) for stat in self._stats()) * PAGE / 1e6

    def wait_ready(self, path: str, workers: int) -> Server:
        """Wait until it serves with all workers; return itself. Raises: BenchError."""
        patience = READY_WITHIN + PER_WORKER * workers
        deadline = time.monotonic() + patience
        while healthy_workers(self.port, path, workers) < workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise self.failure(f"ended with status {self.process.wait(0.1)}")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready in {patience:.0f} s")
        return self

    def failure(self, what: str) -> BenchError:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return BenchError("\n    ".join([f"{self.name} {what}. Its log ends with:", *lines]))

    def end(self) -> None:
        """Send SIGTERM, then SIGKILL, to the whole process group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(ENDS_WITHIN)
        if self.process.stdout:
            self.process.stdout.close()


def healthy_workers(port: int, path: str, workers: int) -> int:
    """Return how many workers a readiness answer tells of: all if it does not say, 0 while there is no answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            told = json.load(answer)
    except (OSError, http.client.HTTPException, ValueError):
        return 0
    return int(told.get("healthy_workers", workers)) if isinstance(told, dict) else workers


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@dataclass
class Processes:
    """Starts processes. All have ended when `stack` is closed."""

    folder: Path  # for logs and configurations; not the checkout, whose modules another router must not import
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(
        self, name: str, port: int, command: Sequence[object], more: Mapping[str, str], piped: bool = False
    ) -> Server:
        """Run a command, with `more` in its environment; `piped`: its standard output is not for the log."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env={**os.environ, **more},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else sink,
                stderr=sink,
                text=True,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        server = Server(name, port, process, log)
        self.stack.callback(server.end)
        return server
