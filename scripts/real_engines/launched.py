"""One run of launch_server, observed from outside: its HTTP port, its processes, its end.

Every process that was ever seen below the launcher is recorded with its start time, so that each can be found at the
end, whatever happened to its parents. In addition, a variable in the environment marks all processes of the run, to
find those that started between two checks.
"""

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
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MARK = "SGLR_ENGINE_TEST"
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
LISTENING = "0A"


class CourseError(Exception):
    """The test cannot continue. The text is for the user."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Process(NamedTuple):
    """A process, identified by pid and start time, because the system reuses pids."""

    pid: int
    started: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_with_parent() -> None:
    """Called in the child: the kernel kills it if the test itself is killed (PR_SET_PDEATHSIG of prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Launched:
    """A running launcher. Its logs go to `folder`: its own is `log`, and each engine's is rank-N.log."""

    def __init__(self, folder: Path, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "launcher.log"
        self.port = free_port()
        self.began = time.monotonic()
        self._mark = f"{MARK}={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        ports = ("--port", str(self.port), "--router-prometheus-port", str(free_port()))
        at_once = {"SGLANG_ROUTER_SHUTDOWN_DRAIN_SECS": "0", "SGLANG_ROUTER_METRICS_INTERVAL_SECS": "0"}
        logs = ("--log-dir", str(folder), "--router-log-format", "json")
        command = [sys.executable, "-m", "sglang_router.launch_server", *arguments, *ports, *logs]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the test sends Ctrl-C to the whole process group, as a terminal does
                preexec_fn=end_with_parent,
                env={**os.environ, **at_once, "TMPDIR": str(folder), **environ, name: value},
            )
        self._seen: set[Process] = set()

    # -- HTTP -----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, value: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Send one request on its own connection; the body is sent as JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=120)
        with contextlib.closing(connection):
            body = (
                None if value is None else json.dumps(value, separators=(",", ":")).encode()
            )  # as the openai client does
            kind = {"content-type": "application/json"} if body else {}
            connection.request(method, path, body, {**kind, **(headers or {})})
            got = connection.getresponse()
            return Answer(got.status, {name.lower(): text for name, text in got.getheaders()}, got.read())

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", "/workers").json()["workers"]
        return found

    def healthy(self) -> int:
        """Return how many workers get requests; 0 while the router does not answer yet."""
        try:
            return sum(worker["is_healthy"] for worker in self.workers())
        except (OSError, http.client.HTTPException):
            return 0

    def records(self) -> Iterator[dict[str, Any]]:
        """Return the router's log; its last line may not be written yet."""
        for path in sorted(self.folder.glob("sglang-router.*.log")):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)

    # -- life cycle -----------------------------------------------------------------------------------------

    def until(self, holds: Callable[[], bool], within: float, what: str) -> None:
        """Poll until a condition holds. Raises: CourseError with the ends of the logs if it does not hold in time."""
        deadline = time.monotonic() + within
        while not holds():
            if self.process.poll() is not None:
                raise CourseError(f"launch_server ended with status {self.process.returncode}\n{self.tails()}")
            if time.monotonic() > deadline:
                raise CourseError(f"{what}: not within {within:.0f} s\n{self.tails()}")
            self.look()
            time.sleep(0.05)

    def tails(self, lines: int = 12) -> str:
        """Return the ends of all logs."""
        ends = []
        for path in sorted(self.folder.glob("*.log")):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            ends += [f"  -- {path.name}", *(f"  {line[:300]}" for line in text)]
        return "\n".join(ends)

    def interrupt(self) -> None:
        """Send Ctrl-C."""
        self.look()
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        self.look()
        self.process.kill()

    def end(self) -> None:
        """Kill all processes that are left. Call it last, after the check for left-over processes."""
        self.look()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        for process in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.process.wait()

    # -- processes ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Record all processes below the launcher."""
        children: dict[int, list[Process]] = {}
        for process, parent in _processes():
            children.setdefault(parent, []).append(process)
        waiting = [self.process.pid]
        while waiting:
            below = children.get(waiting.pop(), [])
            self._seen.update(below)
            waiting += [process.pid for process in below]

    def left(self) -> list[Process]:
        """Return the recorded or marked processes that still run, without the launcher."""
        running = {process for process, _ in _processes()}
        return sorted((running & self._seen) | {p for p in running if p.pid != self.process.pid and self._ours(p.pid)})

    def _ours(self, pid: int) -> bool:
        try:
            return self._mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # the process has ended
            return False

    def open_ports(self) -> list[str]:
        """Return the sockets of the engines that other machines can reach, as `command:port`."""
        self.look()
        ports = dict(_listening())
        found = set()
        for process in self._seen:
            with contextlib.suppress(OSError):  # the process has just ended
                command = Path(f"/proc/{process.pid}/comm").read_text().strip()
                links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
                found |= {f"{command}:{ports[link]}" for link in links if link in ports}
        return sorted(found)


def _processes() -> Iterator[tuple[Process, int]]:
    """Return all running processes with their parents, without zombies."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # the process has just ended
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    yield Process(int(folder.name), fields[19]), int(fields[1])


def _listening() -> Iterator[tuple[str, int]]:
    """Return the listening TCP sockets that are not on loopback: link target of the descriptor, and port."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            host, _, port = local.partition(":")
            if state == LISTENING and host not in LOOPBACK:
                yield f"socket:[{inode}]", int(port, 16)
