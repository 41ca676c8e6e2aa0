"""Whose socket it is that listens at an engine's URL: with real processes and the kernel's own tables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sglang_router.launch import listeners
from sglang_router.launch.listeners import stranger_at

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's tables of sockets in /proc")

SHARES = "import socket, sys; s = socket.socket({family}); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
LISTENS = SHARES + "s.bind(({host!r}, {port})); s.listen(); print(s.getsockname()[1], flush=True); sys.stdin.read()"


class Programs:
    """Starts programs that listen, and an engine's warden that has some of them as children."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def listen(self, host: str, port: int = 0, family: str = "socket.AF_INET") -> tuple[int, int]:
        """Start a program that listens and lets others share its port; return its port and process id."""
        return self._started([sys.executable, "-I", "-S", "-c", LISTENS.format(**vars_of(host, port, family))])

    def engine(self, host: str, port: int = 0, family: str = "socket.AF_INET") -> tuple[int, int]:
        """The same in a grandchild of the process whose id is returned."""
        python = [sys.executable, "-I", "-S", "-c", LISTENS.format(**vars_of(host, port, family))]
        return self._started(["sh", "-c", 'sh -c \'"$@"; true\' sh "$@"; true', "sh", *python])

    def idle(self) -> int:
        """A process that listens nowhere."""
        return self._started(["sh", "-c", "echo 0; read x"])[1]

    def _started(self, command: list[str]) -> tuple[int, int]:
        process = self._stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._stack.callback(process.stdin.close)  # runs before the wait above: they end with their input
        return int(process.stdout.readline()), process.pid


def vars_of(host: str, port: int, family: str) -> dict[str, object]:
    return {"host": host, "port": port, "family": family}


@pytest.fixture
def programs() -> Iterator[Programs]:
    with ExitStack() as stack:
        yield Programs(stack)


def test_a_process_of_the_engine_listens(programs: Programs) -> None:
    port, warden = programs.engine("127.0.0.1")
    assert stranger_at(f"http://127.0.0.1:{port}", warden) == ""
    assert stranger_at(f"http://localhost:{port}", warden) == ""


def test_a_stranger_is_named(programs: Programs) -> None:
    port, pid = programs.listen("127.0.0.1")
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    wanted = f"another program listens on 127.0.0.1:{port}: {name} (process {pid})"
    assert stranger_at(f"http://127.0.0.1:{port}", programs.idle()) == wanted


def test_nobody_listens(programs: Programs) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert stranger_at(f"http://127.0.0.1:{bound.getsockname()[1]}", programs.idle()) == ""


def test_a_port_that_both_share_is_not_the_engines(programs: Programs) -> None:
    """vLLM lets others share its port, so that two of them may listen and each gets half of the connections."""
    port, warden = programs.engine("127.0.0.1")
    programs.listen("127.0.0.1", port)
    assert stranger_at(f"http://127.0.0.1:{port}", warden).startswith(f"another program listens on 127.0.0.1:{port}: ")


@pytest.mark.parametrize(
    ("url", "family", "exact", "wide"),
    [
        ("http://127.0.0.1:{}", "socket.AF_INET", "127.0.0.1", "0.0.0.0"),
        ("http://[::1]:{}", "socket.AF_INET6", "::1", "::"),
    ],
)
def test_the_most_exact_address_gets_the_connections(
    programs: Programs, url: str, family: str, exact: str, wide: str
) -> None:
    port, pid = programs.listen(wide, family=family)
    assert f"process {pid})" in stranger_at(url.format(port), programs.idle())
    _, warden = programs.engine(exact, port, family)
    assert stranger_at(url.format(port), warden) == ""
    assert stranger_at(url.format(port), pid), "and the engine, if it were the other one, would not be reached"


def test_an_engine_for_both_families_is_reached_by_ipv4(programs: Programs) -> None:
    port, warden = programs.engine("::", family="socket.AF_INET6")
    assert stranger_at(f"http://127.0.0.1:{port}", warden) == ""
    assert stranger_at(f"http://127.0.0.1:{port}", programs.idle()) != ""


def test_another_address_does_not_matter(programs: Programs) -> None:
    port, _ = programs.listen("127.0.0.2")
    _, warden = programs.engine("127.0.0.1", port)
    assert stranger_at(f"http://127.0.0.1:{port}", warden) == ""


def test_a_name_that_is_not_known_says_nothing(programs: Programs) -> None:
    assert stranger_at("http://no.such.host.invalid:1", programs.idle()) == ""


def test_without_proc_nobody_can_tell(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, _ = programs.listen("127.0.0.1")
    monkeypatch.setattr(listeners, "_PROC", tmp_path / "none")
    assert stranger_at(f"http://127.0.0.1:{port}", programs.idle()) == ""


def test_a_process_that_hides_its_files_may_be_the_one(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, _ = programs.listen("127.0.0.1")
    warden = programs.idle()
    (tmp_path / "net").symlink_to("/proc/net")
    hidden = tmp_path / str(warden)
    hidden.mkdir()
    (hidden / "fd").symlink_to(f"/proc/{warden}/fd")
    monkeypatch.setattr(listeners, "_PROC", tmp_path)
    assert stranger_at(f"http://127.0.0.1:{port}", warden) == f"another program listens on 127.0.0.1:{port}"
    (hidden / "fd").unlink()
    os.mkfifo(hidden / "fd")  # cannot be listed, not even by root
    assert stranger_at(f"http://127.0.0.1:{port}", warden) == ""
