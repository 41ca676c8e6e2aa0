"""The health check of the image, as the image runs it: a process of its own that finds out where the router listens."""

from __future__ import annotations

import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from certificates import Authority
from routers import WITHIN, environment, free_port, router_process

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "docker" / "healthcheck.py"
AT_ONCE = ("--shutdown-drain-secs", "0")


def checked(process: int, *words: str, variables: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run it for a process; return status and what it said."""
    command = [sys.executable, str(SCRIPT), *(words or ["/liveness"]), str(process)]
    environ = environment() | dict(variables or {})
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.strip()


@contextmanager
def started_as(words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process whose command line ends with these words, as that of an init does; it only waits."""
    with subprocess.Popen(["sh", "-c", "read line", *words], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("encrypted", [False, True])
def test_it_tells_alive_from_ready_with_keys_and_with_tls_at_any_port(encrypted: bool, tmp_path: Path) -> None:
    flags, tls = ["--api-key", "secret-key", "--control-plane-api-keys", "id:name:admin:other-key"], None
    if encrypted:
        authority = Authority(tmp_path / "ca")
        pair = authority.issue("router")
        flags += ["--tls-cert-path", pair.cert, "--tls-key-path", pair.key]
        tls = ssl.create_default_context(cafile=authority.cert)
    with router_process([], *flags, *AT_ONCE, tls=tls) as router:
        assert checked(router.process.pid) == (0, "/liveness: 200")
        assert checked(router.process.pid, "/readiness") == (1, "/readiness: 503")


def test_the_port_may_come_from_a_file_and_a_variable_counts_more(tmp_path: Path) -> None:
    """As in an image whose command is `launch --config FILE`; and while somebody writes that file."""
    file = tmp_path / "router.yaml"
    command = ["sglang-router", "launch", "--config", str(file)]
    with router_process([], *AT_ONCE) as router, started_as(command) as other:
        port = router.url.rpartition(":")[2]
        file.write_text(f"port: {port}\n")
        assert checked(other.pid) == (0, "/liveness: 200")
        file.write_text("port: 1\n")
        assert checked(other.pid)[0] == 1
        assert checked(other.pid, variables={"SGLANG_ROUTER_PORT": port}) == (0, "/liveness: 200")
        file.write_text("port: [")
        assert checked(other.pid, variables={"SGLANG_ROUTER_PORT": port}) == (0, "/liveness: 200")


def test_a_port_where_nobody_listens_is_a_line_and_no_traceback() -> None:
    with started_as(["sglang-router", "--worker-urls", "http://a:1", "--port", str(free_port())]) as process:
        status, said = checked(process.pid)
    assert status == 1
    assert said.startswith("/liveness: ")
    assert "refused" in said
