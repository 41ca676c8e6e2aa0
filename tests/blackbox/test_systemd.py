"""A router as a service: this test plays systemd, which listens, starts, is told, stops, and starts again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import engine_processes
from routers import COMMAND, WITHIN, RouterProcess, ask, environment, free_port

AS_SERVICE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does between fork and exec: the socket becomes descriptor 3, and the variables name this process."""
BODY = {"text": "x", "sampling_params": {"max_new_tokens": 2}}


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    with engine_processes(1, "--speed", "0") as urls:
        yield urls


class Service:
    """One unit: its socket stays while its router comes and goes."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._folder = folder
        self._listens = socket.create_server(("127.0.0.1", 0))
        self._hears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._hears.bind(str(folder / "notify"))
        self._hears.settimeout(WITHIN)
        self.url = f"http://127.0.0.1:{self._listens.getsockname()[1]}"
        self._flags = flags
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *, port: int = 0) -> RouterProcess:
        """Start the router; port: what its options say, if that is not the unit's."""
        number = self._listens.fileno()
        words = [sys.executable, "-c", AS_SERVICE, str(number), *COMMAND, "--metrics-interval-secs", "0", *self._flags]
        words += ["--port", str(port or self.url.rpartition(":")[2]), "--prometheus-port", str(free_port())]
        variables = {"NOTIFY_SOCKET": str(self._folder / "notify"), "WATCHDOG_USEC": "60000000"}
        log = self._folder / "router.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(words, env=environment() | variables, stderr=sink, pass_fds=[number])
        self._processes.append(process)
        return RouterProcess(process, self.url, "", log)

    def hear(self, wanted: bytes) -> None:
        """Wait until the router tells this."""
        while self._hears.recv(1000) != wanted:
            pass

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._listens.close()
        self._hears.close()


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_client_that_comes_while_no_router_runs_is_served_by_the_next(
    processes: str, urls: list[str], tmp_path: Path
) -> None:
    flags = ("--worker-urls", *urls, "--relay-processes", processes, "--disable-circuit-breaker")
    with contextlib.closing(Service(tmp_path, *flags)) as service:
        first = service.start()
        service.hear(b"WATCHDOG=1")
        service.hear(b"READY=1")
        first.until_healthy(*urls)
        assert ask(service.url, "POST", "/generate", BODY).status == 200
        first.send_signal(signal.SIGTERM)
        service.hear(b"STOPPING=1")
        assert first.exit_status() == 0
        first.end()
        waits = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])))
        waits.sendall(b"GET /liveness HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        second = service.start()
        waits.settimeout(WITHIN)
        assert waits.recv(100).startswith(b"HTTP/1.1 200")
        waits.close()
        service.hear(b"READY=1")
        second.end()


def test_options_that_name_another_port_than_the_unit_are_refused(tmp_path: Path) -> None:
    with contextlib.closing(Service(tmp_path)) as service:
        router = service.start(port=free_port())
        assert router.process.wait(WITHIN) == 2
        assert "error: systemd listens on 127.0.0.1:" in router.log()
        assert os.linesep not in router.log().strip(), "one line, no traceback"
