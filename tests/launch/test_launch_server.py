"""The command as users start it, with real processes: engines start, serve, and leave no process however it ends."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from routers import WITHIN, RouterProcess, environment, free_port

COMMAND = (sys.executable, "-W", "error", "-m", "sglang_router.launch_server")
CONSOLE = Path(sysconfig.get_path("scripts")) / "sglang-router"
REQUEST = {"text": "x", "sampling_params": {"max_new_tokens": 2}}
LONG = {"text": "x", "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}


def words(*flags: str) -> tuple[list[str], int]:
    """A command line for two built-in engines on ports that are free now, and the router's port."""
    port = free_port()
    own = ["--backend", "builtin", "--port", str(port), "--router-prometheus-port", str(free_port())]
    own += ["--router-disable-access-log", "--router-metrics-interval-secs", "0"]
    return [*COMMAND, *own, "--router-dp-worker-base-port", str(free_port()), *flags], port


@contextlib.contextmanager
def server(tmp_path: Path, *flags: str) -> Iterator[RouterProcess]:
    """The command, once its router answers; the test ends it. Afterwards, none of its processes must be left."""
    log = tmp_path / "server.log"
    command, port = words(*flags)
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    url = f"http://127.0.0.1:{port}"
    router = RouterProcess(process, url, url + "/metrics", log)
    family: set[int] = set()
    try:
        router.until(lambda: answers(router))
        router.until(lambda: len(engines(router)) == 2)
        family = descendants(process.pid)
        yield router
        router.end()
        until_gone(family)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def answers(router: RouterProcess) -> bool:
    with contextlib.suppress(OSError):
        return router.get("/liveness").status == 200
    return False


def engines(router: RouterProcess) -> list[int]:
    """The process ids of the engines that run, by rank."""
    replicas = sorted((worker["replica"] for worker in router.workers().values()), key=lambda each: each["rank"])
    return [replica["pid"] for replica in replicas if replica["pid"]]


def states(router: RouterProcess) -> list[str]:
    replicas = sorted((worker["replica"] for worker in router.workers().values()), key=lambda each: each["rank"])
    return [replica["state"] for replica in replicas]


def descendants(pid: int) -> set[int]:
    """All descendants of a process, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    left = [pid]
    while left:
        below = children.get(left.pop(), [])
        found.update(below)
        left += below
    return found


def until_gone(pids: set[int], within: float = WITHIN) -> None:
    deadline = time.monotonic() + within
    while left := {pid for pid in pids if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.01)


def run(*flags: str, door: Sequence[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [*door, *flags], env=environment(), capture_output=True, text=True, timeout=WITHIN, check=False
    )


# -- serving -----------------------------------------------------------------------------------------------------------


def test_serves_from_the_first_healthy_replica_on(tmp_path: Path) -> None:
    with server(tmp_path, "--startup-delay", "0.7", "--router-startup-wait-secs", "20", "--seed", "3") as router:
        late = engines(router)[1]
        os.kill(late, signal.SIGSTOP)
        assert router.post("/generate", REQUEST).status == 200, "it waits for the first, not for all"
        assert states(router)[0] == "healthy"
        assert states(router)[1] in ("starting", "loading")
        os.kill(late, signal.SIGCONT)
        router.until(lambda: states(router) == ["healthy", "healthy"])
        router.until(lambda: "2 of 2 replicas are healthy" in router.log())
        log = router.log()
        assert log.index("serving on http://127.0.0.1:") < log.index("2 of 2 replicas are healthy")
        assert "[rank 0] engine 'built-in' listens on http://127.0.0.1:" in log

        before = engines(router)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # case 12: they ended launcher and engines
            router.send_signal(number)
        router.until(lambda: "SIGHUP: reading" in router.log() and "log files are opened again" in router.log())
        assert engines(router) == before
        assert router.post("/generate", REQUEST).status == 200

        with ThreadPoolExecutor() as pool:
            running = pool.submit(router.post, "/generate", LONG)
            router.until(lambda: any(worker["load"] for worker in router.workers().values()))
            router.send_signal(signal.SIGINT)
            assert running.result(WITHIN).status == 200, "the router drains before the engines end"
        assert router.exit_status() == 0


def test_replicas_are_kept_alive_and_restarted_by_order(tmp_path: Path) -> None:
    with server(tmp_path, "--router-restart-initial-backoff-secs", "0.1") as router:
        router.until_healthy()
        first, second = engines(router)
        os.kill(first, signal.SIGKILL)
        router.until(lambda: engines(router)[1:] == [second] and first not in engines(router))
        router.until_healthy()
        assert "killed by SIGKILL" in router.log()
        assert router.post("/restart_workers").status == 202
        assert router.get("/restart_workers").json()["state"] == "running", "and it is ended in the middle of that"


def test_logs_in_files(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    with server(tmp_path, "--log-dir", str(folder)) as router:
        router.until_healthy()
        router.send_signal(signal.SIGQUIT)
        assert router.exit_status() == 0
        assert "[rank" not in router.log()
    names = [path.name.partition(".")[0] for path in sorted(folder.iterdir())]
    assert names == ["rank-0", "rank-1", "sglang-router"]
    assert "listens on http://127.0.0.1:" in (folder / "rank-1.log").read_text()


def test_rows_on_a_terminal() -> None:
    command, _ = words("--startup-delay", "0.5")
    master, terminal = pty.openpty()
    seen = b""
    process = subprocess.Popen(
        command, env=environment() | {"TERM": "xterm"}, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        for wanted in (b"rank 0  loading ", b"2 of 2 replicas are healthy"):
            deadline = time.monotonic() + WITHIN
            while wanted not in seen:
                assert time.monotonic() < deadline, seen.decode()
                if select.select([master], [], [], 0.1)[0]:
                    seen += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            if select.select([master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the last one has closed it
                    seen += os.read(master, 65536)
        assert process.returncode == 0
        start, _, after = seen.partition(b"2 of 2 replicas are healthy")
        assert b"\x1b[2A\x1b[J" in start
        assert b"\x1b" not in re.sub(rb"\x1b\[[0-9;]*m", b"", after), "nothing but colours"
        assert b"[rank " not in start
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_while_models_load(number: signal.Signals, tmp_path: Path) -> None:
    with server(tmp_path, "--startup-delay", "600") as router:
        assert set(states(router)) <= {"starting", "loading"}
        router.send_signal(number)
        assert router.exit_status() == 0


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with server(tmp_path, "--startup-delay", "600", "--router-stop-grace-secs", "600") as router:
        router.until(lambda: set(states(router)) == {"loading"})  # before that, SIGTERM ends even a stopped process
        for pid in engines(router):
            os.kill(pid, signal.SIGSTOP)
        router.send_signal(signal.SIGTERM)
        router.until(lambda: "a replica is stopping" in router.log())
        router.send_signal(signal.SIGTERM)
        assert router.exit_status() == 128 + signal.SIGTERM


def test_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    with server(tmp_path, "--startup-delay", "600") as router:
        family = descendants(router.process.pid)
        assert len(family) >= 4, "two engines, each with its warden"
        router.send_signal(signal.SIGKILL)
        assert router.exit_status() == -signal.SIGKILL
        until_gone(family)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_fails_shows_why() -> None:
    command, _ = words("--no-such-flag", "1")
    done = run(door=command)
    assert done.returncode == 1
    assert "    | python -m sglang_router.engine: error: unrecognized arguments: --no-such-flag 1\n" in done.stderr
    assert "the engine does not know a flag: correct it" in done.stderr
    assert re.search(r"to try it by hand: .*--no-such-flag 1 --host 127.0.0.1 --port \d+ rank=1\n", done.stderr)
    assert "no replica could be started" in done.stderr.splitlines()[-2]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--backend sglang --model-path m", "error: sglang is not installed for "),
        ("--backend builtin --dp-worker-host 192.0.2.1", "error: --dp-worker-host 192.0.2.1: "),
        ("--backend builtin --log-dir /dev/null/x", "error: --log-dir /dev/null/x: Not a directory"),
    ],
)
def test_mistake_is_one_line_and_status_2(flags: str, line: str) -> None:
    done = run(*flags.split(), "--port", str(free_port()), "--router-log-level", "error")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "server"])
def test_console(command: str) -> None:
    done = run(command, "--help", door=[str(CONSOLE)])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: sglang-router serve ")
