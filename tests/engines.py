"""Real engine processes for tests: start them on free ports, wait for them, end them by their process ids.

    with engine_processes(2, "--speed", "0") as urls:
        ...                                  # urls == ["http://127.0.0.1:40123", "http://127.0.0.1:40127"]

Each engine binds port 0 itself and prints its URL on the first line of its standard output, so no two tests can race
for a port. Every process is ended at the end of the block, also when the test fails; one that does not end is an error.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

READY_WITHIN = 30.0  # seconds; a busy machine starts Python slowly
ENDS_WITHIN = 5.0


def start_engine(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """Start an engine; return its process and URL. It listens, but may not be healthy yet."""
    port = () if "--port" in flags else ("--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_router.engine", *port, *flags], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        readable, _, _ = select.select([process.stdout], [], [], READY_WITHIN)
        line = process.stdout.readline() if readable else ""
    except BaseException:  # Ctrl-C: nobody else knows the process yet
        end_engine(process)
        raise
    if "http://" not in line:
        end_engine(process)
        raise AssertionError(f"the engine did not start: exit {process.returncode}, said {line!r}")
    return process, "http://" + line.split("http://")[1].split()[0]


def wait_until_healthy(url: str, within: float = READY_WITHIN) -> None:
    """Return when `GET url/health` answers 200."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(url + "/health", timeout=within) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.02)
    raise AssertionError(f"{url} was not healthy within {within} s")


def end_engine(process: subprocess.Popen[str]) -> int:
    """End one engine: SIGTERM, then SIGKILL. Return its exit status, negative where a signal killed it."""
    process.terminate()
    try:
        return process.wait(ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(ENDS_WITHIN)
    finally:
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def engine_processes(n: int, *flags: str) -> Iterator[list[str]]:
    """Yield the URLs of `n` healthy engines with the same `flags`. Fail if one does not end cleanly afterwards."""
    started: list[tuple[subprocess.Popen[str], str]] = []
    try:
        started.extend(start_engine(*flags) for _ in range(n))
        for _, url in started:
            wait_until_healthy(url)
        yield [url for _, url in started]
    finally:
        killed = [process.pid for process, _ in started if end_engine(process) == -9]
    assert not killed, f"engines {killed} did not end on SIGTERM"
